"""Entries in a folder that processes share, one file each."""

import os
import re
import stat
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
from refreshkv.folders import make_folder
from refreshkv.identity import first_difference
from refreshkv.prefix.entry import DamagedEntry, Entry
from refreshkv.prefix.entry_file import SUFFIX, UNREADABLE, read_entry, read_tensors, write_entry
from refreshkv.reading import read_own_json
from refreshkv.settings import SettingsError

LAYOUT = 2
"""Version of the folder's layout, stored with the model's identity."""

EARLIER_LAYOUTS = (1,)
LOCK_FILE, IDENTITY_FILE = ".lock", "store.json"

ENTRY_FILE = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")
"""The names of entries' files: a hash of the tokens. Other files are neither read nor removed."""

PRIVATE_FOLDER, PRIVATE_FILE, SHARED_FILE = 0o700, 0o600, 0o666
"""Permissions. Keys and values tell the prompt, so that nobody else may read them unless the store is shared."""


class FolderBackend:
    """Keeps each entry in a safetensors file that readers map into memory.

    A writer holds a lock, writes aside, forces the file to the disk and renames it, so that a reader sees all of a file
    or nothing. A file's time of modification is the time of its last use. The next writer removes what a killed one
    has left.

    Args:
        folder: made if it does not exist.
        identity: of the model whose prompts these are, see `refreshkv.identity`.
        setting: how errors name the folder's setting.
        shared: other users may read and write here. Without it the folder becomes private, and entries of other users
            are skipped: they decide what the model goes on from.

    Raises `SettingsError` if the folder holds other files or another model's entries, belongs to another user and is
    not shared, or cannot be used.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], setting: str, shared: bool = False) -> None:
        self.folder, self._setting, self._shared = Path(folder), setting, shared
        self._model = digest(identity)
        self._known: dict[tuple[str, int], Entry | None] = {}
        self._damaged: set[tuple[str, int]] = set()
        self._refused: set[str] = set()
        try:
            self._claim({"layout": LAYOUT, **identity})
        except SettingsError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise SettingsError(f"{setting} {folder} cannot be used: {reason}; choose another folder") from None

    def _claim(self, identity: dict[str, Any]) -> None:
        """Writes the model's identity into a new folder; compares it in one that is in use."""
        make_folder(self.folder, self._setting)
        if not self._shared and self.folder.stat().st_uid != os.geteuid():
            raise SettingsError(
                f"{self._setting} {self.folder} belongs to another user, who can read your prompts: choose a folder of "
                "your own, or say that it is shared (--prefix-store-shared)"
            )
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
        if not self._shared:
            self._make_private()
        try:
            there = read_own_json(file, f"its {IDENTITY_FILE} is not readable")
        except SettingsError as error:
            raise SettingsError(
                f"{self._setting} {self.folder} cannot be used: {error}; choose another folder"
            ) from None
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

    def _make_private(self) -> None:
        """Takes the folder and its files from other users, in a store of an earlier version too."""
        self.folder.chmod(PRIVATE_FOLDER)
        own = [self.folder / LOCK_FILE, self.folder / IDENTITY_FILE, *self.folder.glob(f"*{SUFFIX}")]
        for file in own:
            if file.is_file() and not file.is_symlink() and file.stat().st_uid == os.geteuid():
                file.chmod(PRIVATE_FILE)

    def writing(self) -> AbstractContextManager:
        mode = SHARED_FILE if self._shared else PRIVATE_FILE
        return FileLock(self.folder / LOCK_FILE, is_singleton=True, mode=mode)

    def entries(self) -> dict[Any, Entry]:
        there = {(file.name, file.inode()) for file in self._files() if self._may_be_read(file)}
        for key in there - self._known.keys():
            self._known[key] = self._open(key[0])
        self._known = {key: self._known[key] for key in there}
        self._damaged &= there
        return {key: entry for key, entry in self._known.items() if entry is not None and key not in self._damaged}

    def _files(self) -> list[os.DirEntry]:
        with os.scandir(self.folder) as files:
            return [file for file in files if ENTRY_FILE.fullmatch(file.name)]

    @staticmethod
    def _status(file: os.DirEntry) -> os.stat_result:
        """The owner, size and times of a file; of a link its own."""
        return file.stat(follow_symlinks=False)

    def _may_be_read(self, file: os.DirEntry) -> bool:
        """Whether an entry's file is this user's own, or any user's in a shared store; a link is nobody's."""
        try:
            status = self._status(file)
        except FileNotFoundError:  # removed meanwhile
            return False
        is_trusted = stat.S_ISREG(status.st_mode) and (self._shared or status.st_uid == os.geteuid())
        if not is_trusted and file.name not in self._refused:
            self._refused.add(file.name)
            warnings.warn(
                f"prefix store: {self.folder / file.name} belongs to another user, or is a link, and is skipped "
                "(--prefix-store-shared would read it)",
                stacklevel=2,
            )
        return is_trusted

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
        found = [(file.name, self._status(file)) for file in self._files()]
        found.sort(key=lambda file: file[1].st_mtime_ns)
        return [(name.removesuffix(SUFFIX), stat.st_size) for name, stat in found]

    def write(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        for path in self.folder.glob(f".*{PARTIAL}"):  # this process holds the lock, so their writers are gone
            path.unlink()
        try:
            mode = None if self._shared else PRIVATE_FILE
            with atomic_file(self._file(entry.name), durable=True, mode=mode) as temporary:
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
