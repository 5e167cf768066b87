"""Lists of the keys that blocks of neighbouring positions attend to, for partial and selecting steps.

A *block* is a few neighbouring positions, from the prompt's end on. Its list names each key that any of them sees
once, with a bit mask that says which of them do: bit `i` for the block's `i`-th position. Short segments share most of
what they chose, so their keys are gathered once for the whole block. Full steps see nothing in a list.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `Hkv` key/value heads, `A` anchors, `N` intervals, `W` slots
of a selection, `J` blocks of a chunk.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.rows.segments import Segments
from refreshkv.ops.state import Plan

MAX_MASKS = 2**26
"""Masks held at once, 4 bytes each, and as many tokens: 512 MiB in all."""

LARGEST_BLOCK = 32
"""Positions of a block, at most: the bits of a mask."""

RANKS, TOKENS = 1024, 1024
"""Ranks of a selection, and positions of a row, that a program takes at once."""


class KeyLists(NamedTuple):
    """The lists of some blocks."""

    tokens: Tensor
    """(B, Hkv, J, T) int32: the positions of the listed keys, in order."""
    masks: Tensor
    """(B, Hkv, J, T) int32: which of the block's positions see each."""
    counts: Tensor
    """(B, Hkv, J) int32: how many keys are listed."""
    first: int
    """Number of the first of these blocks; block `j` begins at position `P - 1 + j * positions`."""
    positions: int
    """Positions of a block."""


def key_lists(plan: Plan, segments: Segments, selected: Tensor, length: int, positions: int) -> Iterator[KeyLists]:
    """The lists of all blocks of so many positions, some blocks at a time.

    selected (B, Hkv, A, W) int32: as `refreshkv.ops.selection.ranking.select_all` gives it.
    """
    batch, kv_heads, anchors, width = selected.shape
    blocks = triton.cdiv(length - plan.prompt_length + 1, positions)
    chunk = min(blocks, max(1, MAX_MASKS // (batch * kv_heads * length)))
    memory = torch.empty(2, batch * kv_heads * chunk * length, dtype=torch.int32, device=selected.device)
    within = _first_intervals(segments.starts, plan.prompt_length, positions, blocks)
    for first in range(0, blocks, chunk):
        shape = (batch, kv_heads, min(chunk, blocks - first))
        counts = torch.empty(shape, dtype=torch.int32, device=selected.device)
        tokens, masks = (part[: counts.numel() * length].view(*shape, length) for part in memory)
        _list_keys[shape[2], kv_heads, batch](
            *segments[:3], selected, plan.budgets, plan.left_padding, within, tokens, masks, counts,
            anchors, segments.count, segments.full, width, length, plan.prompt_length, first, positions,
            RANKS=min(RANKS, triton.next_power_of_2(width)), TOKENS=min(TOKENS, triton.next_power_of_2(length)),
            num_warps=8,
        )  # fmt: skip
        yield KeyLists(tokens, masks, counts, first, positions)


@lru_cache(maxsize=8)
def _first_intervals(starts: Tensor, prompt_length: int, positions: int, blocks: int) -> Tensor:
    """The number of the interval in which each block begins: (blocks + 1,) int64. All layers share it."""
    with torch.inference_mode(False):
        begins = prompt_length - 1 + positions * torch.arange(blocks + 1, device=starts.device)
        return torch.searchsorted(starts[:-1], begins, right=True) - 1


@triton.jit
def _bits(low, high):
    """The bits `low .. high` of an int32, none if high < low: low from 0 to 31, high from -1 to 31."""
    below = tl.where(high >= 31, -1, (1 << tl.minimum(high + 1, 31)) - 1)
    return tl.where(high >= low, below & ~((1 << low) - 1), 0)


@triton.jit(do_not_specialize=["anchors", "intervals", "full", "prompt", "first_block"])
def _list_keys(
    anchor_ptr, start_ptr, latest_ptr, selected_ptr, budget_ptr, padding_ptr, within_ptr, token_ptr, mask_ptr,
    count_ptr, anchors, intervals, full, width, length, prompt, first_block, positions,
    RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The list of one block: its masks are put together by position, then moved to the front, in place."""
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = batch * tl.num_programs(1) + kv_head
    row = pair * tl.num_programs(0) + block
    tokens, masks = token_ptr + row * length, mask_ptr + row * length
    begin = prompt - 1 + (first_block + block) * positions
    end = tl.minimum(begin + positions, length)
    budget = tl.load(budget_ptr + batch).to(tl.int32)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    number = tl.arange(0, TOKENS)
    for start in range(0, end, TOKENS):
        tl.store(masks + start + number, tl.zeros([TOKENS], tl.int32), mask=start + number < end)
    tl.debug_barrier()
    for interval in range(
        tl.load(within_ptr + first_block + block).to(tl.int32),
        tl.minimum(tl.load(within_ptr + first_block + block + 1).to(tl.int32) + 1, intervals),
    ):
        which = tl.load(latest_ptr + batch * intervals + interval).to(tl.int32)
        anchor = tl.load(anchor_ptr + batch * anchors + which).to(tl.int32)
        # the interval's positions in the block that decode from its anchor
        low = tl.maximum(tl.load(start_ptr + interval).to(tl.int32), begin)
        low = tl.maximum(low, tl.where(which >= full, anchor, anchor + 1))
        high = tl.minimum(tl.load(start_ptr + interval + 1).to(tl.int32), end) - 1
        if low <= high:
            kept = tl.minimum(budget, anchor + 1 - padding)
            chosen = selected_ptr + (pair * anchors + which) * width
            for start in range(0, kept, RANKS):
                rank = start + tl.arange(0, RANKS)
                # [RANKS]
                token = tl.load(chosen + rank, mask=rank < kept, other=0)
                last = tl.minimum(high, anchor + budget - rank)  # until then the queue holds it
                bits = _bits(low - begin, tl.maximum(last - begin, -1))
                tl.atomic_or(masks + token, bits, mask=(rank < kept) & (bits != 0), sem="relaxed")
            for start in range(tl.maximum(anchor + 1, low - budget), high + 1, TOKENS):
                recent = start + number
                bits = _bits(tl.maximum(recent, low) - begin, tl.minimum(high, recent + budget) - begin)
                tl.atomic_or(masks + recent, bits, mask=recent <= high, sem="relaxed")
    tl.debug_barrier()
    count = tl.zeros([], tl.int32)
    for start in range(0, end, TOKENS):
        token = start + number
        # [TOKENS], past the L1 cache, which atomic operations do not reach
        mask = tl.load(masks + token, mask=token < end, other=0, cache_modifier=".cg")
        listed = mask != 0
        place = count + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(tokens + place, token, mask=listed)
        tl.store(masks + place, mask, mask=listed)
        count += tl.sum(listed.to(tl.int32), 0)
    tl.store(count_ptr + row, count)
