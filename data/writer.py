"""The rows of one split on their way to disk: never more than a few batches of them are in memory."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

BUFFERED_TOKENS = 1 << 20


@dataclass
class SplitCounts:
    """What became of a split's documents. `tokens + leftover_tokens` is all that its documents hold."""

    documents: int = 0
    """All documents that fell into the split."""
    dropped_documents: int = 0
    """Of these, the ones shorter than a row."""
    rows: int = 0
    tokens: int = 0
    """Tokens in rows."""
    leftover_tokens: int = 0
    """Tokens in no row: documents shorter than a row, and the ends that did not fill another one."""


class SplitWriter:
    """Cuts documents into rows of `row_length` tokens and appends them to the Arrow stream `path`.

    `columns` names further whole numbers that each row has, for `add_sequence`.
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
        self._digest = hashlib.sha256()
        self._rows: list[np.ndarray] = []
        self._documents: list[str] = []
        self._buffered_tokens = 0

    def add(self, token_ids: list[int], document: str) -> None:
        """Cuts one document, its tokens in order, into consecutive rows; what does not fill a row is left over."""
        count = len(token_ids) // self._row_length
        kept = count * self._row_length
        self.longest_document = max(self.longest_document, len(token_ids))
        self.counts.documents += 1
        self.counts.dropped_documents += count == 0
        self.counts.rows += count
        self.counts.tokens += kept
        self.counts.leftover_tokens += len(token_ids) - kept
        if count:
            self._buffer(np.array(token_ids[:kept], dtype=np.int32), [document] * count)

    def add_sequence(self, token_ids: list[int], document: str, **values: int) -> None:
        """Adds one document that is exactly a row; `values` are those of the further columns."""
        for name, value in values.items():
            self._columns[name].append(value)
        self.add(token_ids, document)

    def close(self) -> Dataset:
        """Ends the stream and returns its rows, memory mapped: input_ids (row_length,) int32, document a short hash,
        and the further columns, int32."""
        self._flush()
        self._stream.close()
        return Dataset.from_file(str(self._path))

    @property
    def digest(self) -> str:
        """SHA-256 over all tokens written so far, in order."""
        return self._digest.hexdigest()

    def _buffer(self, token_ids: np.ndarray, documents: list[str]) -> None:
        self.largest_token_id = max(self.largest_token_id, int(token_ids.max()))
        self._digest.update(token_ids.astype("<i4").tobytes())
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
        batch = [input_ids, pa.array(self._documents, pa.string()), *numbers]
        self._stream.write_batch(pa.RecordBatch.from_arrays(batch, schema=self._schema))
        self._rows, self._documents, self._buffered_tokens = [], [], 0
        self._columns = {name: [] for name in self._columns}


def _features(row_length: int, columns: tuple[str, ...]) -> Features:
    features = {"input_ids": List(Value("int32"), length=row_length), "document": Value("string")}
    return Features(features | {name: Value("int32") for name in columns})
