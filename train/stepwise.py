"""Known tokens decoded one by one through a cache: the slow and obvious way to a perplexity, and the only one for
caches that evict, whose tokens depend on all that was evicted before.

Shapes: `B` rows of a batch, `T` tokens in a row, `P` prompt length, `N = T - P` scored tokens.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig

from refreshkv import RefreshCache
from refreshkv.train.decoding import Decoding


@dataclass(frozen=True)
class Decoded:
    """What decoding a batch gave."""

    losses: Tensor
    """(B, N) float32: next-token losses of the last N tokens, in nats."""
    full_steps: dict[int, list[int]] | None
    """Refreshed layer -> each row's full steps after the prompt; None if nothing is refreshed."""
    prompt_seconds: float
    """Of the whole batch."""
    seconds: float
    """Of the N decoding steps of the whole batch."""
    cache_bytes: int
    """What the cache held of the whole batch at the end."""
    peak_memory: int | None
    """Most bytes that the GPU held meanwhile, weights included; None on a CPU."""


@torch.no_grad()
def decode_known(model: nn.Module, ids: Tensor, prompt_length: int, decoding: Decoding) -> Decoded:
    """Decodes `ids` (B, T), teacher-forced: the prompt of P tokens in one block, then every further token by itself.

    The last token goes through the cache as well, although nothing after it is scored: full steps are then those of
    all N decoding steps, as in `Simulation`.
    """
    cache = new_cache(decoding, model.config, ids.shape[1])
    meter = Meter(model.device)
    logits = model(ids[:, :prompt_length], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    prompt_seconds, _ = meter.read()
    losses = []
    for token in ids[:, prompt_length:].split(1, dim=1):
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), token, reduction="none"))
        logits = model(token, past_key_values=cache, use_cache=True).logits
    seconds, peak = meter.read()
    steps, decoding_seconds = full_steps(cache, prompt_length), seconds - prompt_seconds
    return Decoded(torch.cat(losses, dim=1).cpu(), steps, prompt_seconds, decoding_seconds, held_bytes(cache), peak)


def new_cache(decoding: Decoding, model_config: PretrainedConfig, tokens: int) -> Cache:
    """The cache of one batch of rows of at most `tokens` tokens."""
    cache = decoding.build_cache(model_config, tokens)
    return DynamicCache(config=model_config) if cache is None else cache


def full_steps(cache: Cache, start: int) -> dict[int, list[int]] | None:
    """Refreshed layer -> each row's full steps from position `start` on; None if the cache refreshes nothing."""
    if not isinstance(cache, RefreshCache):
        return None
    counts = cache.full_steps[:, :, start:].sum(-1).tolist()
    return {layer: rows for layer, rows in enumerate(counts) if not cache.is_sliding[layer]}


def held_bytes(cache: Cache) -> int:
    """Bytes of all tensors that the cache's layers hold: keys, values and whatever a method keeps beside them."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Meter:
    """Time and GPU memory since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._began = time.perf_counter()

    def read(self) -> tuple[float, int | None]:
        """Seconds, once the GPU is done, and most bytes allocated (None on a CPU)."""
        if self._device.type != "cuda":
            return time.perf_counter() - self._began, None
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._began, torch.cuda.max_memory_allocated(self._device)
