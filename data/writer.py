"""Writes the sequences of one split to disk, with a few batches of them in memory at most."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from refreshkv.data.content import SplitDigest

BUFFERED_TOKENS = 1 << 20
"""Tokens kept in memory before they are written."""


@dataclass
class SplitCounts:
    """Counts of a split. `tokens + leftover_tokens` are all tokens of its documents."""

    documents: int = 0
    """All documents of the split."""
    dropped_documents: int = 0
    """Documents shorter than a row."""
    rows: int = 0
    """Sequences of `row_length` tokens."""
    tokens: int = 0
    """Tokens in those sequences."""
    leftover_tokens: int = 0
    """Tokens in none: documents shorter than a row, and ends of documents that do not fill one."""
    special_names: int = 0
    """How often the documents' text names a special token, such as </s>; it is ordinary text."""


class SplitWriter:
    """Cuts documents into sequences of `row_length` tokens and appends them to an Arrow stream.

    Args:
        path: the stream's file.
        columns: names of further whole numbers of each sequence, see `add_sequence`.
    """

    def __init__(self, path: Path, row_length: int, columns: tuple[str, ...] = ()) -> None:
        self.counts = SplitCounts()
        self.largest_token_id = -1
        self.longest_document = 0
        self._row_length = row_length
        self._path = path
        self._columns: dict[str, list[int]] = {name: [] for name in columns}
        self._schema = _features(row_length, columns).arrow_schema
        self._stream = pa.ipc.new_stream(path, self._schema)
        self.digest = SplitDigest(columns)
        self._rows: list[np.ndarray] = []
        self._documents: list[str] = []
        self._buffered_tokens = 0

    def add(self, token_ids: list[int], document: str, special_names: int = 0) -> None:
        """Cuts one document, its tokens in order, into consecutive sequences; an end that does not fill one is dropped.

        document: its short hash. special_names: how often its text names a special token.
        """
        count = len(token_ids) // self._row_length
        kept = count * self._row_length
        self.longest_document = max(self.longest_document, len(token_ids))
        self.counts.documents += 1
        self.counts.dropped_documents += count == 0
        self.counts.special_names += special_names
        self.counts.rows += count
        self.counts.tokens += kept
        self.counts.leftover_tokens += len(token_ids) - kept
        if count:
            self._buffer(np.array(token_ids[:kept], dtype=np.int32), [document] * count)

    def add_sequence(self, token_ids: list[int], document: str, **values: int) -> None:
        """Adds a document of exactly `row_length` tokens, with a value for each of the further columns."""
        for name, value in values.items():
            self._columns[name].append(value)
        self.add(token_ids, document)

    def close(self) -> Dataset:
        """Ends the stream; returns its sequences, memory-mapped: "input_ids" (row_length,) int32, "document", and the
        further columns, int32."""
        self._flush()
        self._stream.close()
        return Dataset.from_file(str(self._path))

    def _buffer(self, token_ids: np.ndarray, documents: list[str]) -> None:
        self.largest_token_id = max(self.largest_token_id, int(token_ids.max()))
        self.digest.add_tokens(token_ids)
        self._rows.append(token_ids)
        self._documents += documents
        self._buffered_tokens += len(token_ids)
        if self._buffered_tokens >= BUFFERED_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        input_ids = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(self._rows)), self._row_length)
        numbers = [pa.array(values, pa.int32()) for values in self._columns.values()]
        for name, values in self._columns.items():
            self.digest.add_column(name, np.array(values, dtype=np.int32))
        batch = [input_ids, pa.array(self._documents, pa.string()), *numbers]
        self._stream.write_batch(pa.RecordBatch.from_arrays(batch, schema=self._schema))
        self._rows, self._documents, self._buffered_tokens = [], [], 0
        self._columns = {name: [] for name in self._columns}


def _features(row_length: int, columns: tuple[str, ...]) -> Features:
    features = {"input_ids": List(Value("int32"), length=row_length), "document": Value("string")}
    return Features(features | {name: Value("int32") for name in columns})
