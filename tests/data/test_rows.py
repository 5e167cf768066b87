"""Preparation of rows: their content, the counts, and refused settings."""

import json
import multiprocessing
import os
import random
import signal
import sys
import sysconfig
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
from transformers import AutoTokenizer

from refreshkv import cli
from refreshkv.data import preparation
from refreshkv.data.config import DataConfig
from refreshkv.data.folder import rows_folder
from refreshkv.data.preparation import assign_document
from refreshkv.data.report import share_beyond
from refreshkv.data.rows import load_rows, prepare_rows, validate_token_ids
from refreshkv.data.sources import (
    is_worth_reading,
    load_documents,
    numpy_test_documents,
    package_documents,
    stdlib_documents,
)
from refreshkv.settings import SettingsError

ROW_LENGTH = 16
WORDS = "the small cache holds what a query asked for last and forgets naïve Zürich 漢字 tokens again".split()


def make_texts(count: int, seed: int) -> list[str]:
    """Texts of 0 to 120 words, so that some are shorter than a row and most end inside one."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randrange(120))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str | None]) -> str:
    path.write_text("".join(json.dumps({"number": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Copies of sources go to a folder of the test, and the Hub is not reached."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts(60, seed=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, texts) -> DataConfig:
    """Rows of `texts` with a tokenizer trained on them, which `config` uses as `data.tokenizer`."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "source.jsonl", texts)
    config = DataConfig(
        folder=str(folder / "rows"),
        path="json",
        data_files=source,
        streaming=True,
        train_vocabulary=300,
        row_length=ROW_LENGTH,
    )
    prepare_rows(config, budget=4)
    return config


@pytest.fixture
def config(prepared, tmp_path) -> DataConfig:
    """The same source, to be prepared into a new folder with the tokenizer already there."""
    tokenizer = str(load_rows(prepared.folder).tokenizer_folder)
    return replace(prepared, folder=str(tmp_path / "rows"), tokenizer=tokenizer, train_vocabulary=None)


def splits_by_document(folder: str) -> dict[str, str]:
    rows = load_rows(folder)
    return {hash_: split for split in ("train", "validation", "test") for hash_ in getattr(rows, split)["document"]}


def test_rows_are_consecutive_parts_of_single_documents(prepared, texts):
    rows = load_rows(prepared.folder)
    tokenizer = AutoTokenizer.from_pretrained(rows.tokenizer_folder)
    parts = defaultdict(list)
    for split in (rows.train, rows.validation, rows.test):
        for row in split:
            assert row["input_ids"].shape == (ROW_LENGTH,) and row["input_ids"].dtype == torch.int64
            parts[row["document"]] += row["input_ids"].tolist()
    for text in texts:
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        kept = len(token_ids) // ROW_LENGTH * ROW_LENGTH
        assert parts.pop(assign_document(text)[0], []) == token_ids[:kept]
    assert not parts


def test_everything_dropped_is_counted(prepared, texts):
    rows = load_rows(prepared.folder)
    tokenizer = AutoTokenizer.from_pretrained(rows.tokenizer_folder)
    expected = {split: dict.fromkeys(counts, 0) for split, counts in rows.info["splits"].items()}
    for text in texts:
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        counts = expected[assign_document(text)[1]]
        counts["documents"] += 1
        counts["dropped_documents"] += length < ROW_LENGTH
        counts["rows"] += length // ROW_LENGTH
        counts["tokens"] += length - length % ROW_LENGTH
        counts["leftover_tokens"] += length % ROW_LENGTH
    assert rows.info["splits"] == expected
    assert rows.info["dropped_documents"] > 0
    assert rows.info["documents"] == len(texts)


def test_a_document_stays_in_its_split_when_others_join(prepared, config, texts, tmp_path):
    more = make_texts(30, seed=1) + texts + make_texts(30, seed=2)
    prepare_rows(replace(config, data_files=write_jsonl(tmp_path / "more.jsonl", more)), budget=4)
    before, after = splits_by_document(prepared.folder), splits_by_document(config.folder)
    assert len(after) > len(before)
    assert {document: after[document] for document in before} == before


def test_splits_are_the_same_everywhere_and_have_their_shares():
    # these values follow from sha256 alone: a test document stays a test document on every machine
    assert assign_document("document 0") == ("19e6bd2cd5bf6096", "train")
    assert assign_document("document 4") == ("ebbb26765e8c2254", "test")
    assert assign_document("document 10") == ("e52216b48eed296d", "validation")
    splits = [assign_document(f"document {i}")[1] for i in range(5000)]
    assert [splits.count(split) / 5000 for split in ("train", "validation", "test")] == pytest.approx(
        [0.8, 0.1, 0.1], abs=0.02
    )


