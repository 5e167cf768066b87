"""Known tokens decoded one by one through a cache: the slow and obvious way to a perplexity, and the only one for
caches that evict, whose tokens depend on all that was evicted before.

Shapes: `B` rows of a batch, `T` tokens in a row, `P` prompt length, `N = T - P` scored tokens.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, LogitsProcessor, PreTrainedModel

from refreshkv import RefreshCache, decode_ahead
from refreshkv.evaluation.caches import GREEDY, Caches
from refreshkv.evaluation.strategies import Decoding


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
def decode_known(
    model: PreTrainedModel, ids: Tensor, prompt_length: int, decoding: Decoding, caches: Caches | None = None
) -> Decoded:
    """Decodes `ids` (B, T), teacher-forced: the prompt of P tokens in one block, then every further token by itself, in
    the loop that generates. caches: of this model, for several batches.

    The last token goes through the cache as well, although nothing after it is scored: full steps are then those of
    all N decoding steps, as in `Simulation`.
    """
    rows, length = ids.shape
    cache = (caches or Caches(model)).take(decoding, rows, prompt_length, length)
    meter = Meter(model.device)
    known = _KnownTokens(ids, meter)
    prompt = ids[:, :prompt_length]
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        custom_generate=decode_ahead,
        logits_processor=[known],
        max_new_tokens=length - prompt_length + 1,
        eos_token_id=None,
        pad_token_id=0,
        **GREEDY,
    )
    seconds, peak = meter.read()
    steps, decoding_seconds = full_steps(cache, prompt_length), seconds - known.prompt_seconds
    losses = torch.stack(known.losses, dim=1).cpu()
    return Decoded(losses, steps, known.prompt_seconds, decoding_seconds, held_bytes(cache), peak)


class _KnownTokens(LogitsProcessor):
    """Lets only the token be chosen that is known to come next, and notes what the model thought of it."""

    def __init__(self, ids: Tensor, meter: "Meter"):
        self.ids, self.meter = ids, meter
        self.losses: list[Tensor] = []
        """(B,) float32 each: in nats."""
        self.prompt_seconds: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt_seconds is None:
            self.prompt_seconds, _ = self.meter.read()
        position = input_ids.shape[1]
        if position == self.ids.shape[1]:
            return scores
        token = self.ids[:, position]
        self.losses.append(F.cross_entropy(scores, token, reduction="none"))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


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
