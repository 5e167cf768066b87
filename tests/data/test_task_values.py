"""Values of task files (issue 20, A7): one line that names file, record and column, whatever stands there."""

import copy
import json
from itertools import count
from pathlib import Path

import datasets
import pytest

from refreshkv.data.config import DataConfig
from refreshkv.data.sources import read_documents
from refreshkv.data.tasks.registry import build_task
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.settings import SettingsError

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {"context": f"Text {a}{p}.", "qas": [{"question": f"Q{a}{p}?", "answers": [{"text": f"A{a}{p}"}]}]}
                for p in range(2)
            ]
        }
        for a in range(2)
    ]
}
HOTPOT = [{"question": f"Q{i}?", "answer": f"A{i}", "context": [[f"T{i}", ["One. ", "Two."]]]} for i in range(3)]
SUMMARIES = [{"context": f"Some words {i}.", "input": f"Why {i}?", "answers": [f"Word {i}."]} for i in range(3)]
FORMS = {"squad": ("qa_1", SQUAD), "hotpot": ("qa_2", HOTPOT), "summaries": ("qmsum", SUMMARIES)}

WRONG = [None, "", "  ", 5, True, [], {}]
"""What must not stand where a text belongs."""

TEXTS = {
    "squad": [
        ("data", 1, "paragraphs", 0, "context"),
        ("data", 1, "paragraphs", 1, "qas", 0, "question"),
        ("data", 0, "paragraphs", 1, "qas", 0, "answers", 0, "text"),
        ("data", 0, "paragraphs", 1, "qas", 0, "answers"),
        ("data", 0, "paragraphs"),
        ("data",),
    ],
    "hotpot": [(1, "question"), (1, "answer"), (2, "context"), (2, "context", 0), (0, "context", 0, 1)],
    "summaries": [(1, "context"), (1, "input"), (1, "answers"), (1, "answers", 0)],
}
CASES = [(form, place) for form, places in TEXTS.items() for place in places]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([json.dumps(SUMMARIES)], 300)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Names of files that no test has written before."""
    folder = tmp_path_factory.mktemp("files")
    return (folder / f"{number}.json" for number in count())


def changed(content, place, value):
    content = copy.deepcopy(content)
    *path, last = place
    target = content
    for key in path:
        target = target[key]
    target[last] = value
    return content


def draw_all(form, content, file, tokenizer):
    file.write_text(json.dumps(content))
    made = build_task(FORMS[form][0], {"length": 900, "max_new_tokens": 40, "data_files": str(file)})
    return list(made.examples(tokenizer, 3))


@pytest.mark.parametrize("form", FORMS)
def test_good_files_are_read(form, names, tokenizer):
    examples = draw_all(form, FORMS[form][1], next(names), tokenizer)
    assert all(made.answer.strip() and all(made.references) for made in examples)


@pytest.mark.parametrize(("form", "place"), CASES, ids=[f"{form}-{'-'.join(map(str, p))}" for form, p in CASES])
def test_other_values_are_refused_with_their_place(form, place, names, tokenizer):
    name = FORMS[form][0]
    column = next(key for key in reversed(place) if isinstance(key, str))
    for value in WRONG:
        file = next(names)
        if form == "summaries" and column == "answers" and isinstance(value, dict | bool | int):
            value = [value]  # a table's column has one type
        with pytest.raises(SettingsError) as error:
            draw_all(form, changed(FORMS[form][1], place, value), file, tokenizer)
        line = str(error.value)
        assert line.startswith(f"tasks.{name}.data_files") and str(file) in line and column in line, line
        assert "\n" not in line and (f"[{place[-1]}]" in line or form == "summaries" or isinstance(place[-1], str))
        if form == "summaries" and "cannot be read" not in line:
            assert "row 1" in line, line


@pytest.mark.parametrize("key", ["question", "answers", "qas"])
def test_missing_columns_are_named(key, names, tokenizer):
    content = copy.deepcopy(SQUAD)
    paragraph = content["data"][1]["paragraphs"][0]
    del (paragraph if key == "qas" else paragraph["qas"][0])[key]
    file = next(names)
    with pytest.raises(SettingsError, match=rf"{file}.*data\[1\]\.paragraphs\[0\].* lacks {key}"):
        draw_all("squad", content, file, tokenizer)


def test_questions_without_an_answer_are_left_out(names, tokenizer):
    content = copy.deepcopy(SQUAD)
    content["data"][0]["paragraphs"][0]["qas"].append({"question": "Never?", "answers": [], "is_impossible": True})
    content["data"][0]["paragraphs"][1]["qas"] = []
    draw_all("squad", content, next(names), tokenizer)


def test_essays_are_text(tmp_path, tokenizer):
    file = tmp_path / "essays.json"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("One. Two.", None, "Three.")))
    made = build_task("niah_single_2", {"length": 700, "data_files": str(file)})
    with pytest.raises(
        SettingsError, match=rf"^tasks.niah_single_2.data_files={file}: row 1, column text must be text"
    ):
        list(made.examples(tokenizer, 1))


def test_a_file_that_changes_is_read_anew(tmp_path, tokenizer):
    file = tmp_path / "hotpot.json"
    (first, *_) = draw_all("hotpot", HOTPOT, file, tokenizer)
    other = json.loads(json.dumps(HOTPOT).replace('"A', '"Other '))
    assert draw_all("hotpot", other, file, tokenizer)[0].references != first.references


@pytest.mark.parametrize("group", [None, "", True, 1.5, ["x"]])
def test_groups_have_names(group):
    documents = datasets.Dataset.from_list([{"text": "a", "group": group}])
    config = DataConfig(path="json", data_files="x.json", group_column="group")
    with pytest.raises(SettingsError, match=r"data\.group_column=group must hold the name of a group .* in record 0"):
        list(read_documents(documents, config))


def test_where_task_files_are_read():
    """All values of task files go through `Value`: a new reader of files must too."""
    folder = Path(__file__).resolve().parents[2] / "data" / "tasks"
    sources = {file.name: file.read_text() for file in folder.glob("*.py")}
    readers = {name for name, text in sources.items() if "load_columns(" in text or "fsspec" in text}
    assert readers == {"essays.py", "questions.py", "summaries.py"}
    assert all("Value(" in sources[name] for name in readers)
