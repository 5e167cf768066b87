"""Entries in a folder that processes share, one file each."""

import json
import os
import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from refreshkv.checksums import digest
from refreshkv.files import PARTIAL, atomic_file, write_json
from refreshkv.identity import first_difference
from refreshkv.prefix.entry import DamagedEntry, Entry
from refreshkv.prefix.entry_file import SUFFIX, UNREADABLE, read_entry, read_tensors, write_entry
from refreshkv.settings import SettingsError

LAYOUT = 2
"""Version of the folder's layout, stored with the model's identity."""

EARLIER_LAYOUTS = (1,)
LOCK_FILE, IDENTITY_FILE = ".lock", "store.json"


class FolderBackend:
    """Keeps each entry in a safetensors file that readers map into memory.

    A writer holds a lock, writes aside, forces the file to the disk and renames it, so that a reader sees all of a file
    or nothing. A file's time of modification is the time of its last use. The next writer removes what a killed one
    has left.

    Args:
        folder: made if it does not exist.
        identity: of the model whose prompts these are, see `refreshkv.identity`.
        setting: how errors name the folder's setting.

    Raises `SettingsError` if the folder holds other files or another model's entries, or cannot be used.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], setting: str) -> None:
        self.folder, self._setting, self._model = Path(folder), setting, digest(identity)
        self._known: dict[tuple[str, int], Entry | None] = {}
        self._damaged: set[tuple[str, int]] = set()
        try:
            self._claim({"layout": LAYOUT, **identity})
        except (OSError, json.JSONDecodeError) as error:
            reason = getattr(error, "strerror", None) or f"its {IDENTITY_FILE} is not readable"
            raise SettingsError(f"{setting} {folder} cannot be used: {reason}; choose another folder") from None

    def _claim(self, identity: dict[str, Any]) -> None:
        """Writes the model's identity into a new folder; compares it in one that is in use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / IDENTITY_FILE
        if not file.exists():
            foreign = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
            if foreign and not file.exists():
                raise SettingsError(
                    f"{self._setting} {self.folder} holds {foreign[0]}: choose a new or an empty folder"
                )
            with self.writing():
                if not file.exists():
                    write_json(file, identity, indent=1, durable=True)
        there = json.loads(file.read_text())
        there = there if isinstance(there, dict) else {}
        if there.get("layout") in EARLIER_LAYOUTS:
            raise SettingsError(
                f"{self._setting} {self.folder} was made by an earlier version, which kept too little of its model to "
                "compare: remove it, or choose another"
            )
        different = first_difference(identity, there)
        if different:
            raise SettingsError(
                f"{self._setting} {self.folder} was made by another model (not the same {different}): choose another"
            )

    def writing(self) -> AbstractContextManager:
        return FileLock(self.folder / LOCK_FILE, is_singleton=True)

    def entries(self) -> dict[Any, Entry]:
        with os.scandir(self.folder) as files:
            there = {(file.name, file.inode()) for file in files if file.name.endswith(SUFFIX)}
        for key in there - self._known.keys():
            self._known[key] = self._open(key[0])
        self._known = {key: self._known[key] for key in there}
        self._damaged &= there
        return {key: entry for key, entry in self._known.items() if entry is not None and key not in self._damaged}

    def _open(self, file: str) -> Entry | None:
        """The entry of a file; None, with a warning, if the file's beginning is damaged or it is of another model."""
        try:
            entry = read_entry(self.folder / file)
            if entry.model != self._model:
                raise ValueError("it is of another model")
            return entry
        except UNREADABLE as error:
            self._report(file, error)
            return None

    def _report(self, file: str, error: Exception) -> None:
        """Warns of a damaged file. A file that has been removed since it was listed is not damaged."""
        if (self.folder / file).exists():
            reason = " ".join(str(error).split())
            warnings.warn(f"prefix store: {self.folder / file} is damaged and skipped ({reason})", stacklevel=2)

    def by_last_use(self) -> list[tuple[str, int]]:
        with os.scandir(self.folder) as files:
            found = [(file.name, file.stat()) for file in files if file.name.endswith(SUFFIX)]
        found.sort(key=lambda file: file[1].st_mtime_ns)
        return [(name.removesuffix(SUFFIX), stat.st_size) for name, stat in found]

    def write(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        for path in self.folder.glob(f".*{PARTIAL}"):  # this process holds the lock, so their writers are gone
            path.unlink()
        try:
            with atomic_file(self._file(entry.name), durable=True) as temporary:
                write_entry(temporary, entry, tensors)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"{self._setting} {self.folder} cannot be written to: {reason}") from None

    def read(self, entry: Entry, tokens: int, names: list[str]) -> dict[str, Tensor]:
        file = self._file(entry.name)
        try:
            return read_tensors(file, entry, tokens, names)
        except UNREADABLE as error:
            self._damaged |= {key for key, known in self._known.items() if known is entry}
            self._report(file.name, error)
            raise DamagedEntry(entry.name) from None

    def touch(self, name: str) -> None:
        now = time.time_ns()
        try:
            os.utime(self._file(name), ns=(now, now))
        except OSError:  # removed meanwhile, or a folder that may only be read: others decide what is evicted
            pass

    def remove(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"
