"""Cascading KV cache: sub-caches that each accept half of what leaves the one before.

Willette et al., "Training-Free Exponential Context Extension via Cascading KV Cache", ICLR 2025,
https://arxiv.org/abs/2406.17808. As there, the first tokens stay, the newest sub-cache accepts every token, and a token
that leaves a full sub-cache is accepted by the next one if that has room, and else every second time. With the running
score, a token that is not accepted takes the newest entry's place if it has the higher score; by count alone it is
gone. The score is an exponential moving average of the attention that an entry receives, maximum over the heads of the
group.

Departures: entries keep the positions that they were written with, and the prompt attends to all of itself, as in all
baselines here; a sub-cache accepts everything until it is full. With one sub-cache it is StreamingLLM.

Which tokens are kept by count depends on their number alone, so one pass under `parallel_mask` gives the logits of
decoding. With the score there is no such form: what an entry has received depends on which entries were there before.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `P` prompt length, `E = K + 1` entries,
`N` sub-caches.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.baselines.compact import CompactLayer
from refreshkv.baselines.streaming import StreamingConfig
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.preallocated_layer import Phase
from refreshkv.config import RefreshConfig, validate_whole
from refreshkv.ops.naive.step import grouped_attention
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class CascadingConfig:
    """Settings of the cascading cache. Raises `SettingsError` for values outside their range."""

    budget: int | float = 0.125
    """Entries of the cache: a number of tokens, or a share of the prompt."""
    parts: int = 4
    """Sub-caches N (>= 1), which share the budget without the sink tokens; the first ones get the remainder."""
    sink_tokens: int = 4
    """First tokens that never leave."""
    by_score: bool = False
    """Whether a token that is not accepted competes by its running score."""
    decay: float = 0.999
    """Share of the running score that a step keeps (0 to 1)."""

    def __post_init__(self) -> None:
        StreamingConfig(self.budget, self.sink_tokens)  # has the same ranges
        validate_whole("parts", self.parts, 1)
        if not 0 <= self.decay < 1:
            raise SettingsError(f"decay must be at least 0 and less than 1, got {self.decay}")
        if isinstance(self.budget, int):
            self.sizes(self.budget)

    def sizes(self, budget: int) -> list[int]:
        """Entries of the sink tokens and of each sub-cache, for K = `budget`."""
        size, remainder = divmod(budget - self.sink_tokens, self.parts)
        if size < 1:
            raise SettingsError(
                f"budget={budget} leaves no room beside sink_tokens={self.sink_tokens} for parts={self.parts} "
                "sub-caches: make it larger or parts smaller"
            )
        return [self.sink_tokens, *(size + (part < remainder) for part in range(self.parts))]


class CascadingLayer(CompactLayer):
    """A layer of sub-caches in plain PyTorch; decoding steps are not captured into a CUDA graph.

    State: `keys`, `values` (B, Hkv, E, D), the sink tokens first, then one sub-cache after another, then the entry of
    the token that attends; `positions`, `scores` (B, Hkv, E); `arrivals`, `sizes` (B, 1 + N), of the sink tokens and
    each sub-cache: tokens that came to it, and its entries.
    """

    batch_state = (*CompactLayer.batch_state, "arrivals", "sizes")
    positions: Tensor
    scores: Tensor
    arrivals: Tensor
    sizes: Tensor

    def __init__(self, max_cache_len: int, settings: CascadingConfig):
        super().__init__(max_cache_len, settings.budget)
        self.settings, self.sink_tokens = settings, settings.sink_tokens
        self.takes_prefix = not settings.by_score  # the scores need the queries of all tokens
        self.is_compileable = False

    def state_changed_by_step(self, length: int) -> tuple[str, ...]:
        return "keys", "values", "positions", "scores", "arrivals"

    def _prompt_entries(self, query, key, budgets, left_padding, capacity, scaling):
        sizes = [self.settings.sizes(budget) for budget in budgets.tolist()]
        self._keep("sizes", torch.tensor(sizes, device=key.device))
        if self.settings.by_score:
            return self._scored_entries(query, key, left_padding, capacity, scaling)
        entries, arrivals = torch.full((len(sizes), capacity), -1), []
        for row, padding in enumerate(left_padding.tolist()):
            kept, counts = kept_tokens(key.shape[2] - padding, tuple(sizes[row]))
            arrivals.append(counts)
            entries[row, : len(kept)] = torch.tensor([-1 if token < 0 else token + padding for token in kept])
        self._keep("arrivals", torch.tensor(arrivals, device=key.device))
        positions = entries.to(key.device)[:, None].expand(-1, key.shape[1], -1)
        return positions, key.new_zeros(key.shape[:3], dtype=torch.float32)

    def _scored_entries(self, query, key, left_padding, capacity, scaling):
        """Goes through the prompt token by token, as decoding does, with the attention to all of the prompt."""
        batch, kv_heads, length, _ = key.shape
        positions = torch.full((batch, kv_heads, capacity), -1, device=key.device)
        scores = torch.zeros(batch, kv_heads, capacity, device=key.device)
        self._keep("arrivals", torch.zeros_like(self.sizes))
        for token in range(length):
            real = token >= left_padding
            column = torch.arange(token + 1, device=key.device)
            seen = (column >= left_padding[:, None]) | (column == token)
            received = attention(query[:, :, token : token + 1], key[:, :, : token + 1], seen[:, None], scaling)
            positions[..., -1] = token
            update_scores(scores, received.gather(2, positions.clamp(min=0)), positions >= 0, self.settings.decay)
            source = cascade(scores, self.arrivals, self.sizes, real, by_score=True)
            positions, scores = positions.gather(2, source), scores.gather(2, source)
            positions[..., -1] = -1
        whole = torch.zeros(batch, kv_heads, length, device=key.device)
        return positions, whole.scatter_add(2, positions.clamp(min=0), scores.masked_fill(positions < 0, 0.0))

    @torch.no_grad()
    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.phase = Phase.DECODING
        self.keys[:, :, -1:], self.values[:, :, -1:] = key, value
        self.positions[..., -1] = self.cumulative_length
        self.cumulative_length += 1
        seen = self.positions >= 0
        output = grouped_attention(query, self.keys, self.values, seen.unsqueeze(2), scaling).transpose(1, 2)
        if self.settings.by_score:
            received = attention(query, self.keys, seen, scaling)
            update_scores(self.scores, received, seen, self.settings.decay)
        everywhere = torch.ones(len(query), dtype=torch.bool, device=query.device)
        source = cascade(self.scores, self.arrivals, self.sizes, everywhere, self.settings.by_score)
        rows = source.unsqueeze(-1).expand_as(self.keys)
        self.keys.copy_(self.keys.gather(2, rows))
        self.values.copy_(self.values.gather(2, rows))
        self.positions.copy_(self.positions.gather(2, source))
        self.scores.copy_(self.scores.gather(2, source))
        return output


def cascade(scores: Tensor, arrivals: Tensor, sizes: Tensor, active: Tensor, by_score: bool) -> Tensor:
    """Moves the token of the last entry into the sub-caches: for each entry the one that it becomes, (B, Hkv, E) int64.

    scores (B, Hkv, E); arrivals, sizes (B, 1 + N), of which `arrivals` is counted on; active (B,) bool: batch rows that
    have a token.
    """
    batch, kv_heads, entries = scores.shape
    source = torch.arange(entries, device=scores.device).expand(batch, kv_heads, -1).clone()
    carried = source[..., -1:].clone()  # (B, Hkv, 1): the token that looks for a place, by its entry
    start = torch.zeros_like(active, dtype=torch.int64)
    for part in range(sizes.shape[1]):
        size, arrived = sizes[:, part], arrivals[:, part].clone()
        accepted, accepts = accepted_tokens(part, arrived, size)
        place = accepted % size.clamp(
            min=1
        )  # the next free entry, or the oldest; what is not accepted meets the newest
        place = torch.where(accepts | (size == 0), place, (accepted - 1) % size.clamp(min=1))
        index = (start + place)[:, None, None].expand(-1, kv_heads, 1)
        old = source.gather(2, index)
        takes = accepts[:, None, None].expand_as(old)
        if by_score and part > 0:
            takes = takes | (scores.gather(2, carried) > scores.gather(2, old))
        takes = takes & active[:, None, None]
        source.scatter_(2, index, torch.where(takes, carried, old))
        arrivals[:, part] += active
        # the sink tokens hand on what finds no room, a sub-cache the oldest entry of a full one
        carried = torch.where(takes, old, carried)
        active = active & (accepted >= size) & (accepts | (part == 0))
        start = start + size
    return source


def accepted_tokens(part: int, arrived: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """How many of `arrived` tokens a sub-cache of `size` entries has accepted, and whether it accepts the next one.

    part: 0 for the sink tokens, which accept until they are full, 1 for the sub-cache that accepts all.
    """
    beyond = (arrived - size).clamp(min=0)
    if part == 0:
        return arrived - beyond, arrived < size
    if part == 1:
        return arrived, torch.ones_like(arrived, dtype=torch.bool)
    return arrived - beyond // 2, (arrived < size) | (beyond % 2 == 0)


def attention(query: Tensor, keys: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """The probabilities of a token's attention, maximum over the group's heads: (B, Hkv, L) float32.

    query (B, H, 1, D), keys (B, Hkv, L, D), seen (B, Hkv or 1, L) bool.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (keys.shape[1], -1)).squeeze(3).to(wide)
    logits = grouped @ keys.to(wide).transpose(-1, -2) * scaling
    return logits.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(dim=-1).amax(dim=2).float()


