"""A prepared folder is what its rows.json says (issue 20, A1): foreign Arrow files, tokens and keys are refused."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from refreshkv.data.config import DataConfig
from refreshkv.data.rows import load_rows, prepare_rows
from refreshkv.settings import SettingsError


def prepare(place: Path, words: str, **settings) -> Path:
    place.mkdir()
    texts = [f"{words} {number} " * 12 for number in range(20)]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {"path": "json", "data_files": str(place / "texts.jsonl"), "streaming": True, "train_vocabulary": 270}
    prepare_rows(DataConfig(folder=str(place / "rows"), row_length=16, **{**given, **settings}), budget=4)
    return place / "rows"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("prepared")
    return prepare(place / "one", "a small cache"), prepare(place / "other", "another text")


@pytest.fixture
def rows(folders, tmp_path):
    return shutil.copytree(folders[0], tmp_path / "rows")


def foreign_split(rows, other):
    shutil.rmtree(rows / "train")
    shutil.copytree(other / "train", rows / "train")
    change_info(rows, lambda info: info["splits"].update(train={"rows": len(load_from_disk(other)["train"])}))


def foreign_file(rows, other):
    (mine,), (theirs,) = (sorted((folder / "validation").glob("*.arrow")) for folder in (rows, other))
    mine.write_bytes(theirs.read_bytes())
    change_info(rows, lambda info: info["splits"].update(validation={"rows": len(load_from_disk(other)["validation"])}))


def rewrite(rows, change):
    """Writes all splits anew. change: (a sequence as plain values, its number in its split) -> the new one."""
    splits = load_from_disk(rows)
    changed = {}
    for name, split in splits.items():
        found = [change(row, number) for number, row in enumerate(split.to_list())]
        columns = {column: [row[column] for row in found] for column in split.column_names}
        changed[name] = Dataset.from_dict(columns, split.features)
    for name in changed:
        shutil.rmtree(rows / name)
    DatasetDict(changed).save_to_disk(rows, num_shards=dict.fromkeys(changed, 1))


def change_first_token(rows, change):
    rewrite(rows, lambda row, n: {**row, "input_ids": [change(row["input_ids"][0], n), *row["input_ids"][1:]]})


def one_token(rows, other):
    change_first_token(rows, lambda token, number: token ^ (number == 3))


def beyond_the_vocabulary(rows, other):
    change_first_token(rows, lambda token, number: 5_000_000)


def negative_tokens(rows, other):
    change_first_token(rows, lambda token, number: -1)


def other_order(rows, other):
    sequences = {name: split.to_list() for name, split in load_from_disk(rows).items()}
    found = iter([row for split in sequences.values() for row in reversed(split)])
    rewrite(rows, lambda row, number: next(found))


def change_info(rows, change):
    info = json.loads((rows / "rows.json").read_text())
    change(info)
    (rows / "rows.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    "damage", [foreign_split, foreign_file, one_token, beyond_the_vocabulary, negative_tokens, other_order]
)
def test_other_sequences_than_the_fingerprints_are_refused(rows, folders, damage):
    assert load_rows(rows).info["fingerprint"]
    damage(rows, folders[1])
    with pytest.raises(SettingsError, match=r"^data\.folder=.* \(its files hold other sequences than the finger"):
        load_rows(rows)


@pytest.mark.parametrize("key", ["layout", "data", "splits", "vocabulary_size", "largest_token_id", "fingerprint"])
@pytest.mark.parametrize("value", [None, "x", [1], -1.5])
def test_a_key_that_is_missing_or_of_another_kind(rows, key, value):
    change_info(rows, lambda info: info.pop(key) if value is None else info.update({key: value}))
    with pytest.raises(SettingsError, match=r"^data\.folder=.* is damaged \(.*\); prepare it again") as error:
        load_rows(rows)
    assert key in str(error.value) or (key, value) == ("fingerprint", "x")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'{"layout": 2}', b"\xff\xfe"])
def test_a_file_of_something_else(rows, content):
    (rows / "rows.json").write_bytes(content)
    with pytest.raises(SettingsError, match=r"^data\.folder=.* is damaged"):
        load_rows(rows)


def test_token_ids_that_rows_json_does_not_tell_of(rows):
    change_info(rows, lambda info: info.update(largest_token_id=3))
    with pytest.raises(SettingsError, match="hold token ids that rows.json does not tell of"):
        load_rows(rows)


def test_rows_of_an_earlier_version_are_still_read(rows):
    """Their fingerprint is that of the tokens alone."""
    change_info(rows, lambda info: info.update(layout=1))
    assert len(load_rows(rows).train) > 0


def test_answers_of_tasks_are_part_of_the_fingerprint(folders, tmp_path):
    """A changed `answer_length` changes what is trained on."""
    tasks = {"chain_of_key": {"keys": 1, "max_new_tokens": 60, "syllables": 2}}
    folder = tmp_path / "tasks"
    config = DataConfig(
        folder=str(folder),
        path="tasks",
        tasks=tasks,
        task_examples=12,
        tokenizer=str(folders[0] / "tokenizer"),
        row_length=400,
    )
    prepare_rows(config, budget=4)
    load_rows(folder)
    rewrite(folder, lambda row, number: {**row, "answer_length": row["answer_length"] - 1})
    with pytest.raises(SettingsError, match="hold other sequences than the fingerprint"):
        load_rows(folder)
