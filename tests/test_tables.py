from refreshkv.tables import column_table, markdown_table

LINES = [["name", "loss", "K"], ["full attention", "1.5", "-"], ["a|b", "12.25", "1,024"]]


def test_columns_are_as_wide_as_their_widest_cell():
    assert column_table(LINES).splitlines() == [
        "name             loss      K",
        "full attention    1.5      -",
        "a|b             12.25  1,024",
    ]
    assert column_table([("a", "text"), ("long", "b")], text_columns=2) == "a     text\nlong  b"


def test_markdown():
    assert markdown_table(LINES).splitlines() == [
        "| name | loss | K |",
        "| :--- | ---: | ---: |",
        "| full attention | 1.5 | - |",
        "| a\\|b | 12.25 | 1,024 |",
    ]
