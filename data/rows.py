"""Rows of tokens: prepared once, then read from disk by training and evaluation."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_from_disk
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from refreshkv.config import RefreshConfig
from refreshkv.data.config import GENERATED_TASKS, DataConfig
from refreshkv.data.folder import INFO_FILE, rows_folder
from refreshkv.data.report import PreparationReport
from refreshkv.data.sources import document_texts, load_documents
from refreshkv.data.tasks.rows import prompt_length, task_rows, training_tasks
from refreshkv.data.tasks.task import Task
from refreshkv.data.tokenizer import model_tokenizer, train_tokenizer
from refreshkv.data.writer import SplitWriter
from refreshkv.files import write_json
from refreshkv.loading import find_tokenizer
from refreshkv.settings import SettingsError

SPLITS = ("train", "validation", "test")
TOKENIZER_FOLDER = "tokenizer"
LAYOUT = 1
"""Version of the folder's layout, for readers that come later."""

BATCH_CHARACTERS = 16_000_000
"""Text tokenized at once: enough to keep every core busy, little enough that its tokens fit anywhere."""


@dataclass(frozen=True)
class Rows:
    """Prepared rows, memory mapped. A row is {"input_ids": (row_length,) int64 tensor, "document": short hash}.

    Rows of tasks also have "prompt_length" and "answer_length", int64: the answer, its end of text included, stands in
    the columns from prompt_length on.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    tokenizer_folder: Path
    info: dict[str, Any]
    """The folder's rows.json, and the "folder" it was read from."""


def prepare_rows(config: DataConfig, budget: int | float, overwrite: bool = False) -> PreparationReport:
    """Turns the documents of `config` into rows of exactly `row_length` tokens in `config.folder`.

    Each document is tokenized without special tokens, then the end-of-text token is added, and the whole is cut into
    consecutive rows; no row mixes documents. A document shorter than a row is dropped, and so is the end that does not
    fill a row (with it, mostly, the end-of-text token); both are counted. A document's split depends on the hash of its
    text only. The folder appears when it is complete. `budget` is the run's `refresh.budget`, for the report.

    With `path=tasks` each row holds one example of a task instead, see `refreshkv.data.tasks.rows`.

    Raises `SettingsError` for a source, a tokenizer or a folder that cannot be used, and if training would get no row.
    """
    capacity = RefreshConfig(budget=budget).largest_budget(config.row_length)
    target = Path(config.folder).expanduser().resolve()
    if (config.tokenizer is None) == (config.train_vocabulary is None):
        raise SettingsError(
            "set exactly one of data.tokenizer (the model's folder or hub id) and data.train_vocabulary (such as 4096, "
            "to train a tokenizer), and the other to null"
        )
    prepare = _prepare_tasks if config.path == GENERATED_TASKS else _prepare_documents
    with rows_folder(target, overwrite) as folder:
        info = prepare(config, folder)
        write_json(folder / INFO_FILE, info)
    return PreparationReport(target, info, capacity, share_beyond(budget, config.row_length))


def load_rows(folder: str | Path) -> Rows:
    """The rows that `prepare_rows` wrote, as torch datasets. Raises `SettingsError` if they are missing or damaged."""
    folder = Path(folder).expanduser().resolve()
    if not (folder / INFO_FILE).is_file():
        raise SettingsError(f"data.folder={folder} holds no prepared rows; run launch/prepare.py first")
    try:
        info = json.loads((folder / INFO_FILE).read_text())
        splits = load_from_disk(str(folder), keep_in_memory=False).with_format("torch")
        if {split: len(splits[split]) for split in SPLITS} != {
            split: info["splits"][split]["rows"] for split in SPLITS
        }:
            raise ValueError(f"the number of rows is not the one in {INFO_FILE}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"data.folder={folder} is damaged ({error}); prepare it again with launch/prepare.py --overwrite"
        ) from error
    info["folder"] = str(folder)
    return Rows(*(splits[split] for split in SPLITS), tokenizer_folder=folder / TOKENIZER_FOLDER, info=info)


def check_same_tokens(model: str, rows: Rows) -> None:
    """Refuses rows whose ids mean other tokens to the model; either tokenizer may have tokens that the other lacks."""
    own, used = find_tokenizer(model), find_tokenizer(rows.tokenizer_folder)
    if own is None or used is None:
        return
    ids = own.get_vocab()
    if any(ids.get(token, number) != number for token, number in used.get_vocab().items()):
        raise SettingsError(
            f"the rows in {rows.info['folder']} were made with another tokenizer than that of {model}: prepare them "
            f"again with data.tokenizer={model}"
        )


def check_tokenizer(info: dict[str, Any], model_vocab_size: int) -> None:
    """Raises `SettingsError` if the rows of `info` (of `Rows`) hold token ids that the model has no embedding for.

    Some models' tokenizers name more tokens than the model has: the ids in the rows decide, not the vocabulary's size.
    """
    if info["largest_token_id"] >= model_vocab_size:
        raise SettingsError(
            f"the rows in {info['folder']} were made with a tokenizer of {info['vocabulary_size']} tokens but the "
            f"model has {model_vocab_size}; prepare them again with data.tokenizer=MODEL"
        )


def share_beyond(budget: int | float, row_length: int) -> float:
    """Share (0 to 1) of a row's positions whose context, `t + 1` tokens at position t, is longer than the budget K.

    A budget given as a fraction is taken of the whole row: the largest K that any prompt in the row can give.
    """
    capacity = RefreshConfig(budget=budget).largest_budget(row_length)
    return max(0, row_length - capacity) / row_length


