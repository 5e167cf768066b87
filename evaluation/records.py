"""Finished parts of an evaluation, one JSON object per line of a file, so that an interrupted one can continue."""

import json
import os
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from refreshkv.reading import LARGEST_REPORT, read_bytes
from refreshkv.settings import SettingsError

LINE_START = b'{"key": "'
"""How every record's line begins."""


class Keyed(Protocol):
    """A dataclass of plain values with a `key`: a hash of everything that the other values depend on."""

    @property
    def key(self) -> str: ...


Line = TypeVar("Line", bound=Keyed)


class RecordFile(Generic[Line]):
    """The records of one file, by key.

    A last line that a killed process wrote in part is removed. Raises `SettingsError` for a file with other content.
    """

    kind = "an evaluation"
    """Names the evaluation in errors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records = {record.key: record for record in self._read()} if path.exists() else {}

    def parse(self, values: dict[str, Any]) -> Line:
        """Builds the record from a line's values. JSON has turned keys that were numbers into text."""
        raise NotImplementedError

    def get(self, key: str) -> Line | None:
        """The record with this key; None if the file has none."""
        return self._records.get(key)

    def __getitem__(self, key: str) -> Line:
        """The record with this key, which the file has."""
        return self._records[key]

    def add(self, records: list[Line]) -> None:
        """Appends records to the file; they lie on the disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(record)) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        self._records |= {record.key: record for record in records}

    def _read(self) -> list[Line]:
        content = read_bytes(self._path, f"the records of {self.kind}", LARGEST_REPORT)
        complete = content[: content.rfind(b"\n") + 1]
        try:
            records = [self.parse(json.loads(line)) for line in complete.splitlines()]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"{self._path} is not from {self.kind} ({reason}); use another --output") from None
        begun = content[len(complete) :][: len(LINE_START)]
        if begun and (records or LINE_START.startswith(begun)):
            os.truncate(self._path, len(complete))
        return records