def test_fingerprint_is_the_same_again_and_with_a_tokenizer_trained_again(prepared, config):
    report = prepare_rows(config, budget=4)
    trained_again = prepare_rows(replace(prepared, folder=config.folder), budget=4, overwrite=True)
    fingerprint = load_rows(prepared.folder).info["fingerprint"]
    assert report.info["fingerprint"] == trained_again.info["fingerprint"] == fingerprint
    shorter = prepare_rows(replace(config, row_length=8), budget=4, overwrite=True)
    assert shorter.info["fingerprint"] != fingerprint


def test_rows_are_memory_mapped_and_the_source_is_not_needed(prepared):
    rows = load_rows(prepared.folder)
    files = [Path(file["filename"]) for file in rows.train.cache_files]
    assert files and all(file.is_relative_to(prepared.folder) for file in files)
    assert rows.train[[0, 1]]["input_ids"].shape == (2, ROW_LENGTH)
    assert sorted(path.name for path in Path(prepared.folder).iterdir()) == [
        ".written.json",
        "dataset_dict.json",
        "rows.json",
        "test",
        "tokenizer",
        "train",
        "validation",
    ]


def test_streaming_and_not_streaming_give_the_same_rows(config):
    streamed = prepare_rows(replace(config, streaming=True), budget=4)
    copied = prepare_rows(replace(config, streaming=False), budget=4, overwrite=True)
    assert streamed.info["splits"] == copied.info["splits"]
    assert streamed.info["fingerprint"] == copied.info["fingerprint"]


@pytest.mark.parametrize("streaming", [False, True])
def test_max_documents_takes_the_first(config, texts, tmp_path, streaming):
    config = replace(config, streaming=streaming, max_documents=20)
    assert [document["text"] for document in load_documents(config)] == texts[:20]
    assert len(list(load_documents(replace(config, max_documents=1000)))) == len(texts)


def test_reading_stops_when_train_has_its_rows(config, texts):
    everything = prepare_rows(config, budget=4).info["splits"]["train"]["rows"]
    report = prepare_rows(replace(config, max_train_rows=20), budget=4, overwrite=True)
    most = max(len(text) for text in texts) // ROW_LENGTH
    assert 20 <= report.info["splits"]["train"]["rows"] < 20 + most < everything


@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_lines(config, texts, tmp_path, streaming):
    """The form of the arXiv corpus."""
    zstandard = pytest.importorskip("zstandard")
    source = tmp_path / "arXiv_000.jsonl.zst"
    lines = "".join(json.dumps({"text": text, "meta": {"number": i}}) + "\n" for i, text in enumerate(texts))
    source.write_bytes(zstandard.compress(lines.encode()))
    config = replace(config, data_files=str(tmp_path / "*.jsonl.zst"), streaming=streaming)
    assert [document["text"] for document in load_documents(config)] == texts


def test_a_missing_text_is_an_empty_document(config, texts, tmp_path):
    report = prepare_rows(replace(config, data_files=write_jsonl(tmp_path / "null.jsonl", [None, *texts])), budget=4)
    assert report.info["documents"] == len(texts) + 1


def test_splits_without_rows_load_and_are_reported(config, texts, tmp_path):
    train_only = [text for text in texts if assign_document(text)[1] == "train"]
    report = prepare_rows(replace(config, data_files=write_jsonl(tmp_path / "train.jsonl", train_only)), budget=4)
    rows = load_rows(config.folder)
    assert len(rows.train) > 0 and len(rows.validation) == len(rows.test) == 0
    assert "warning: validation has no rows" in str(report)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "content"}, r"data\.text_column=content.*number, text"),
        ({"text_column": "number"}, r"data\.text_column=number holds int"),
        ({"data_files": "nowhere.jsonl"}, r"data\.data_files=nowhere\.jsonl"),
        ({"data_files": "nowhere*.jsonl"}, r"data\.data_files=nowhere\*\.jsonl"),
        ({"split": "trian"}, r"data\.split=trian"),
        ({"path": "jsonlines"}, r"data\.path=jsonlines is neither"),
        ({"path": "parquet"}, r"data\.data_files=.*cannot be read"),
        ({"path": __file__}, r"data\.path=.* is a file"),
        ({"row_length": 100_000}, r"lower data\.row_length"),
    ],
)
def test_unusable_sources_name_the_setting(config, streaming, changes, message):
    with pytest.raises(SettingsError, match=message):
        prepare_rows(replace(config, streaming=streaming, **changes), budget=4)
    assert not list(Path(config.folder).parent.glob("rows*"))


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_source(config, tmp_path, streaming):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(SettingsError, match=r"data\.data_files=.*empty\.jsonl"):
        prepare_rows(replace(config, data_files=str(empty), streaming=streaming), budget=4)


