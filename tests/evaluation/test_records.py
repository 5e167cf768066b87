"""The file of finished records after a kill in the middle of a line."""

import pytest

from refreshkv.evaluation.perplexity.losses import SequenceRecord, SequenceRecords
from refreshkv.settings import SettingsError


@pytest.mark.parametrize("complete", [0, 1])
@pytest.mark.parametrize("begun", [1, 5, 9, 40])
def test_a_line_that_was_cut_off_is_forgotten(tmp_path, complete, begun):
    """Also the first one: the next line would otherwise be appended to it, and no later reader could parse the two."""
    path = tmp_path / "rows.jsonl"
    first, second = (SequenceRecord(key, "full", [1.0] * 20, None) for key in ("first", "second"))
    SequenceRecords(path).add([first, second])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:complete]) + lines[complete][:begun])
    records = SequenceRecords(path)
    assert (records.get("first") is not None) == bool(complete) and records.get("second") is None
    records.add([second])
    assert SequenceRecords(path).get("second") == second and len(path.read_bytes().splitlines()) == complete + 1


def test_a_file_of_something_else_is_left_as_it_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in ("my notes", '{"mine": 1', "my notes\n"):
        path.write_text(content)
        try:
            SequenceRecords(path)
        except SettingsError:
            assert content.endswith("\n")
        assert path.read_text() == content
