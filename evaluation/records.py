"""Finished pieces of an evaluation, one JSON object per line of a file, so that an interrupted one goes on."""

import json
import os
from pathlib import Path
from typing import Any, Generic, TypeVar

from refreshkv.settings import SettingsError

Line = TypeVar("Line")
"""A dataclass of plain values with a `key`: a hash of everything that its other values depend on."""


class RecordFile(Generic[Line]):
    """The records of one file by key. A last line that a kill has cut short is removed.

    Raises `SettingsError` for a file that holds something else.
    """

    kind = "an evaluation"
    """What the lines are of, for errors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records = {record.key: record for record in self._read()} if path.exists() else {}

    def parse(self, values: dict[str, Any]) -> Line:
        """The record of a line's values. JSON has made text of keys that were numbers."""
        raise NotImplementedError

    def get(self, key: str) -> Line | None:
        return self._records.get(key)

    def add(self, records: list[Line]) -> None:
        """Appends them to the file; they are on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(record)) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        self._records |= {record.key: record for record in records}

    def _read(self) -> list[Line]:
        content = self._path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        try:
            records = [self.parse(json.loads(line)) for line in complete.splitlines()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"{self._path} is not from {self.kind} ({reason}); use another --output") from None
        if complete != content and records:
            os.truncate(self._path, len(complete))
        return records


def numbered_layers(counts: dict[str, int] | None) -> dict[int, int] | None:
    """Values by layer, with the layers' numbers as numbers again."""
    return None if counts is None else {int(layer): count for layer, count in counts.items()}
