"""A Triton kernel for caches in host memory: which slots of the small cache the tokens of a selecting step take.

Tokens that are chosen again stay where they are; the others take the slots of tokens that are not chosen any more, in
order. The definition is `refreshkv.ops.naive.step.place_near`.

Shapes: `B` batch rows, `Hkv` key/value heads, `L` tokens the cache has room for, `W` slots of a selection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.state import LayerState, NearState
from refreshkv.ops.tiles import BUDGET, LAST_FULL, PADDING, PROMPT_LENGTH, ROW_COLUMNS

BLOCK = 2048
"""Slots that a program takes at once."""

RANK, SLOT, OWN_COLUMNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Columns of `NearState.own`."""


@triton.jit
def _place_near(
    length_ptr, row_ptr, selected_ptr, near_length_ptr, near_row_ptr, near_selected_ptr, held_ptr, slot_of_ptr, own_ptr,
    fetched_ptr, wanted_ptr, free_ptr, kv_heads, capacity, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Places the selection of one batch row and key/value head, (B, Hkv, W), if the step was a selecting one.

    free_ptr: (B, Hkv, W) int32 of scratch, for the slots that no chosen token holds.
    """
    pair = tl.program_id(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(length_ptr).to(tl.int32) - 1
    row_state = row_ptr + batch * ROW_COLUMNS
    anchor = tl.load(row_state + LAST_FULL).to(tl.int32)
    budget = tl.load(row_state + BUDGET).to(tl.int32)
    padding = tl.load(row_state + PADDING).to(tl.int32)
    kept = tl.minimum(anchor + 1 - padding, budget)
    selecting = anchor == position
    row = pair.to(tl.int64) * width
    near_selected, own = near_selected_ptr + row, own_ptr + pair * OWN_COLUMNS
    if kv_head == 0:
        tl.store(wanted_ptr + batch, selecting.to(tl.int1))
        near_row = near_row_ptr + batch * ROW_COLUMNS
        tl.store(near_row + LAST_FULL, (anchor * 0 + width - 1).to(tl.int64))
        tl.store(near_row + BUDGET, budget.to(tl.int64))
        tl.store(near_row + PADDING, (width - kept + selecting.to(tl.int32)).to(tl.int64))
        tl.store(near_row + PROMPT_LENGTH, (anchor * 0).to(tl.int64))
    if pair == 0:
        since = tl.where(selecting, 0, position - anchor - 1)
        tl.store(near_length_ptr, (width + since).to(tl.int64))
    if selecting:
        _place(
            selected_ptr + row, near_selected, held_ptr + row, slot_of_ptr + pair.to(tl.int64) * capacity,
            fetched_ptr + row, free_ptr + row, kept, width, BLOCK,
        )  # fmt: skip
        rank = _rank_of(selected_ptr + row, position, kept, BLOCK)
        tl.debug_barrier()  # other threads have written the slots
        slot = tl.load(near_selected + rank)
        last = tl.load(near_selected + kept - 1)
        tl.debug_barrier()
        tl.store(own + RANK, rank)
        tl.store(own + SLOT, slot)
        tl.store(near_selected + rank, last)
    elif anchor == position - 1:
        rank = tl.load(own + RANK)
        if rank >= 0:
            tl.store(near_selected + rank, tl.load(own + SLOT))


@triton.jit
def _place(selected, near_selected, held, slot_of, fetched, free, kept, width, BLOCK: tl.constexpr):
    """Writes the slot of each chosen token, and what each slot fetches; keeps `held` and `slot_of`."""
    number = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        slot = start + number
        tl.store(fetched + slot, tl.full([BLOCK], -1, tl.int32), mask=slot < width)
        tl.store(free + slot, tl.full([BLOCK], 1, tl.int32), mask=slot < width)
    tl.debug_barrier()
    for start in range(0, kept, BLOCK):
        rank = start + number
        # [BLOCK] twice
        token = tl.load(selected + rank, mask=rank < kept, other=0)
        slot = tl.load(slot_of + token, mask=rank < kept, other=-1)
        tl.store(near_selected + rank, slot, mask=rank < kept)
        tl.store(free + slot, tl.zeros([BLOCK], tl.int32), mask=(rank < kept) & (slot >= 0))
    tl.debug_barrier()
    # the free slots move to the front of their list; an entry that is overwritten has been read
    count = kept * 0
    for start in range(0, width, BLOCK):
        slot = start + number
        # [BLOCK]
        is_free = tl.load(free + slot, mask=slot < width, other=0)
        tl.debug_barrier()
        place = count + tl.cumsum(is_free, 0) - 1
        tl.store(free + place, slot, mask=is_free != 0)
        count += tl.sum(is_free, 0)
    tl.debug_barrier()
    count = kept * 0
    for start in range(0, kept, BLOCK):
        rank = start + number
        # [BLOCK] twice
        token = tl.load(selected + rank, mask=rank < kept, other=0)
        is_new = (tl.load(near_selected + rank, mask=rank < kept, other=0) < 0).to(tl.int32)
        place = count + tl.cumsum(is_new, 0) - 1
        # [BLOCK] twice
        slot = tl.load(free + place, mask=is_new != 0, other=0)
        before = tl.load(held + slot, mask=is_new != 0, other=-1)
        tl.store(slot_of + before, tl.full([BLOCK], -1, tl.int32), mask=(is_new != 0) & (before >= 0))
        tl.store(slot_of + token, slot, mask=is_new != 0)
        tl.store(held + slot, token, mask=is_new != 0)
        tl.store(fetched + slot, token, mask=is_new != 0)
        tl.store(near_selected + rank, slot, mask=is_new != 0)
        count += tl.sum(is_new, 0)


@triton.jit
def _rank_of(selected, position, kept, BLOCK: tl.constexpr):
    """The rank at which `position` stands among the `kept` chosen ones."""
    found = kept * 0
    for start in range(0, kept, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        # [BLOCK]
        token = tl.load(selected + rank, mask=rank < kept, other=-1)
        found = tl.maximum(found, tl.max(tl.where(token == position, rank, 0), 0))
    return found


def place_near(state: LayerState, near: NearState) -> None:
    """`refreshkv.ops.naive.step.place_near` in one launch."""
    batch, kv_heads, width = near.selected.shape
    free: Tensor = torch.empty_like(near.selected)
    _place_near[batch * kv_heads,](
        state.length, state.row_state, state.selected, near.length, near.row_state, near.selected, near.held,
        near.slot_of, near.own, near.fetched, near.wanted, free, kv_heads, near.slot_of.shape[2], width,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip
