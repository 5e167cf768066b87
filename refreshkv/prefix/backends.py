"""Where a prefix store keeps its entries: in host memory, or in a folder that processes share.

An entry's tensors are (tokens, heads, head size), tokens first, so that a prefix of each lies in one piece.
"""

import json
import mmap
import os
import time
import warnings
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refreshkv.files import PARTIAL, atomic_file, write_json
from refreshkv.identity import first_difference
from refreshkv.settings import SettingsError

CHECKED_TOKENS = 1024
"""Tokens that share a checksum: what is not loaded need not be read to trust what is."""
LAYOUT = 1
SUFFIX, LOCK_FILE, IDENTITY_FILE = ".safetensors", ".lock", "store.json"
UNREADABLE = (OSError, RuntimeError, SafetensorError, ValueError, KeyError, IndexError, TypeError)
"""What reading a file raises that is damaged or gone; RuntimeError is torch's, of a file that it cannot map."""
HEADER_BYTES = 256
"""At least what a file's header takes for each tensor."""


class DamagedEntry(Exception):
    """An entry that cannot be read, or not as it was written; it may also have been removed meanwhile."""


@dataclass(eq=False)
class Entry:
    """A stored prompt."""

    name: str
    ids: np.ndarray = field(repr=False)
    """(P,) int64: its tokens."""
    size: int
    """Bytes."""
    has_queries: bool
    """Whether the queries are stored beside keys and values."""
    seconds: float | None
    """What computing the whole prompt took, or would have taken; None if not known."""
    device: str
    """Where that was."""
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """In host memory; a folder's are read when they are needed."""
    checked: dict[str, int] = field(default_factory=dict, repr=False)
    """Chunks of each tensor whose checksums this process has verified."""