def update_scores(scores: Tensor, received: Tensor, seen: Tensor, decay: float) -> None:
    """Moves the running averages (B, Hkv, E) by what entries received; an entry that is not seen has none."""
    scores[..., -1] = 0.0  # the token's own begins
    scores.mul_(decay).add_(received, alpha=1 - decay).masked_fill_(~seen, 0.0)


@lru_cache(maxsize=256)
def kept_tokens(count: int, sizes: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Which of `count` tokens a cache by count holds, in the order of its entries, -1 for none; and the tokens that
    came to each part. The definition: one token at a time, whole numbers alone."""
    parts: list[list[int]] = [[-1] * size for size in sizes]
    arrivals = [0] * len(sizes)
    for token in range(count):
        _insert(token, parts, arrivals)
    return [token for part in parts for token in part], arrivals


def _insert(token: int, parts: list[list[int]], arrivals: list[int]) -> None:
    for number, part in enumerate(parts):
        size, arrived = len(part), arrivals[number]
        arrivals[number] += 1
        beyond = max(0, arrived - size)
        if number == 0:
            if arrived < size:
                part[arrived] = token
                return
            continue
        if number > 1 and beyond % 2:
            return
        place = (arrived - (beyond // 2 if number > 1 else 0)) % size
        part[place], token = token, part[place]
        if token < 0:
            return


def parallel_mask(prompt_length: int, length: int, settings: CascadingConfig) -> Tensor:
    """Which tokens each query position sees, (T, T) bool, T = `length`: one pass of a model under this mask gives the
    logits of decoding from `prompt_length` on. Without padding. Raises `SettingsError` for the running score."""
    if settings.by_score:
        raise SettingsError("by_score=True has no parallel form: decode token by token, or set by_score=False")
    sizes = settings.sizes(RefreshConfig(budget=settings.budget).largest_budget(prompt_length))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    parts: list[list[int]] = [[-1] * size for size in sizes]
    arrivals = [0] * len(sizes)
    for position in range(length):
        if position >= prompt_length:
            kept = [token for part in parts for token in part if token >= 0]
            seen[position] = False
            seen[position, [*kept, position]] = True
        _insert(position, parts, arrivals)
    return seen


class CascadingCache(PreallocatedCache):
    """The cascading cache; the settings are those of `CascadingConfig`."""

    def __init__(
        self,
        config: PretrainedConfig,
        max_cache_len: int,
        budget: int | float = 0.125,
        parts: int = 4,
        sink_tokens: int = 4,
        by_score: bool = False,
        decay: float = 0.999,
    ):
        settings = CascadingConfig(budget, parts, sink_tokens, by_score, decay)
        super().__init__(config, max_cache_len, lambda: CascadingLayer(max_cache_len, settings))
