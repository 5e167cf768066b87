"""The structs that the launches of a selecting step take, and the memory in which they hand results on.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for, `L'` a
few more, so that the last tile may be read whole, `N` shares of the positions, `O` observing queries, `R = O * H / Hkv`
rows of logits, `C` candidates.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from refreshkv.ops.selection.score_keys import ScoreKeys
from refreshkv.ops.step.attention import splits_of
from refreshkv.ops.step.selecting import attention, bins, scoring, shares, threshold


class SelectingOptions(NamedTuple):
    """When a decoding step is a selecting one, and what it then chooses; `RefreshConfig` documents the fields."""

    stride: int
    select_stride: int
    pool_kernel: int
    pool_ahead: bool
    recent_window: int
    sink_tokens: int


class SelectingCache(NamedTuple):
    """The state of one layer's cache that a selecting step reads and changes in place."""

    keys: Tensor
    """(B, Hkv, L, D)."""
    values: Tensor
    """(B, Hkv, L, D)."""
    score_keys: ScoreKeys
    length: Tensor
    """() int64: tokens so far."""
    row_state: Tensor
    """(B, 4) int64, by the columns of `refreshkv.ops.state`."""
    observers: Tensor
    """(B, H, O, D): the last queries, position `p` in slot `p % O`."""


class SelectingScratch(NamedTuple):
    """What the launches of a selecting step hand on to each other; layers that follow one another may share it."""

    selecting: Tensor
    """(B,) int32: the step's position where it is a selecting step, else -1."""
    logits: Tensor
    """(B, Hkv, R, L') float32, in units of log 2."""
    highest: Tensor
    """(B, Hkv, R, N) float32: the maximum of each share of the logits."""
    total: Tensor
    """(B, Hkv, R, N) float32: the sum of each share, relative to its maximum."""
    scores: Tensor
    """(B, Hkv, L') float32: the scores before pooling."""
    rankings: Tensor
    """(B, Hkv, L') int32: the ranking of each position, the higher the better."""
    histogram: Tensor
    """(B, Hkv, BINS) int32: how many positions rank within each bin."""
    counters: Tensor
    """(B, Hkv, 2) int32, by the columns of `threshold.py`."""
    candidates: Tensor
    """(B, Hkv, 2, C) int32: the candidates' positions, and their rankings."""
    choices: Tensor
    """(B, Hkv, 2) int32, by the columns of `threshold.py`: what the step chose."""
    listed: Tensor
    """(B, Hkv, N, .) int32: the positions that each program of `_attend` attends to."""

    @classmethod
    def empty(cls, keys: Tensor, observers: Tensor) -> "SelectingScratch":
        """Uninitialised memory for a cache with such keys and observers."""
        batch, kv_heads, capacity, _ = keys.shape
        pairs, device = batch * kv_heads, keys.device
        splits = splits_of(pairs, device, attention.PROGRAMS_PER_PROCESSOR)
        score_splits = splits_of(pairs, device, scoring.PROGRAMS_PER_PROCESSOR)
        rows = observers.shape[1] // kv_heads * observers.shape[2]
        room = triton.cdiv(capacity, 16) * 16 + shares.RANKED

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(batch, kv_heads, *shape, dtype=dtype, device=device)

        return cls(
            selecting=torch.empty(batch, dtype=torch.int32, device=device),
            logits=buffer(rows, room, dtype=torch.float32),
            highest=buffer(rows, score_splits, dtype=torch.float32),
            total=buffer(rows, score_splits, dtype=torch.float32),
            scores=buffer(room, dtype=torch.float32),
            rankings=buffer(room),
            histogram=buffer(bins.BINS),
            counters=buffer(threshold.COUNTERS.value),
            candidates=buffer(2, threshold.candidates_of(capacity)),
            choices=buffer(threshold.CHOICE_COLUMNS.value),
            listed=buffer(splits, shares.list_room(capacity, splits)),
        )

    def chosen(self, left_padding: Tensor) -> Tensor:
        """Which positions the last selecting step chose: (B, Hkv, L') bool, False in batch rows that had another step.

        left_padding (B,): padded columns.
        """
        token = torch.arange(self.rankings.shape[2], device=self.rankings.device)
        least, limit = self.choices.unsqueeze(-1).unbind(2)
        exists = (token >= left_padding[:, None, None]) & (token <= self.selecting[:, None, None])
        return exists & ((self.rankings > least) | ((self.rankings == least) & (token <= limit)))
