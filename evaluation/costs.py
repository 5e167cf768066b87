"""What decoding costs: seconds, GPU memory, bytes of the cache, and full steps of each layer."""

import time

import torch
from torch import Tensor
from transformers import Cache

from refreshkv import RefreshCache


class Meter:
    """Measures time and GPU memory from its creation on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._started = time.perf_counter()

    def read(self) -> tuple[float, int | None]:
        """Waits for the GPU; returns the seconds, and the most bytes allocated on it (None on a CPU)."""
        if self._device.type != "cuda":
            return time.perf_counter() - self._started, None
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._started, torch.cuda.max_memory_allocated(self._device)


def held_bytes(cache: Cache) -> int:
    """Bytes of all tensors that the cache's layers hold: keys, values and what a method keeps beside them.

    Tensors that share their storage count once.
    """
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def count_full_steps(cache: Cache, row: int, start: int, steps: int) -> dict[int, int] | None:
    """Refreshed layer -> full steps of one batch row at positions start .. start + steps - 1.

    None if the cache refreshes nothing.
    """
    if not isinstance(cache, RefreshCache):
        return None
    counts = cache.full_steps[:, row, start : start + steps].sum(-1).tolist()
    return {layer: count for layer, count in enumerate(counts) if not cache.is_sliding[layer]}


def effective_stride(strides: list[float | None]) -> float | None:
    """The harmonic mean of several layers' strides: decoding steps per full step over all of them.

    A layer without a full step (None) counts as rate 0. None if no layer has one.
    """
    rates = [1 / stride if stride else 0.0 for stride in strides]
    return len(rates) / sum(rates) if any(rates) else None