def assign_document(text: str) -> tuple[str, str]:
    """A document's short hash and its split (80 % train, 10 % validation, 10 % test); both depend on the text only."""
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
    share = int(digest[:8], 16) / 2**32
    return digest[:16], "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def _prepare_documents(config: DataConfig, folder: Path) -> dict[str, Any]:
    documents = load_documents(config)
    tokenizer = _tokenizer(config, documents)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    return _write_rows(config, tokenizer, folder, partial(_add_documents, config, documents, tokenizer))


def _prepare_tasks(config: DataConfig, folder: Path) -> dict[str, Any]:
    tasks = training_tasks(config.tasks, config.row_length)
    tokenizer = model_tokenizer(config.tokenizer)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    columns = ("prompt_length", "answer_length")
    info = _write_rows(config, tokenizer, folder, partial(_add_examples, config, tasks, tokenizer), columns)
    return info | {
        "prompt_length": prompt_length(tasks, config.row_length),
        "tasks": {task.label: task.settings() for task in tasks},
    }


def _tokenizer(config: DataConfig, documents: Dataset | IterableDataset) -> PreTrainedTokenizerBase:
    if config.tokenizer is not None:
        return model_tokenizer(config.tokenizer)
    texts = _with_progress(document_texts(documents, config), documents, "training the tokenizer")
    return train_tokenizer((text for text in texts if assign_document(text)[1] == "train"), config.train_vocabulary)


def _write_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    add: Callable[[dict[str, SplitWriter]], None],
    columns: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Writes what `add` puts into the splits' writers; returns the folder's rows.json."""
    streams = folder / "streams"
    streams.mkdir()
    writers = {split: SplitWriter(streams / f"{split}.arrow", config.row_length, columns) for split in SPLITS}
    add(writers)
    rows = DatasetDict({split: writer.close() for split, writer in writers.items()})
    _check_train_has_rows(config, writers)
    # An empty split needs its one empty file named; by itself `datasets` would write none and then not load it.
    rows.save_to_disk(folder, num_shards={split: None if len(rows[split]) else 1 for split in SPLITS})
    shutil.rmtree(streams)
    return _describe(config, tokenizer, writers)


def _add_documents(
    config: DataConfig,
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    writers: dict[str, SplitWriter],
) -> None:
    for text, token_ids in _tokenized(config, documents, tokenizer):
        document, split = assign_document(text)
        writers[split].add(token_ids, document)
        if config.max_train_rows is not None and writers["train"].counts.rows >= config.max_train_rows:
            break


def _add_examples(
    config: DataConfig, tasks: list[Task], tokenizer: PreTrainedTokenizerBase, writers: dict[str, SplitWriter]
) -> None:
    answers_begin = prompt_length(tasks, config.row_length)
    rows = task_rows(tasks, tokenizer, config.row_length, config.task_examples)
    for row in tqdm(rows, "writing examples", config.task_examples, unit=" rows"):
        document, split = assign_document(row.text)
        writers[split].add_row(row.token_ids, document, prompt_length=answers_begin, answer_length=row.answer_length)


def _tokenized(
    config: DataConfig, documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int]]]:
    texts = _with_progress(document_texts(documents, config), documents, "tokenizing")
    for batch in _batches(texts):
        # `verbose` would warn that documents are longer than the model's context: they are cut into rows.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, token_ids in zip(batch, encoded, strict=True):
            yield text, [*token_ids, tokenizer.eos_token_id]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_progress(texts: Iterator[str], documents: Dataset | IterableDataset, description: str) -> Iterable[str]:
    total = len(documents) if isinstance(documents, Dataset) else None
    return tqdm(texts, description, total, unit=" documents")


def _check_train_has_rows(config: DataConfig, writers: dict[str, SplitWriter]) -> None:
    if writers["train"].counts.rows:
        return
    count = sum(writer.counts.documents for writer in writers.values())
    longest = max(writer.longest_document for writer in writers.values())
    if longest < config.row_length:
        raise SettingsError(
            f"no document fills a row: the longest of {count} has {longest} tokens, data.row_length is "
            f"{config.row_length}; lower data.row_length or use a source of longer documents"
        )
    raise SettingsError(
        f"none of the documents that fill a row of data.row_length={config.row_length} tokens fell into the train "
        f"split ({count} documents in all); use more documents (data.path, data.max_documents) or lower data.row_length"
    )


def _describe(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, writers: dict[str, SplitWriter]
) -> dict[str, Any]:
    splits = {split: dataclasses.asdict(writer.counts) for split, writer in writers.items()}
    digests = json.dumps([config.row_length, *(writer.digest for writer in writers.values())])
    libraries = ("datasets", "transformers", "tokenizers", "pyarrow")
    return {
        "layout": LAYOUT,
        "data": dataclasses.asdict(config),
        "documents": sum(counts["documents"] for counts in splits.values()),
        "dropped_documents": sum(counts["dropped_documents"] for counts in splits.values()),
        "splits": splits,
        "vocabulary_size": len(tokenizer),
        "largest_token_id": max(writer.largest_token_id for writer in writers.values()),
        "end_of_text": tokenizer.eos_token,
        "fingerprint": hashlib.sha256(digests.encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
        },
    }