def test_no_document_in_train(config, texts, tmp_path):
    test_only = [text for text in texts if assign_document(text)[1] == "test"]
    with pytest.raises(SettingsError, match="fell into the train"):
        prepare_rows(replace(config, data_files=write_jsonl(tmp_path / "test.jsonl", test_only)), budget=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "exactly one of data.tokenizer"),
        ({"train_vocabulary": 300}, "exactly one of data.tokenizer"),
        ({"tokenizer": "no/such/tokenizer"}, "data.tokenizer: no tokenizer"),
    ],
)
def test_unusable_tokenizers(config, changes, message):
    with pytest.raises(SettingsError, match=message):
        prepare_rows(replace(config, **changes), budget=4)


@pytest.mark.parametrize(
    "values",
    [
        {"row_length": 1},
        {"max_documents": 0},
        {"max_train_rows": 0},
        {"path": "python-packages", "name": "x"},
        {"path": "numpy-tests", "split": "test"},
        {"train_vocabulary": 256},
        {"folder": ""},
        {"path": "json", "data_files": None},
        {"path": "python-stdlib", "data_files": "mine.jsonl"},
        {"path": "python-stdlib", "split": "test"},
    ],
)
def test_settings_that_cannot_work(values):
    with pytest.raises(SettingsError, match=r"^data\.\w+"):
        DataConfig(**values)


def test_a_folder_in_use_is_kept_unless_overwritten(config):
    prepare_rows(config, budget=4)
    before = load_rows(config.folder)
    with pytest.raises(SettingsError, match="--overwrite"):
        prepare_rows(replace(config, row_length=8), budget=4)
    with pytest.raises(SettingsError, match="no such column"):
        prepare_rows(replace(config, text_column="content"), budget=4, overwrite=True)
    assert load_rows(config.folder).info == before.info
    prepare_rows(replace(config, row_length=8), budget=4, overwrite=True)
    assert load_rows(config.folder).train[0]["input_ids"].shape == (8,)
    assert before.train[0]["input_ids"].shape == (ROW_LENGTH,)  # a run that has them open keeps its rows


def test_a_folder_of_something_else_is_never_replaced(config):
    precious = Path(config.folder, "thesis.tex")
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(SettingsError, match="no prepared rows"):
        prepare_rows(config, budget=4, overwrite=True)
    beside = replace(config, folder=str(precious.parent / "rows"))
    Path(f"{beside.folder}.partial").mkdir()
    Path(f"{beside.folder}.partial", "thesis.tex").touch()
    with pytest.raises(SettingsError, match="holds other files"):
        prepare_rows(beside, budget=4)
    assert precious.exists() and Path(f"{beside.folder}.partial", "thesis.tex").exists()


def killed_preparation(config):
    preparation._validate_train_has_rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    prepare_rows(config, 4)


