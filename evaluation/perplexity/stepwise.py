"""Teacher-forced decoding, token by token: the slow and obvious way to a perplexity.

It is the only way for caches that evict: what they hold depends on all that they evicted before.

Shapes: `B` sequences of a batch, `T` tokens of each, `P` prompt length, `N = T - P` scored tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from refreshkv import decode_ahead
from refreshkv.cache.keyword import as_keyword
from refreshkv.evaluation.caches import GREEDY, Caches
from refreshkv.evaluation.costs import Meter, count_full_steps, count_selecting_steps, held_bytes
from refreshkv.evaluation.strategies import Strategy
from refreshkv.generation.inherited import without_own_settings


@dataclass(frozen=True)
class Decoded:
    """Losses and costs of one decoded batch."""

    losses: Tensor
    """(B, N) float32: next-token losses of the last N tokens, in nats."""
    greedy: Tensor
    """(B, N) int64: the most likely token in the place of each of the last N tokens."""
    full_steps: list[dict[int, int] | None]
    """For each sequence: refreshed layer -> full steps after the prompt. None if the cache refreshes nothing."""
    selecting_steps: list[dict[int, int] | None]
    """Likewise, selecting steps. None if the cache has none."""
    prompt_seconds: float
    """Time for the whole batch's prompts."""
    seconds: float
    """Time for the whole batch's N decoding steps."""
    cache_bytes: int
    """Bytes that the whole batch's cache held at the end."""
    peak_memory: int | None
    """Most bytes that the GPU held, weights included; None on a CPU."""


@torch.no_grad()
def decode_known(
    model: PreTrainedModel,
    ids: Tensor,
    prompt_length: int,
    strategy: Strategy,
    caches: Caches | None = None,
    capacity: int | None = None,
) -> Decoded:
    """Decodes the known tokens `ids` (B, T) with the loop that generates: P tokens as the prompt, then one at a time.

    caches: reuses caches of this model over several batches. capacity: tokens of the cache, T if None.

    The last token goes through the cache too, although no loss follows it: the full steps are then those of all N
    decoding steps, as in `Simulation`.
    """
    sequences, length = ids.shape
    cache = (caches or Caches(model)).take(strategy, sequences, prompt_length, capacity or length)
    meter = Meter(model)
    known = _KnownTokens(ids, meter)
    prompt = ids[:, :prompt_length]
    with without_own_settings(model):
        model.generate(  # pyright: ignore[reportCallIssue]  # a mixin of the models' classes
            prompt,
            attention_mask=torch.ones_like(prompt),
            **as_keyword(cache),
            custom_generate=decode_ahead,
            logits_processor=[known],
            max_new_tokens=length - prompt_length + 1,
            eos_token_id=None,
            pad_token_id=0,
            **GREEDY,
        )
    seconds, peak = meter.read()
    assert known.prompt_seconds is not None
    decoded = [(cache, i, prompt_length, length - prompt_length) for i in range(sequences)]
    return Decoded(
        losses=torch.stack(known.losses, dim=1).cpu(),
        greedy=torch.stack(known.greedy, dim=1).cpu(),
        full_steps=[count_full_steps(*part) for part in decoded],
        selecting_steps=[count_selecting_steps(*part) for part in decoded],
        prompt_seconds=known.prompt_seconds,
        seconds=seconds - known.prompt_seconds,
        cache_bytes=held_bytes(cache),
        peak_memory=peak,
    )


class _KnownTokens(LogitsProcessor):
    """Makes the loop choose the known next token, and records the model's loss of it."""

    def __init__(self, ids: Tensor, meter: Meter):
        self.ids, self.meter = ids, meter
        self.losses: list[Tensor] = []
        """One tensor (B,) float32 for each scored token, in nats."""
        self.greedy: list[Tensor] = []
        """One tensor (B,) int64 for each scored token: the most likely one."""
        self.prompt_seconds: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt_seconds is None:
            self.prompt_seconds, _ = self.meter.read()
        position = input_ids.shape[1]
        if position == self.ids.shape[1]:
            return scores
        token = self.ids[:, position]
        self.losses.append(F.cross_entropy(scores, token, reduction="none"))
        self.greedy.append(scores.argmax(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
