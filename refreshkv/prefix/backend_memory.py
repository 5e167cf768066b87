"""Entries in this process's host memory."""

import mmap
import warnings
import weakref
from contextlib import AbstractContextManager
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from refreshkv.prefix.entry import Entry


class MemoryBackend:
    """Keeps entries in host memory, page-locked if their tensors come from a GPU.

    Copies from page-locked memory to the GPU run at full speed and beside the computation.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}  # the last one is the most recently used
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
            part = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            entry.tensors[name] = part.copy_(tensor, non_blocking=True)
            start += tensor.nbytes
        for device in devices:
            torch.cuda.synchronize(device)
        self._entries[entry.name] = entry

    def read(self, entry: Entry, tokens: int, names: list[str]) -> dict[str, Tensor]:
        return {name: entry.tensors[name][:tokens] for name in names}

    def touch(self, name: str) -> None:
        if name in self._entries:
            self._entries[name] = self._entries.pop(name)

    def remove(self, name: str) -> None:
        self._entries.pop(name, None)


def _host_buffer(size: int) -> Tensor:
    """(size,) uint8 in pages of its own. torch's pinned memory would round the size up to a power of two."""
    return torch.frombuffer(mmap.mmap(-1, max(1, size)), dtype=torch.uint8)


def _page_lock(buffer: Tensor) -> bool:
    """Locks the buffer's pages for copies to a GPU; False, with a warning, if the system refuses."""
    runtime = torch.cuda.cudart()
    assert runtime is not None  # only a torch without CUDA has none
    error = runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if int(error) != 0:
        warnings.warn(f"prefix store: {buffer.nbytes:,} bytes cannot be page-locked: copies are slower", stacklevel=2)
    return int(error) == 0


def _page_unlock(buffer: Tensor, devices: set[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)  # a copy from the buffer may still run
    runtime = torch.cuda.cudart()
    assert runtime is not None  # as above
    runtime.cudaHostUnregister(buffer.data_ptr())