def test_a_killed_preparation_is_not_prepared_and_does_not_block(config):
    process = multiprocessing.get_context("fork").Process(target=killed_preparation, args=(config,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert Path(f"{config.folder}.partial", "streams", "train.arrow").stat().st_size > 0
    with pytest.raises(SettingsError, match=r"data\.folder=.*launch/prepare\.py"):
        load_rows(config.folder)
    prepare_rows(config, budget=4)
    assert len(load_rows(config.folder).train) > 0
    assert not Path(f"{config.folder}.partial").exists()


def test_two_preparations_of_one_folder_do_not_mix(config):
    with rows_folder(Path(config.folder), overwrite=False):
        with pytest.raises(SettingsError, match="another preparation"):
            prepare_rows(config, budget=4)


def test_damaged_rows_are_refused(config):
    prepare_rows(config, budget=4)
    shard = next(Path(config.folder, "train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(SettingsError, match=r"data\.folder=.*damaged"):
        load_rows(config.folder)


def test_validate_token_ids(prepared):
    info = load_rows(prepared.folder).info
    validate_token_ids(info, info["vocabulary_size"])
    validate_token_ids(info, info["largest_token_id"] + 1)
    with pytest.raises(SettingsError, match=r"tokenizer of \d+ tokens but the model has 100; .*data\.tokenizer=MODEL"):
        validate_token_ids(info, 100)


def test_stdlib_documents():
    documents = list(stdlib_documents())
    assert documents == list(stdlib_documents())
    paths = [document["path"] for document in documents]
    assert len(set(paths)) == len(paths)
    headings = {line[2:] for document in documents for line in document["text"].splitlines() if line.endswith(".py")}
    assert {"asyncio/events.py", "json/decoder.py", "this.py", "typing.py"} <= headings
    root = Path(sysconfig.get_path("stdlib"))
    skipped = [root / "test" / "__init__.py", *root.glob("*/tests/__init__.py"), *root.glob("site-packages/*.py")]
    assert not headings & {file.relative_to(root).as_posix() for file in skipped}
    assert not any("site-packages/" in path or "dist-packages/" in path or "/test" in path for path in paths)
    for document in documents:
        lines = set(document["text"].splitlines())
        files = [file for file in (root / document["path"]).glob("*.py") if "_sysconfig" not in file.name]
        assert all(f"# {file.relative_to(root).as_posix()}" in lines for file in files), document["path"]


def test_package_documents(tmp_path, monkeypatch):
    """Two directories of packages; the second has one that the first has too."""
    body = "".join(f"def function_{i}():\n    return {i}\n" for i in range(20))
    first, second = tmp_path / "a" / "site-packages", tmp_path / "b" / "site-packages"
    files = {
        first / "alone.py": body,
        first / "package" / "__init__.py": "",
        first / "package" / "core.py": body + "# core",
        first / "package" / "deep" / "table.py": "x = '" + "0" * 3000 + "'\n" + body,
        first / "package" / "tests" / "test_core.py": body,
        first / "package" / "wire_pb2.py": body,
        first / "package" / "made.py": "# This file was automatically generated by a program\n" + body,
        first / "refreshkv" / "cache.py": body,
        second / "single.py": body + "# single",
        second / "package" / "core.py": body + "# other core",
        second / "other" / "main.py": body + "# main",
    }
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(sys, "path", [str(second), str(first), str(tmp_path)])
    documents = list(package_documents())
    library = list(stdlib_documents())
    assert documents[: len(library)] == library
    assert [document["text"] for document in documents[len(library) :]] == [
        f"# alone.py\n{body}\n",
        f"# package/core.py\n{body}# core\n",
        f"# single.py\n{body}# single\n",
        f"# other/main.py\n{body}# main\n",
    ]
    assert documents == list(package_documents())


def test_numpy_test_documents(tmp_path, monkeypatch):
    for name in ("__init__.py", "core.py", "lib/tests/test_b.py", "lib/tests/data/make.py", "a/tests/test_a.py"):
        file = tmp_path / "numpy" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# in {name}")
    monkeypatch.setattr("numpy.__file__", str(tmp_path / "numpy" / "__init__.py"))
    names = ["a/tests/test_a.py", "lib/tests/data/make.py", "lib/tests/test_b.py"]
    assert list(numpy_test_documents()) == [
        {"text": f"# numpy/{name}\n# in {name}\n", "path": f"numpy/{name}"} for name in names
    ]


def test_a_numpy_without_tests_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("numpy.__file__", str(tmp_path / "numpy" / "__init__.py"))
    with pytest.raises(SettingsError, match="data.path=numpy-tests holds no documents"):
        load_documents(DataConfig(path="numpy-tests"))


def test_files_worth_reading():
    lines = "value = compute(value)\n" * 20
    assert is_worth_reading(lines)
    assert not is_worth_reading("import this\n")
    assert not is_worth_reading(lines * 2000)
    assert not is_worth_reading("# DO NOT EDIT\n" + lines)
    assert is_worth_reading(lines * 2 + "# do not edit\n")
    assert not is_worth_reading(lines + "x" * 2001)


def test_packages_are_a_corpus(config, monkeypatch):
    texts = make_texts(40, seed=3)
    monkeypatch.setattr("refreshkv.data.sources.package_documents", lambda: iter([{"text": text} for text in texts]))
    config = replace(config, path="python-packages", data_files=None, streaming=False)
    assert prepare_rows(config, budget=4).info["documents"] == 40


@pytest.mark.parametrize(
    ("budget", "row_length", "share"),
    [(4, 16, 12 / 16), (0.125, 1024, 0.875), (0.3, 10, 0.7), (0.25, 10, 0.7), (16, 16, 0), (100, 16, 0), (1.0, 16, 0)],
)
def test_share_beyond(budget, row_length, share):
    assert share_beyond(budget, row_length) == pytest.approx(share)


def test_report_is_a_table_with_the_share_or_a_warning(config):
    text = str(prepare_rows(config, budget=4))
    header, *lines = text.splitlines()
    assert header.split() == ["split", "documents", "dropped", "rows", "tokens", "left", "over"]
    assert [line.split()[0] for line in lines[:4]] == ["train", "validation", "test", "total"]
    assert len({len(line) for line in [header, *lines[:4]]}) == 1
    assert "75.0%" in text and "never constrains" not in text
    warning = str(prepare_rows(config, budget=ROW_LENGTH, overwrite=True))
    assert "never constrains anything; lower refresh.budget" in warning


@pytest.mark.parametrize(("rank", "printed"), [(None, "error: data.folder: of two lines\n"), ("0", None), ("1", "")])
def test_scripts_end_with_one_line(monkeypatch, capsys, rank, printed):
    def main(argv: list[str]) -> None:
        raise SettingsError("data.folder: of\n  two lines")

    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == ("error: data.folder: of two lines\n" if printed is None else printed)
