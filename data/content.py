"""What prepared sequences hold: hashes of their tokens, from the tokens themselves and from a folder's files.

rows.json states them; a folder whose files hold anything else is refused (`refreshkv.data.rows.load_rows`).
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict

from refreshkv.checksums import remembered
from refreshkv.data.folder import SPLITS

UNCOUNTED = ("input_ids", "document")
"""Columns that are no further numbers of a sequence: the tokens have a hash of their own, documents are only named."""


class SplitDigest:
    """Hashes of one split: of all tokens in order, and of the values of each further column."""

    def __init__(self, columns: Iterable[str] = ()) -> None:
        self._tokens = hashlib.sha256()
        self._columns = {name: hashlib.sha256() for name in sorted(columns)}

    def add_tokens(self, token_ids: np.ndarray) -> None:
        self._tokens.update(token_ids.astype("<i4").tobytes())

    def add_column(self, name: str, values: np.ndarray) -> None:
        self._columns[name].update(values.astype("<i4").tobytes())

    @property
    def tokens(self) -> str:
        """SHA-256, in hex, of all tokens added so far."""
        return self._tokens.hexdigest()

    @property
    def columns(self) -> dict[str, str]:
        """The same of each further column, by name."""
        return {name: digest.hexdigest() for name, digest in self._columns.items()}


def fingerprint(row_length: int, digests: list[SplitDigest], with_columns: bool = True) -> str:
    """SHA-256, in hex, of the sequences of all splits.

    with_columns: include the further columns, if there are any. Folders of layout 1 did not.
    """
    parts: list[Any] = [row_length, *(digest.tokens for digest in digests)]
    if with_columns and any(digest.columns for digest in digests):
        parts += [digest.columns for digest in digests]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content(folder: Path, splits: DatasetDict, row_length: int) -> dict[str, Any]:
    """What the files of a prepared folder hold: `fingerprints` by layout, `smallest` and `largest` token id.

    Kept as long as the files stay as they are (`refreshkv.checksums`). Raises `ValueError` for columns of another form.
    """
    files = sorted(file for split in SPLITS for file in (folder / split).glob("*") if file.is_file())
    return remembered(f"rows of {row_length}", files, lambda: _read(splits, row_length))


def _read(splits: DatasetDict, row_length: int) -> dict[str, Any]:
    digests, smallest, largest = [], 0, -1
    for split in SPLITS:
        table: Dataset = splits[split]
        names = [name for name in table.column_names if name not in UNCOUNTED]
        digest = SplitDigest(names)
        for part in _chunks(table, "input_ids"):
            tokens = _tokens(part, row_length)
            digest.add_tokens(tokens)
            if len(tokens):
                smallest, largest = min(smallest, int(tokens.min())), max(largest, int(tokens.max()))
        for name in names:
            for part in _chunks(table, name):
                digest.add_column(name, _numbers(part, name))
        digests.append(digest)
    layouts = {"1": fingerprint(row_length, digests, with_columns=False), "2": fingerprint(row_length, digests)}
    return {"fingerprints": layouts, "smallest": smallest, "largest": largest}


def _chunks(table: Dataset, name: str) -> list[pa.Array]:
    return table.data.column(name).chunks if len(table) else []  # an empty column may have no type


def _tokens(part: Any, row_length: int) -> np.ndarray:
    """The tokens of a chunk of sequences, one after another."""
    lengths = part.value_lengths()
    values = part.flatten()
    if part.null_count or values.null_count or len(values) != len(part) * row_length:
        raise ValueError(f"it holds sequences of other than {row_length} tokens")
    if len(part) and not bool(np.all(lengths.to_numpy(zero_copy_only=False) == row_length)):
        raise ValueError(f"it holds sequences of other than {row_length} tokens")
    return _numbers(values, "input_ids")


def _numbers(values: Any, name: str) -> np.ndarray:
    if not pa.types.is_integer(values.type) or values.null_count:
        raise ValueError(f"its column {name} does not hold whole numbers")
    numbers = values.to_numpy(zero_copy_only=False)
    if len(numbers) and not -(2**31) <= int(numbers.min()) <= int(numbers.max()) < 2**31:
        raise ValueError(f"its column {name} holds numbers beyond 32 bits")
    return numbers
