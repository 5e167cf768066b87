"""Splits by group: all documents of a package, an author and so on fall into one split."""

import json

import pytest

from refreshkv.data.config import DataConfig, HeldOut
from refreshkv.data.preparation import assign_document
from refreshkv.data.rows import load_rows, prepare_rows
from refreshkv.data.sources import load_documents
from refreshkv.settings import SettingsError

GROUPS = ("first", "second", "third", "fourth")


@pytest.fixture
def config(tmp_path):
    """Twelve documents of four groups, and a tokenizer trained on them."""
    documents = [{"text": f"{group} has text {i} " * 20, "package": group} for i in range(3) for group in GROUPS]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    folder = str(tmp_path / "rows")
    options = {"path": "json", "data_files": str(file), "train_vocabulary": 300, "row_length": 16}
    return DataConfig(folder=folder, group_column="package", **options)


def documents_of_splits(config):
    rows = load_rows(config.folder)
    return {split: set(getattr(rows, split)["document"]) for split in ("train", "validation", "test")}


def hashes(*groups):
    return {assign_document(f"{group} has text {i} " * 20)[0] for i in range(3) for group in groups}


def test_named_groups_are_held_out(config):
    config = DataConfig(**vars(config) | {"held_out": HeldOut(validation=["second"], test=["third"])})
    prepare_rows(config, 8)
    expected = {"train": hashes("first", "fourth"), "validation": hashes("second"), "test": hashes("third")}
    assert documents_of_splits(config) == expected


def test_groups_fall_by_the_hash_of_their_name(config):
    expected = {"train": set(), "validation": set(), "test": set()}
    for group in GROUPS:
        expected[assign_document(group)[1]] |= hashes(group)
    prepare_rows(config, 8)
    assert documents_of_splits(config) == expected


def test_python_packages_are_groups():
    documents = load_documents(DataConfig(path="python-packages", group_column="package", max_documents=40))
    assert {"json", "asyncio"} & {document["package"] for document in documents}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": HeldOut(test=["fifth"])}, "data.held_out names fifth, but no document"),
        ({"group_column": "author"}, "data.group_column=author: the source has no such column; it has text, package"),
    ],
)
def test_groups_that_are_not_there(config, change, message):
    with pytest.raises(SettingsError, match=message):
        prepare_rows(DataConfig(**vars(config) | change), 8)


def test_settings_that_cannot_work_together(config):
    with pytest.raises(SettingsError, match="set data.group_column too"):
        DataConfig(**vars(config) | {"group_column": None, "held_out": HeldOut(test=["first"])})
    with pytest.raises(SettingsError, match="names first both"):
        HeldOut(validation=["first"], test=["first"])
