"""A folder out of several prepared folders: equally many sequences of each, in turn, and what is refused."""

from dataclasses import replace

import pytest

from refreshkv.data.config import DataConfig
from refreshkv.data.folder import SPLITS
from refreshkv.data.rows import load_rows, prepare_rows
from refreshkv.settings import SettingsError
from tests.data.test_rows import make_texts, own_cache, write_jsonl  # noqa: F401  # a fixture

LENGTH = 16


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two prepared folders of one tokenizer, the second with less than half of the first's sequences."""
    folder = tmp_path_factory.mktemp("parts")
    common = {"path": "json", "streaming": True, "row_length": LENGTH}
    first = DataConfig(
        folder=str(folder / "first"),
        data_files=write_jsonl(folder / "first.jsonl", make_texts(150, seed=0)),
        train_vocabulary=300,
        **common,
    )
    prepare_rows(first, budget=4)
    second = DataConfig(
        folder=str(folder / "second"),
        data_files=write_jsonl(folder / "second.jsonl", make_texts(60, seed=1)),
        tokenizer=str(folder / "first/tokenizer"),
        **common,
    )
    prepare_rows(second, budget=4)
    return first, second


@pytest.fixture
def mixture(parts, tmp_path):
    return DataConfig(
        folder=str(tmp_path / "mixed"), path="mixture", folders=[part.folder for part in parts], row_length=LENGTH
    )


def test_sequences_come_in_turn_equally_many_of_each(parts, mixture):
    report = prepare_rows(mixture, budget=4)
    mixed, (first, second) = load_rows(mixture.folder), [load_rows(part.folder) for part in parts]
    for split in SPLITS:
        own, few, many = (getattr(rows, split)["input_ids"][:].tolist() for rows in (mixed, second, first))
        assert len(few) < len(many) and len(own) == 2 * len(few) == mixed.info["splits"][split]["rows"]
        assert own[1::2] == few
        assert own[::2] == [many[i * len(many) // len(few)] for i in range(len(few))]
    documents = set(mixed.train["document"])
    assert mixed.info["splits"]["train"]["documents"] == len(documents) < len(mixed.train)
    assert "fingerprint" in str(report)


def test_a_limit_counts_the_sequences_of_all_folders(parts, mixture):
    prepare_rows(replace(mixture, max_train_rows=7), budget=4)
    rows, second = load_rows(mixture.folder), load_rows(parts[1].folder)
    assert len(rows.train) == 6 and len(rows.validation) == 2 * len(second.validation) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folders": None}, "name two or more different folders"),
        ({"folders": ["a", "a"]}, "name two or more different folders"),
        ({"tokenizer": "t"}, "data.tokenizer means nothing for data.path=mixture"),
        ({"max_train_rows": 1}, "data.max_train_rows=1 is less than the 2 folders"),
        ({"path": "python-stdlib"}, "data.folders means nothing for data.path=python-stdlib"),
    ],
)
def test_settings_that_cannot_work(mixture, change, message):
    with pytest.raises(SettingsError, match=message):
        replace(mixture, **change)


def test_folders_that_do_not_fit_together(parts, mixture, tmp_path):
    with pytest.raises(SettingsError, match="has sequences of 16 tokens, data.row_length=8"):
        prepare_rows(replace(mixture, row_length=8), budget=4)
    other = replace(parts[1], folder=str(tmp_path / "other"), tokenizer=None, train_vocabulary=290)
    prepare_rows(other, budget=4)
    with pytest.raises(SettingsError, match="other was made with another tokenizer than .*first"):
        prepare_rows(replace(mixture, folders=[parts[0].folder, other.folder]), budget=4)
    with pytest.raises(SettingsError, match="holds no prepared rows"):
        prepare_rows(replace(mixture, folders=[parts[0].folder, str(tmp_path / "nowhere")]), budget=4)
