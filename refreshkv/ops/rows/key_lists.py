"""Lists of the keys that blocks of neighbouring positions attend to, for partial and selecting steps.

A *block* is a few neighbouring positions, from the prompt's end on. Its list names each key that any of them sees
once, with a bit mask that says which of them do: bit `i` for the block's `i`-th position. Short segments share most of
what they chose, so their keys are gathered once for the whole block. Full steps see nothing in a list.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `Hkv` key/value heads, `A` anchors, `N` intervals, `W` slots
of a selection, `J` blocks, `U` keys that a list has room for.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.rows.segments import Segments, most_anchors
from refreshkv.ops.state import Plan

MAX_MASKS = 2**26
"""Masks by position that are put together at once, 4 bytes each: 256 MiB."""

LARGEST_BLOCK = 32
"""Positions of a block, at most: the bits of a mask."""

RANKS, TOKENS = 1024, 1024
"""Ranks of a selection, and positions of a row, that a program takes at once."""


class KeyLists(NamedTuple):
    """The lists of all blocks."""

    entries: Tensor
    """(B, Hkv, J, 2, U) int32: the positions of the listed keys, in order, and their masks."""
    counts: Tensor
    """(B, Hkv, J) int32: how many keys are listed."""


def key_lists(plan: Plan, segments: Segments, selected: Tensor, length: int, positions: int) -> KeyLists:
    """The lists of all blocks of so many positions; block `j` begins at position `P - 1 + j * positions`.

    selected (B, Hkv, A, W) int32: as `refreshkv.ops.selection.ranking.select_all` gives it.
    """
    batch, kv_heads, anchors, width = selected.shape
    entries, counts = lists = empty_lists(plan, selected, positions, length)
    blocks, room = counts.shape[2], entries.shape[-1]
    begins = plan.prompt_length - 1 + positions * torch.arange(blocks + 1, device=selected.device)
    within = torch.searchsorted(segments.starts[:-1], begins, right=True) - 1
    chunk = min(blocks, max(1, MAX_MASKS // (batch * kv_heads * length)))
    masks = torch.zeros(batch * kv_heads * chunk * length, dtype=torch.int32, device=selected.device)
    for first in range(0, blocks, chunk):
        _list_keys[min(chunk, blocks - first), kv_heads, batch](
            *segments[:3], selected, plan.budgets, plan.left_padding, within, masks, entries, counts,
            anchors, segments.count, segments.full, width, length, plan.prompt_length, first, positions, blocks, room,
            RANKS=min(RANKS, triton.next_power_of_2(width)), TOKENS=min(TOKENS, triton.next_power_of_2(length)),
            CLEARS=first + chunk < blocks, num_warps=8,
        )  # fmt: skip
    return lists


def empty_lists(plan: Plan, like: Tensor, positions: int, length: int) -> KeyLists:
    """Uninitialised memory for `key_lists`; like: any tensor (B, Hkv, ...) on its device."""
    blocks = triton.cdiv(length - plan.prompt_length + 1, positions)
    chosen = most_anchors(plan, length, positions) * plan.width
    room = min(length, chosen + positions + min(plan.width, plan.droppable))
    shape = (*like.shape[:2], blocks)
    return KeyLists(
        torch.empty(*shape, 2, room, dtype=torch.int32, device=like.device),
        torch.empty(shape, dtype=torch.int32, device=like.device),
    )


@triton.jit
def _bits(low, high):
    """The bits `low .. high` of an int32, none if high < low: low from 0 to 31, high from -1 to 31."""
    below = tl.where(high >= 31, -1, (1 << tl.minimum(high + 1, 31)) - 1)
    return tl.where(high >= low, below & ~((1 << low) - 1), 0)


@triton.jit(do_not_specialize=["anchors", "intervals", "full", "prompt", "first_block", "blocks"])
def _list_keys(
    anchor_ptr, start_ptr, latest_ptr, selected_ptr, budget_ptr, padding_ptr, within_ptr, mask_ptr, entry_ptr,
    count_ptr, anchors, intervals, full, width, length, prompt, first_block, positions, blocks, room,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, CLEARS: tl.constexpr,
):  # fmt: skip
    """The list of one block. Its masks are put together by position, in memory that is zero before and, if it CLEARS
    it, afterwards."""
    block, kv_head, batch = first_block + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = batch * tl.num_programs(1) + kv_head
    masks = mask_ptr + (pair * tl.num_programs(0) + tl.program_id(0)) * length
    row = pair * blocks + block
    tokens = entry_ptr + row * 2 * room
    begin = prompt - 1 + block * positions
    end = tl.minimum(begin + positions, length)
    budget = tl.load(budget_ptr + batch).to(tl.int32)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    number = tl.arange(0, TOKENS)
    first_interval = tl.load(within_ptr + block).to(tl.int32)
    last_interval = tl.minimum(tl.load(within_ptr + block + 1).to(tl.int32), intervals - 1)
    for interval in range(first_interval, last_interval + 1):
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
        tl.store(tokens + room + place, mask, mask=listed)
        if CLEARS:
            tl.store(masks + token, tl.zeros([TOKENS], tl.int32), mask=listed)
        count += tl.sum(listed.to(tl.int32), 0)
    tl.store(count_ptr + row, count)
