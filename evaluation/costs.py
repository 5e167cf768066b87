"""What decoding costs: seconds, GPU memory, bytes held and read, full and selecting steps of each layer."""

import time
from collections.abc import Iterable
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import Cache

from refreshkv import RefreshCache


class Meter:
    """Measures time, and memory of the GPUs that a model is on, from its creation on."""

    def __init__(self, model: nn.Module) -> None:
        self._gpus = sorted({weight.device.index for weight in model.parameters() if weight.device.type == "cuda"})
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
        self._started = time.perf_counter()

    def read(self) -> tuple[float, int | None]:
        """Waits for the GPUs; returns the seconds, and the most bytes allocated (None on a CPU).

        Of several GPUs it is the sum of the most that each held, perhaps not all at the same time.
        """
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
        seconds = time.perf_counter() - self._started
        return seconds, sum(map(torch.cuda.max_memory_allocated, self._gpus)) if self._gpus else None


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
    return _count(cache, cache.full_steps, row, start, steps)


def count_selecting_steps(cache: Cache, row: int, start: int, steps: int) -> dict[int, int] | None:
    """Likewise, refreshed layer -> selecting steps; None if the cache has no selecting steps."""
    if not isinstance(cache, RefreshCache) or cache.config.select_stride is None:
        return None
    return _count(cache, cache.selecting_steps, row, start, steps)


def _count(cache: RefreshCache, flags: Tensor, row: int, start: int, steps: int) -> dict[int, int]:
    """Refreshed layer -> positions of one batch row, of `steps` from `start` on, that flags (layers, B, L) mark."""
    counts = flags[:, row, start : start + steps].sum(-1).tolist()
    return {layer: count for layer, count in enumerate(counts) if not cache.is_sliding[layer]}


def effective_stride(strides: list[float | None]) -> float | None:
    """The harmonic mean of several layers' strides: decoding steps per full step over all of them.

    A layer without a full step (None) counts as rate 0. None if no layer has one.
    """
    rate = step_rate(strides)
    return 1 / rate if rate else None


def share_read(context: float, budget: int, full: float = 0.0, selecting: float = 0.0, score_bits: int = 16) -> float:
    """Bytes of keys and values that a decoding step reads, as a share of those that full attention reads.

    A full step reads the whole context, any other step K entries; a selecting step reads score keys of the whole
    context besides (docs/specification.md, section 10). The scales of score keys (one float32 for each token and head)
    are not counted.

    Args:
        context: tokens that full attention reads, mean over the decoding steps.
        budget: K, tokens in the small cache.
        full, selecting: share of the decoding steps that are full, and selecting.
        score_bits: bits of each number of the score keys, beside 16 of a number in the cache.
    """
    small = min(budget, context) / context
    keys_of_both = 0.5
    return full + (1 - full) * small + selecting * keys_of_both * score_bits / 16


def share_computed(
    context: float, budget: int, full: float = 0.0, selecting: float = 0.0, observation_window: int = 1
) -> float:
    """Operations of a decoding step's attention and scoring, as a share of those of full attention.

    A query and a key cost 4 D operations per head where the query attends, 2 D where it only scores. A selecting step
    scores the whole context with each observing query, a full step with each but its own, whose logits it has.
    Arguments as in `share_read`.
    """
    small = min(budget, context) / context
    return full * (1 + (observation_window - 1) / 2) + (1 - full) * small + selecting * observation_window / 2


def step_rate(strides: Iterable[float | None]) -> float:
    """The share of decoding steps, mean over layers, from each layer's steps per such step (None: no such step)."""
    return fmean([1 / stride if stride else 0.0 for stride in strides] or [0.0])
