"""Mixes prepared folders into one, so that one run trains on several texts."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset

from refreshkv.data.config import DataConfig
from refreshkv.data.folder import SPLITS, TOKENIZER_FOLDER
from refreshkv.data.preparation import write_sequences
from refreshkv.data.tokenizer import model_tokenizer, origin_of
from refreshkv.data.writer import SplitWriter
from refreshkv.identity import tokenizer_identity
from refreshkv.settings import SettingsError

READ_AT_ONCE = 128
"""Sequences read from a folder at a time."""


class Part(Protocol):
    """One of the folders: what `refreshkv.data.rows.Rows` has."""

    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def tokenizer_folder(self) -> Path: ...


def write_mixture(config: DataConfig, folder: Path, parts: Sequence[Part]) -> dict[str, Any]:
    """Writes the sequences of `parts` in turn, equally many of each in every split; returns the content of rows.json.

    As many as the part with the fewest has in that split; in training at most `config.max_train_rows` in all. Those of
    a longer part lie at equal distances. Raises `SettingsError` for parts that do not fit together.
    """
    _validate_alike(config, parts)
    tokenizer = model_tokenizer(str(parts[0].tokenizer_folder), origin_of(config))
    shutil.copytree(parts[0].tokenizer_folder, folder / TOKENIZER_FOLDER)

    def add(writers: dict[str, SplitWriter]) -> None:
        for split in SPLITS:
            _add_in_turn(writers[split], [getattr(part, split) for part in parts], _limit(config, split, len(parts)))

    return write_sequences(config, tokenizer, folder, add)


def _limit(config: DataConfig, split: str, parts: int) -> int | None:
    """Most sequences of each part in a split; None for no limit."""
    return config.max_train_rows // parts if split == "train" and config.max_train_rows else None


def _add_in_turn(writer: SplitWriter, sources: list[Dataset], limit: int | None) -> None:
    """Adds the first of each source, then the second of each, and so on."""
    count = min(map(len, sources))
    count = count if limit is None else min(count, limit)
    documents: set[str] = set()
    for start in range(0, count, READ_AT_ONCE):
        numbers = range(start, min(start + READ_AT_ONCE, count))
        read = [source.with_format("numpy")[[i * len(source) // count for i in numbers]] for source in sources]
        for i in range(len(numbers)):
            for part in read:
                document = str(part["document"][i])
                documents.add(document)
                writer.add_sequence(np.asarray(part["input_ids"][i]).tolist(), document)
    writer.counts.documents = len(documents)


def _validate_alike(config: DataConfig, parts: Sequence[Part]) -> None:
    """Raises `SettingsError` unless all parts have sequences of text of this length, in the same tokens."""
    tokenizers = [tokenizer_identity(model_tokenizer(str(part.tokenizer_folder), origin_of(config))) for part in parts]
    for part, tokenizer in zip(parts, tokenizers, strict=True):
        name, length = part.info["folder"], part.info["data"]["row_length"]
        if "tasks" in part.info:
            raise SettingsError(f"data.folders: {name} holds examples of tasks; only text can be mixed")
        if length != config.row_length:
            raise SettingsError(
                f"data.folders: {name} has sequences of {length} tokens, data.row_length={config.row_length}: set it "
                "to that, or prepare them again"
            )
        if tokenizer != tokenizers[0]:
            raise SettingsError(
                f"data.folders: {name} was made with another tokenizer than {parts[0].info['folder']}: prepare both "
                "with the same data.tokenizer"
            )
