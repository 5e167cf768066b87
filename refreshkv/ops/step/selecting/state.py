"""The memory in which the launches of a selecting step hand results on.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for, `L'` a
few more, so that the last tile may be read whole, `N` shares of the positions, `M` of the attention to the chosen ones,
`O` observing queries, `R = O * H / Hkv` rows of logits, `F` finalists.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from refreshkv.ops.state import SelectingState, StepOptions
from refreshkv.ops.step import attention as every_step
from refreshkv.ops.step.selecting import attention, bins, shares, threshold

FREE = 64
"""Numbers in memory before the logits that are read but not used, where pooling windows begin before the first row."""

LARGEST_IN_CACHE = 0.5
"""The largest share of the L2 cache that logits of 32 bits may take."""


class SelectingScratch(NamedTuple):
    """What the launches of a selecting step hand on to each other; layers that follow one another may share it."""

    selecting: Tensor
    """(B,) int32: the step's position where it is a selecting step, else -1."""
    logits: Tensor
    """(B, Hkv, R, L') float32 or float16 (`logit_type`), in units of log 2. FREE numbers in memory lie before them."""
    middle: Tensor
    """(B, Hkv, R) float32: what is to be added to logits of 16 bits."""
    highest: Tensor
    """(B, Hkv, R, N) float32: the maximum of each share of the logits."""
    total: Tensor
    """(B, Hkv, R, N) float32: the sum of each share, relative to its maximum."""
    scores: Tensor
    """(B, Hkv, L') float32: the scores before pooling; written for wide pooling windows alone
    (`ranking.COMPUTED_ANEW`)."""
    rankings: Tensor
    """(B, Hkv, L') int32: the ranking of each position, the higher the better; -1 where the row's first and last runs
    of `shares.RUN` positions reach beyond the row."""
    histogram: Tensor
    """(B, Hkv, 2, BINS) int32: how many positions rank within each bin, and how many candidates within each part of the
    bin that holds the threshold."""
    counters: Tensor
    """(B, Hkv, 8) int32, by the columns of `threshold.py`."""
    finalists: Tensor
    """(B, Hkv, 2, F) int32: the finalists' positions, and their rankings."""
    choices: Tensor
    """(B, Hkv, 2) int32, by the columns of `threshold.py`: what the step chose."""
    listed: Tensor
    """(B, Hkv, M, 3, .) int32: the positions that each program of `_choose_and_attend` attends to, the candidates in
    its share, and their rankings."""
    counts: Tensor
    """(B, Hkv, M) int32: to how many positions it attends."""
    near_counts: Tensor
    """(B, Hkv, M) int32: how many candidates there are in its share; written for another launch alone."""
    partial: Tensor
    """(B, H, M, D) float32: the output of each share of the attention; that of an empty share is undefined."""
    chosen_highest: Tensor
    """(B, H, M) float32: the maximum of each share of the attention."""
    chosen_total: Tensor
    """(B, H, M) float32: the sum of each share, relative to its maximum."""

    @classmethod
    def empty(cls, keys: Tensor, observers: Tensor, options: StepOptions) -> "SelectingScratch":
        """Uninitialised memory for a cache with such keys (B, Hkv, L, D) and observers (B, H, O, D)."""
        batch, kv_heads, capacity, head_dim = keys.shape
        heads, window, device = *observers.shape[1:3], observers.device
        splits = every_step.splits_of(batch * kv_heads, device)
        chosen_splits = every_step.splits_of(batch * kv_heads, device, attention.PROGRAMS_PER_PROCESSOR)
        rows = heads // kv_heads * window
        room = room_of(capacity)

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(batch, *shape, dtype=dtype, device=device)

        kind = logit_type(keys, rows, options, device)
        logits = torch.empty(FREE + batch * kv_heads * rows * room, dtype=kind, device=device)[FREE:]
        return cls(
            selecting=buffer(),
            logits=logits.view(batch, kv_heads, rows, room),
            middle=buffer(kv_heads, rows, dtype=torch.float32),
            highest=buffer(kv_heads, rows, splits, dtype=torch.float32),
            total=buffer(kv_heads, rows, splits, dtype=torch.float32),
            scores=buffer(kv_heads, room, dtype=torch.float32),
            rankings=buffer(kv_heads, room),
            histogram=buffer(kv_heads, 2, bins.BINS),
            counters=buffer(kv_heads, threshold.COUNTERS.value),
            finalists=buffer(kv_heads, 2, threshold.MOST_FINALISTS),
            choices=buffer(kv_heads, threshold.CHOICE_COLUMNS.value),
            listed=buffer(kv_heads, chosen_splits, 3, shares.list_room(capacity, chosen_splits)),
            counts=buffer(kv_heads, chosen_splits),
            near_counts=buffer(kv_heads, chosen_splits),
            partial=buffer(heads, chosen_splits, head_dim, dtype=torch.float32),
            chosen_highest=buffer(heads, chosen_splits, dtype=torch.float32),
            chosen_total=buffer(heads, chosen_splits, dtype=torch.float32),
        )

    def chosen(self, left_padding: Tensor) -> Tensor:
        """Which positions the last selecting step chose: (B, Hkv, L') bool, False in batch rows that had another step.

        left_padding (B,): padded columns.
        """
        token = torch.arange(self.rankings.shape[2], device=self.rankings.device)
        least, limit = self.choices.unsqueeze(-1).unbind(2)
        exists = (token >= left_padding[:, None, None]) & (token <= self.selecting[:, None, None])
        return exists & ((self.rankings > least) | ((self.rankings == least) & (token <= limit)))


class Selecting(NamedTuple):
    """What the launches of a step need besides, if the cache has selecting steps."""

    state: SelectingState
    scratch: SelectingScratch
    options: StepOptions


def logit_type(keys: Tensor, rows: int, options: StepOptions, device: torch.device) -> torch.dtype:
    """The type of the logits on `device` of a cache with such keys (B, Hkv, L, D), which may be elsewhere, and so many
    rows of logits of a key/value head.

    float16 for 16-bit caches whose logits would fill more than half of the GPU's L2 cache in float32. Full steps store
    logits by the keys themselves, in float32.
    """
    batch, kv_heads, capacity, _ = keys.shape
    if keys.element_size() != 2 or options.has_full_steps:
        return torch.float32
    is_large = 4 * batch * kv_heads * rows * capacity > LARGEST_IN_CACHE * l2_bytes(device)
    return torch.float16 if is_large else torch.float32


def l2_bytes(device: torch.device) -> int:
    """Bytes of a GPU's L2 cache; 0 for a CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def room_of(capacity: int) -> int:
    """L': the tokens of a row of logits, scores or rankings, for a cache with room for `capacity` tokens."""
    return triton.cdiv(capacity, 16) * 16 + shares.RANKED
