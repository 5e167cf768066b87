"""Sentences for haystacks: from files, or generated in their place."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import datasets

from refreshkv.data.tasks.values import Value, file_state
from refreshkv.data.tasks.words import sentence
from refreshkv.reading import refuse_special_sources
from refreshkv.settings import SettingsError

BUILDERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def generated_sentences(random: Random, count: int) -> list[str]:
    """`count` unrelated plain sentences."""
    return [sentence(random) for _ in range(count)]


def essay_sentences(random: Random, files: str | list[str], column: str, count: int) -> list[str]:
    """`count` consecutive sentences of the files, from a random one on; the first follows the last.

    Raises `SettingsError` for files that cannot be read, lack the column, or hold no sentence.
    """
    names = tuple([files] if isinstance(files, str) else files)
    sentences = _sentences(names, column, tuple(map(file_state, names)))
    start = random.randrange(len(sentences))
    return [sentences[(start + i) % len(sentences)] for i in range(count)]


def load_columns(files: str | Sequence[str], setting: str) -> datasets.Dataset:
    """The table of text, JSON (lines) or parquet files, local or at addresses that `datasets` reads.

    Raises `SettingsError`, naming `setting`, if they cannot be read or are empty.
    """
    files = [files] if isinstance(files, str) else list(files)
    inner = [file.split("::")[0] for file in files]  # zip://FILE::ARCHIVE, as fsspec chains addresses
    endings = {Path(file.removesuffix(".gz")).suffix for file in inner}
    builders = {BUILDERS.get(ending) for ending in endings}
    builder = builders.pop() if len(builders) == 1 else None
    if builder is None:
        raise SettingsError(f"{setting} must be files of one kind ({', '.join(BUILDERS)}), got {', '.join(files)}")
    refuse_special_sources(files, setting)
    options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    try:
        table = datasets.load_dataset(builder, data_files=files, split="train", **options)
    except Exception as error:  # builders raise many types
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise SettingsError(f"{setting}={', '.join(files)} cannot be read: {reason}") from error
    if len(table) == 0:
        raise SettingsError(f"{setting}={', '.join(files)}: the files are empty")
    return table


@lru_cache(maxsize=4)
def _sentences(files: tuple[str, ...], column: str, states: tuple) -> list[str]:
    """The sentences of the files. states: their `file_state`, part of what is remembered."""
    table = load_columns(files, "data_files")
    if column not in table.column_names:
        known = ", ".join(table.column_names)
        raise SettingsError(f"text_column={column}: the files have no such column, only {known}")
    place = f"data_files={', '.join(files)}"
    texts = [Value(value, f"{place}: row {row}, column {column}").text() for row, value in enumerate(table[column])]
    text = " ".join(" ".join(text.split()) for text in texts)
    sentences = [part for part in SENTENCE_END.split(text) if part]
    if not sentences:
        raise SettingsError(f"data_files={', '.join(files)}: the files hold no sentence")
    return sentences
