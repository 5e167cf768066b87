"""Finished parts of an evaluation, one JSON object per line of a file, so that an interrupted one can continue."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from refreshkv.checksums import digest
from refreshkv.evaluation.processes import ALONE, Processes
from refreshkv.reading import LARGEST_REPORT, read_bytes
from refreshkv.settings import SettingsError

LINE_START = b'{"key": "'
"""How every record's line begins."""
CHECKSUM = "checksum"
"""Field of a line: a hash of its other values."""
METHODS = 2
"""Part of every key. Raise it when a strategy or a measurement computes something else than before."""


def record_key(*parts: Any) -> str:
    """The key of a record whose values depend on `parts`, JSON values."""
    return digest([METHODS, *parts])[:32]


class Keyed(Protocol):
    """A dataclass of plain values with a `key`: a hash of everything that the other values depend on."""

    @property
    def key(self) -> str: ...


Line = TypeVar("Line", bound=Keyed)
Job = TypeVar("Job")


class RecordFile(Generic[Line]):
    """The records of one file, by key.

    A last line that a killed process wrote in part is removed. A line whose values were changed since is left out, with
    a warning, so that it is measured again. Raises `SettingsError` for a file with other content.

    processes: those that share the evaluation. The first one reads and writes the file; all have all records.
    """

    kind = "an evaluation"
    """Names the evaluation in errors."""

    def __init__(self, path: Path, processes: Processes = ALONE) -> None:
        self._path, self.processes = path, processes
        found = processes.from_first(lambda: self._read() if path.exists() else [])
        self._records = {record.key: record for record in found}

    def fill(self, jobs: list[Job], work: Callable[[Job], list[Line]]) -> Iterator[tuple[Job, list[Line]]]:
        """Divides the jobs over the processes and adds their records; yields each job with its records, in order."""
        for job, made in self.processes.shared(jobs, work):
            self.add(made)
            yield job, made

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
        """Appends records to the file; they lie on the disk when this returns. All processes must add the same ones."""
        self.processes.from_first(lambda: self._append(records))
        self._records |= {record.key: record for record in records}

    def _append(self, records: list[Line]) -> None:
        lines = [json.loads(json.dumps(vars(record))) for record in records]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**line, CHECKSUM: digest(line)}) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[Line]:
        content = read_bytes(self._path, f"the records of {self.kind}", LARGEST_REPORT)
        complete = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
            good = [line for line in lines if line.pop(CHECKSUM, None) in (None, digest(line))]
            records = [self.parse(line) for line in good]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"{self._path} is not from {self.kind} ({reason}); use another --output") from None
        if len(good) < len(lines):
            print(
                f"warning: {self._path}: {len(lines) - len(good)} lines were changed since they were written; they are "
                "measured again",
                file=sys.stderr,
            )
        begun = content[len(complete) :][: len(LINE_START)]
        if begun and (records or LINE_START.startswith(begun)):
            os.truncate(self._path, len(complete))
        return records
