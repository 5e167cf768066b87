"""Writes the prepared rows of a folder: tokenizes documents or draws task examples, and cuts them into splits.

A row is a sequence of exactly `row_length` tokens.
"""

import dataclasses
import hashlib
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, IterableDataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from refreshkv.data.config import GENERATED_TASKS, DataConfig
from refreshkv.data.content import fingerprint
from refreshkv.data.fim import FillInTheMiddle
from refreshkv.data.folder import SPLITS, TOKENIZER_FOLDER
from refreshkv.data.sources import Document, load_documents, read_documents
from refreshkv.data.tasks.rows import prompt_length, task_sequences, training_tasks
from refreshkv.data.tasks.task import Task
from refreshkv.data.tokenizer import SpecialTokens, model_tokenizer, origin_of, train_tokenizer
from refreshkv.data.writer import SplitWriter
from refreshkv.settings import SettingsError

LAYOUT = 2
"""Version of the folder's layout, stored in rows.json for later readers. Since 2 the fingerprint has all columns."""

BATCH_CHARACTERS = 16_000_000
"""Characters tokenized at once: enough to keep every core busy, with tokens that fit into any memory."""


def write_splits(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Writes the tokenizer and the three splits into an empty folder; returns the content of its rows.json.

    Raises `SettingsError` for a source or a tokenizer that cannot be used, and if no document reaches the train split.
    """
    return _prepare_tasks(config, folder) if config.path == GENERATED_TASKS else _prepare_documents(config, folder)


def assign_document(text: str) -> tuple[str, str]:
    """A document's short hash and its split (80 % train, 10 % validation, 10 % test), both from its text alone."""
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
    share = int(digest[:8], 16) / 2**32
    return digest[:16], "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def assign_split(document: Document, config: DataConfig) -> str:
    """The split of a document: from its text's hash, or from its group with `config.group_column` (`DataConfig`)."""
    if document.group is None:
        return assign_document(document.text)[1]
    if config.held_out is None:
        return assign_document(document.group)[1]
    splits = {"validation": config.held_out.validation, "test": config.held_out.test}
    return next((split for split, groups in splits.items() if document.group in groups), "train")


def _prepare_documents(config: DataConfig, folder: Path) -> dict[str, Any]:
    documents = load_documents(config)
    tokenizer = _tokenizer(config, documents)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    return write_sequences(config, tokenizer, folder, partial(_add_documents, config, documents, tokenizer))


def _prepare_tasks(config: DataConfig, folder: Path) -> dict[str, Any]:
    assert config.tasks is not None and config.tokenizer is not None  # `DataConfig` and `prepare_rows` check it
    tasks = training_tasks(config.tasks, config.row_length)
    tokenizer = model_tokenizer(config.tokenizer, origin_of(config))
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    columns = ("prompt_length", "answer_length")
    info = write_sequences(config, tokenizer, folder, partial(_add_examples, config, tasks, tokenizer), columns)
    return info | {
        "prompt_length": prompt_length(tasks, config.row_length),
        "tasks": {task.label: task.settings() for task in tasks},
    }


def _tokenizer(config: DataConfig, documents: Dataset | IterableDataset) -> PreTrainedTokenizerBase:
    if config.tokenizer is not None:
        return model_tokenizer(config.tokenizer, origin_of(config))
    assert config.train_vocabulary is not None  # `prepare_rows` checks that it is given instead
    read = _with_progress(read_documents(documents, config), documents, "training the tokenizer")
    texts = (document.text for document in read if assign_split(document, config) == "train")
    return train_tokenizer(texts, config.train_vocabulary)


def write_sequences(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    add: Callable[[dict[str, SplitWriter]], None],
    columns: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Calls `add` with a writer for each split and stores what it added; returns the content of rows.json."""
    streams = folder / "streams"
    streams.mkdir()
    writers = {split: SplitWriter(streams / f"{split}.arrow", config.row_length, columns) for split in SPLITS}
    add(writers)
    splits = DatasetDict({split: writer.close() for split, writer in writers.items()})
    _validate_train_has_rows(config, writers)
    # without num_shards=1 `datasets` writes no file for an empty split, and then cannot load it
    shards = {split: None if len(splits[split]) else 1 for split in SPLITS}
    splits.save_to_disk(folder, num_shards=shards)  # pyright: ignore[reportArgumentType]  # None is its own default
    shutil.rmtree(streams)
    return _describe(config, tokenizer, writers)


def _add_documents(
    config: DataConfig,
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    writers: dict[str, SplitWriter],
) -> None:
    groups, special = set(), SpecialTokens(tokenizer, "data.tokenizer", config.fim.names if config.fim else ())
    for document, token_ids in _tokenized(config, documents, special):
        groups.add(document.group)
        names = special.count_names(document.text)
        writers[assign_split(document, config)].add(token_ids, assign_document(document.text)[0], names)
        if config.max_train_rows is not None and writers["train"].counts.rows >= config.max_train_rows:
            break
    _validate_held_out(config, groups)


def _add_examples(
    config: DataConfig, tasks: list[Task], tokenizer: PreTrainedTokenizerBase, writers: dict[str, SplitWriter]
) -> None:
    answers_begin = prompt_length(tasks, config.row_length)
    sequences = task_sequences(tasks, tokenizer, config.row_length, config.task_examples)
    for sequence in tqdm(sequences, "writing examples", config.task_examples, unit=" rows"):
        document, split = assign_document(sequence.text)
        lengths = {"prompt_length": answers_begin, "answer_length": sequence.answer_length}
        writers[split].add_sequence(sequence.token_ids, document, **lengths)


def _tokenized(
    config: DataConfig, documents: Dataset | IterableDataset, special: SpecialTokens
) -> Iterator[tuple[Document, list[int]]]:
    """Each document, and its tokens with the end-of-text token; or its fill-in-the-middle sequences."""
    fim = None if config.fim is None else FillInTheMiddle(special.tokenizer, config.fim)
    end = cast(int, special.tokenizer.eos_token_id)
    for batch in _batches(_with_progress(read_documents(documents, config), documents, "tokenizing")):
        encoded = special.encode_texts([document.text for document in batch])
        for document, token_ids in zip(batch, encoded, strict=True):
            digest = assign_document(document.text)[0]
            if fim is not None and fim.is_chosen(digest):
                yield document, fim.sequences(document.text, digest, config.row_length)
            else:
                yield document, [*token_ids, end]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of consecutive documents of about `BATCH_CHARACTERS` characters."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_progress(
    read: Iterator[Document], documents: Dataset | IterableDataset, description: str
) -> Iterable[Document]:
    total = len(documents) if isinstance(documents, Dataset) else None
    return tqdm(read, description, total, unit=" documents")


def _validate_held_out(config: DataConfig, groups: set[str | None]) -> None:
    """Raises `SettingsError` if a group of `config.held_out` was not among those read: its name may be misspelt."""
    if config.held_out is None:
        return
    missing = sorted({*config.held_out.validation, *config.held_out.test} - groups)
    if missing:
        raise SettingsError(
            f"data.held_out names {missing[0]}, but no document that was read has it in data.group_column="
            f"{config.group_column}"
        )


def _validate_train_has_rows(config: DataConfig, writers: dict[str, SplitWriter]) -> None:
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
        "fingerprint": fingerprint(config.row_length, [writer.digest for writer in writers.values()]),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
        },
    }