class Place(Protocol):
    """What a `PrefixStore` needs of the place that it keeps its entries in."""

    def writing(self) -> AbstractContextManager:
        """Only one thread of one process is in it at a time."""

    def entries(self) -> dict[Any, Entry]:
        """What is there and whole, as far as looking at the beginnings tells; equal keys mean the same entry."""

    def by_last_use(self) -> list[tuple[str, int]]:
        """Name and bytes of everything that takes room, the least recently used first."""

    def write(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        """Takes in an entry, which is seen whole or not at all."""

    def read(self, entry: Entry, tokens: int, names: list[str]) -> dict[str, Tensor]:
        """The first `tokens` of the tensors, on the host; raises `DamagedEntry`."""

    def touch(self, name: str) -> None:
        """Marks an entry as used now."""

    def remove(self, name: str) -> None:
        """Removes an entry, if it is there."""


class MemoryPlace:
    """Host memory of this process, page-locked where the tensors come from a GPU: copies back then run at full speed
    and beside the computation."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._lock = RLock()

    def writing(self) -> AbstractContextManager:
        return self._lock

    def entries(self) -> dict[Any, Entry]:
        return {entry: entry for entry in list(self._entries.values())}

    def by_last_use(self) -> list[tuple[str, int]]:
        return [(name, entry.size) for name, entry in list(self._entries.items())]

    def write(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        buffer = _host_buffer(sum(tensor.nbytes for tensor in tensors.values()))
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if devices and _page_lock(buffer):
            weakref.finalize(entry, _page_unlock, buffer, devices)
        start = 0
        for name, tensor in tensors.items():
            place = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            entry.tensors[name] = place.copy_(tensor, non_blocking=True)
            start += tensor.nbytes
        for device in devices:
            torch.cuda.synchronize(device)
        self._entries[entry.name] = entry

    def read(self, entry: Entry, tokens: int, names: list[str]) -> dict[str, Tensor]:
        return {name: entry.tensors[name][:tokens] for name in names}

    def touch(self, name: str) -> None:
        if name in self._entries:  # the last one is the most recently used
            self._entries[name] = self._entries.pop(name)

    def remove(self, name: str) -> None:
        self._entries.pop(name, None)


class FolderPlace:
    """A folder with one safetensors file for each entry, memory-mapped by whoever reads it.

    A file is written aside under a lock, forced to the disk and renamed, so that a reader sees all of it or nothing;
    its time of modification is that of its last use. What a killed writer has left goes with the next one.

    Raises `SettingsError` if the folder holds something else, or the entries of a model with another `identity`.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], setting: str) -> None:
        self.folder, self._setting = Path(folder), setting
        self._known: dict[tuple[str, int], Entry | None] = {}
        self._damaged: set[tuple[str, int]] = set()
        try:
            self._claim(identity)
        except (OSError, json.JSONDecodeError) as error:
            reason = getattr(error, "strerror", None) or f"its {IDENTITY_FILE} is not readable"
            raise SettingsError(f"{setting} {folder} cannot be used: {reason}; choose another folder") from None

    def _claim(self, identity: dict[str, Any]) -> None:
        """Writes down whose folder this is, or makes sure that it is this model's."""
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
                    write_json(file, {"layout": LAYOUT, **identity}, indent=1, durable=True)
        there = json.loads(file.read_text())
        different = first_difference({"layout": LAYOUT, **identity}, there if isinstance(there, dict) else {})
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
        """What the beginning of a file tells; None, with a warning, if it is damaged."""
        try:
            with safe_open(self.folder / file, framework="pt") as content:
                header = content.metadata()
                facts = json.loads(header["facts"])
                ids, sums = content.get_tensor("ids"), content.get_tensor("checksums")
                if header["checksum"] != _head_checksum(header["facts"], ids, sums):
                    raise ValueError("the checksum of its beginning is wrong")
            size = (self.folder / file).stat().st_size
            return Entry(file.removesuffix(SUFFIX), ids.numpy().copy(), size, **facts)
        except UNREADABLE as error:
            self._report(file, error)
            return None

    def _report(self, file: str, error: Exception) -> None:
        """Warns of a damaged file; one that has been removed since it was listed is not damaged."""
        if (self.folder / file).exists():
            reason = " ".join(str(error).split())
            warnings.warn(f"prefix store: {self.folder / file} is damaged and skipped ({reason})", stacklevel=2)

    def by_last_use(self) -> list[tuple[str, int]]:
        with os.scandir(self.folder) as files:
            found = [(file.name, file.stat()) for file in files if file.name.endswith(SUFFIX)]
        found.sort(key=lambda file: file[1].st_mtime_ns)
        return [(name.removesuffix(SUFFIX), stat.st_size) for name, stat in found]

    def write(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        for path in self.folder.glob(f".*{PARTIAL}"):  # the lock is ours, so their writers are gone
            path.unlink()
        host = {name: tensors[name].contiguous().cpu() for name in _stored_names(tensors)}
        sums = torch.tensor([_checksums(tensor) for tensor in host.values()], dtype=torch.int64)
        ids = torch.from_numpy(entry.ids)
        facts = json.dumps({name: getattr(entry, name) for name in ("has_queries", "seconds", "device")})
        header = {"facts": facts, "checksum": _head_checksum(facts, ids, sums)}
        file = self.folder / f"{entry.name}{SUFFIX}"
        try:
            with atomic_file(file, durable=True) as temporary:
                save_file({"ids": ids, "checksums": sums, **host}, temporary, metadata=header)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"{self._setting} {self.folder} cannot be written to: {reason}") from None

    def read(self, entry: Entry, tokens: int, names: list[str]) -> dict[str, Tensor]:
        file = self.folder / f"{entry.name}{SUFFIX}"
        try:
            with safe_open(file, framework="pt") as content:
                order = {name: row for row, name in enumerate(_stored_names(content.keys()))}
                sums = content.get_tensor("checksums")
                tensors = {name: content.get_tensor(name) for name in names}
                if any(len(tensor) != len(entry.ids) for tensor in tensors.values()):
                    raise ValueError("its tensors do not have its number of tokens")
                for name, tensor in tensors.items():
                    self._check(entry, name, tensor, tokens, sums[order[name]])
            return {name: tensor[:tokens] for name, tensor in tensors.items()}
        except UNREADABLE as error:
            self._damaged |= {key for key, known in self._known.items() if known is entry}
            self._report(file.name, error)
            raise DamagedEntry(entry.name) from None

    def _check(self, entry: Entry, name: str, tensor: Tensor, tokens: int, sums: Tensor) -> None:
        """Verifies the chunks that are about to be used and have not been verified by this process: once is enough to
        tell a damaged file, and reading gigabytes twice would take longer than copying them."""
        chunks = -(-tokens // CHECKED_TOKENS)
        first = entry.checked.get(name, 0)
        part = tensor[first * CHECKED_TOKENS : chunks * CHECKED_TOKENS]
        if first < chunks and _checksums(part) != sums[first:chunks].tolist():
            raise ValueError(f"the checksum of {name} is wrong")
        entry.checked[name] = max(first, chunks)

    def touch(self, name: str) -> None:
        now = time.time_ns()
        try:
            os.utime(self.folder / f"{name}{SUFFIX}", ns=(now, now))
        except OSError:  # removed meanwhile, or a folder that may only be read: then others decide what goes
            pass

    def remove(self, name: str) -> None:
        (self.folder / f"{name}{SUFFIX}").unlink(missing_ok=True)


def entry_bytes(tensors: dict[str, Tensor], ids: np.ndarray) -> int:
    """What an entry takes, with its checksums and header."""
    content = sum(tensor.nbytes + len(tensor) // CHECKED_TOKENS * 8 + HEADER_BYTES for tensor in tensors.values())
    return content + ids.nbytes + 4 * HEADER_BYTES


def _stored_names(keys: Iterable[str]) -> list[str]:
    """The tensors that have checksums, in their order."""
    return sorted(name for name in keys if name not in ("ids", "checksums"))


def _checksums(tensor: Tensor) -> list[int]:
    """64 bits of xxh3, as signed integers, of each chunk of tokens of a contiguous host tensor."""
    digests = (xxhash.xxh3_64_intdigest(part.view(torch.uint8).numpy()) for part in tensor.split(CHECKED_TOKENS))
    return [digest - (digest >> 63 << 64) for digest in digests]


def _head_checksum(facts: str, ids: Tensor, sums: Tensor) -> str:
    digest = xxhash.xxh3_128(facts.encode())
    digest.update(ids.numpy().tobytes())
    digest.update(sums.numpy().tobytes())
    return digest.hexdigest()


def _host_buffer(size: int) -> Tensor:
    """(size,) uint8 in pages of its own, exactly as many as needed: torch's pinned memory comes in powers of two."""
    return torch.frombuffer(mmap.mmap(-1, max(1, size)), dtype=torch.uint8)


def _page_lock(buffer: Tensor) -> bool:
    """Whether the pages could be locked for copies by the GPU; ordinary memory serves too, more slowly."""
    error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if int(error) != 0:
        warnings.warn(f"prefix store: {buffer.nbytes:,} bytes cannot be page-locked: copies are slower", stacklevel=2)
    return int(error) == 0


def _page_unlock(buffer: Tensor, devices: set[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)  # a copy from it may be under way
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
