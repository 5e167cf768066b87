"""The last stage of `_choose_and_attend`: it merges the shares of the attention, and ends the step.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, padded to DP, `L` tokens
the cache has room for, `L'` a few more, `W` slots of a selection, `N` lists of a batch row and key/value head, padded
to NP.
"""

import triton
import triton.language as tl

from refreshkv.ops.step.finishing import merge_shares
from refreshkv.ops.tiles import LAST_FULL, ROW_COLUMNS


@triton.jit
def merge_part(
    partial_ptr, highest_ptr, total_ptr, step_partial_ptr, step_highest_ptr, step_total_ptr, sink_ptr, output_ptr,
    position, pair, kv_head, split, splits, step_splits,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """Merges one program's part of the outputs of a batch row and key/value head, HEADS heads and COLUMNS columns at a
    time: of the shares of the chosen positions, or, where `position` is -1 because the step is not a selecting one, of
    the shares of `_attend`."""
    if position < 0:
        partial_ptr, highest_ptr, total_ptr = step_partial_ptr, step_highest_ptr, step_total_ptr
    merged = tl.where(position < 0, step_splits, splits)
    HEAD_TILES: tl.constexpr = (G + HEADS - 1) // HEADS
    for part in range(split, HEAD_TILES * (DP // COLUMNS), splits):
        merge_shares(
            partial_ptr, highest_ptr, total_ptr, sink_ptr, output_ptr, pair * G, kv_head * G,
            part % HEAD_TILES * HEADS, part // HEAD_TILES * COLUMNS, merged, G, D, HEADS, COLUMNS, MERGED,
        )  # fmt: skip


@triton.jit
def keep_choice(
    list_ptr, count_ptr, ranking_ptr, selected_ptr, kept_ranking_ptr, pair, own, lists, list_room, room, width,
    BLOCK: tl.constexpr, NP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Writes the positions in list `own` of a batch row and key/value head into its selection (B, Hkv, W) int32, behind
    those of the lists before it; if ORDERED, their rankings too, by which the lowest can be put in order. It reads what
    other programs wrote past its L1 cache."""
    number = tl.arange(0, NP)
    # [NP]
    counts = tl.load(count_ptr + pair * lists + number, mask=number < lists, other=0, cache_modifier=".cg")
    first = tl.sum(tl.where(number < own, counts, 0), 0)
    count = tl.sum(tl.where(number == own, counts, 0), 0)
    selected = selected_ptr + pair.to(tl.int64) * width + first
    kept_rankings = kept_ranking_ptr + pair.to(tl.int64) * width + first
    rankings = ranking_ptr + pair.to(tl.int64) * room
    listed = list_ptr + (pair.to(tl.int64) * lists + own) * (3 * list_room)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        # [BLOCK]
        token = tl.load(listed + entry, mask=entry < count, other=0)
        tl.store(selected + entry, token, mask=entry < count)
        if ORDERED:
            # [BLOCK]
            ranking = tl.load(rankings + token, mask=entry < count, other=0, cache_modifier=".cg")
            tl.store(kept_rankings + entry, ranking, mask=entry < count)


@triton.jit
def mark_selecting(row_ptr, flag_ptr, batch, position, capacity):
    """Notes the batch row's selecting step: in its state (B, 4) int64, and in the flags (B, L) bool."""
    tl.store(row_ptr + batch * ROW_COLUMNS + LAST_FULL, position.to(tl.int64))
    tl.store(flag_ptr + batch * capacity + position, tl.full([], 1, tl.int1))
