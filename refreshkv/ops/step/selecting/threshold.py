"""The third kernel of a selecting step: it finds the threshold, the ranking of the last chosen position.

A position is chosen if it ranks above the threshold, or at the threshold and lies at `limit` or before. These two
numbers are the whole choice of a batch row and key/value head; `_attend_to_chosen` needs no list.

The histogram of the rankings says which bin holds the threshold. The positions in that bin are the *candidates*. The
programs that share the row list them; the program that arrives last resolves the threshold among them by bisection, or,
if the list has no room for all, by bisection over the whole row.

Shapes: `B` batch rows, `Hkv` key/value heads, `L` tokens the cache has room for, `C` candidates.
"""

import triton
import triton.language as tl

from refreshkv.ops.selection.top_k import HIGHEST
from refreshkv.ops.step.selecting.bins import bounds_of_bin, top_bin
from refreshkv.ops.step.selecting.shares import place_in_list, share
from refreshkv.ops.tiles import BUDGET, PADDING, ROW_COLUMNS

FEWEST_CANDIDATES, MOST_CANDIDATES = 1024, 8192
"""Bounds of the room for candidates; if a row has more, the threshold is searched in the whole row."""

SEARCHED = 4096
"""Positions taken at once where the whole row is searched."""

LISTED, ARRIVED, COUNTERS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Columns of the counters (B, Hkv, 2): candidates listed, and programs that have listed theirs."""

THRESHOLD, LIMIT, CHOICE_COLUMNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Columns of a choice (B, Hkv, 2): the threshold, and the last position chosen of those that rank at it."""


@triton.jit
def _find_threshold(
    row_ptr, selecting_ptr, ranking_ptr, histogram_ptr, counter_ptr, candidate_ptr, choice_ptr, kv_heads, room, reach,
    BINS: tl.constexpr, FINE: tl.constexpr, BIN_BITS: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
    SEARCHED: tl.constexpr,
):  # fmt: skip
    """Finds the choice of one batch row and key/value head, (B, Hkv, 2) int32: its threshold and limit.

    The candidates are written by several programs, so the last one reads them past its L1 cache.
    """
    part, pair = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    batch = (pair // kv_heads).to(tl.int64)
    position = tl.load(selecting_ptr + batch)
    if position >= 0:
        budget = tl.load(row_ptr + batch * ROW_COLUMNS + BUDGET).to(tl.int32)
        padding = tl.load(row_ptr + batch * ROW_COLUMNS + PADDING).to(tl.int32)
        if budget >= position + 1 - padding:
            tl.store(choice_ptr + CHOICE_COLUMNS * pair + THRESHOLD, -1)
            tl.store(choice_ptr + CHOICE_COLUMNS * pair + LIMIT, position)
        else:
            rankings = ranking_ptr + pair.to(tl.int64) * room
            candidates = candidate_ptr + pair.to(tl.int64) * (2 * CANDIDATES)
            begin, end = share(padding, position + 1, part, parts)
            line = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
            # [BLOCK / 4, 4]: on its way while the histogram is read
            ranking = tl.load(rankings + begin + line, mask=begin + line < end, other=-1)
            number = tl.arange(0, BINS)
            # [BINS], the highest bin first: how many positions are in it or above
            reached = tl.cumsum(tl.load(histogram_ptr + pair * BINS + BINS - 1 - number), 0)
            # the last bin that too few positions reach, and how many do, in one number: one reduction
            last_above = tl.max(tl.where(reached < budget, ((number + 1).to(tl.int64) << 32) + reached, 0), 0)
            bins_above, above = (last_above >> 32).to(tl.int32), last_above.to(tl.int32)
            top = top_bin(reach, budget, BIN_BITS)
            low, high = bounds_of_bin(BINS - 1 - bins_above, top, BINS, FINE, BIN_BITS)
            for start in range(begin, end, BLOCK):
                token = start + line
                is_near = (ranking >= low) & (ranking < high) & (token >= padding)
                # [BLOCK / 4, 4]: the next ones
                following = tl.load(rankings + token + BLOCK, mask=token + BLOCK < end, other=-1)
                slot, count = place_in_list(is_near)
                slot += tl.atomic_add(counter_ptr + COUNTERS * pair + LISTED, count, sem="relaxed")
                is_near = is_near & (slot < CANDIDATES)
                tl.store(candidates + slot, token, mask=is_near)
                tl.store(candidates + CANDIDATES + slot, ranking, mask=is_near)
                ranking = following
            tl.debug_barrier()  # what all threads have written is there before the program counts as arrived
            if tl.atomic_add(counter_ptr + COUNTERS * pair + ARRIVED, 1, sem="acq_rel") == parts - 1:
                threshold, limit = low, position
                within = tl.load(histogram_ptr + pair * BINS + BINS - 1 - bins_above)
                if within <= CANDIDATES:
                    threshold, limit = _resolve(candidates, within, budget - above, low, high, position, CANDIDATES)
                else:
                    threshold, limit = _search(rankings, padding, position, budget, low, high, SEARCHED)
                tl.store(choice_ptr + CHOICE_COLUMNS * pair + THRESHOLD, threshold)
                tl.store(choice_ptr + CHOICE_COLUMNS * pair + LIMIT, limit)


@triton.jit
def _resolve(candidates, count, keep, low, high, last, CANDIDATES: tl.constexpr):
    """The threshold, in `low .. high - 1`, and its limit, at most `last`, that leave the `keep` best of `count`
    candidates, which are listed in any order."""
    entry = tl.arange(0, CANDIDATES)
    # [CANDIDATES] twice
    token = tl.load(candidates + entry, mask=entry < count, other=0, cache_modifier=".cg")
    ranking = tl.load(candidates + CANDIDATES + entry, mask=entry < count, other=-1, cache_modifier=".cg")
    reached, limit = count, last
    while (high - low > 1) & (reached != keep):
        # two pivots at once, their counts in the halves of one integer: a pass takes as long as its reduction
        third = tl.maximum((high - low) // 3, 1)
        first, second = low + third, low + 2 * third
        counts = tl.sum((ranking >= first).to(tl.int32) + ((ranking >= second).to(tl.int32) << 16), 0)
        lower, upper = counts & 0xFFFF, counts >> 16
        passed = (lower >= keep).to(tl.int32) + (upper >= keep).to(tl.int32)
        high = tl.where(passed < 2, tl.minimum(low + (passed + 1) * third, high), high)
        low += passed * third
        reached = tl.where(passed == 0, reached, tl.where(passed == 1, lower, upper))
    if reached != keep:
        ties = keep - tl.sum((ranking > low).to(tl.int32), 0)
        limit = tl.max(tl.where(ranking == low, token, -1), 0)
        token = tl.where(ranking == low, token, HIGHEST)
        before = tl.min(token, 0) - 1  # tied positions are mostly neighbours
        while limit - before > 1:
            middle = before + (limit - before) // 2
            enough = tl.sum((token <= middle).to(tl.int32), 0) >= ties
            before = tl.where(enough, before, middle)
            limit = tl.where(enough, middle, limit)
    return low, limit


@triton.jit
def _search(rankings, first, last, budget, low, high, BLOCK: tl.constexpr):
    """As `_resolve`, for the `budget` best of positions `first .. last`, which are read once for each bit."""
    count = budget * 0 - 1
    while (high - low > 1) & (count != budget):
        middle = low + (high - low) // 2
        reach, _ = _count(rankings, first, last, middle, last, BLOCK)
        low = tl.where(reach >= budget, middle, low)
        count = tl.where(reach >= budget, reach, count)
        high = tl.where(reach >= budget, high, middle)
    limit = last
    if count != budget:
        # the lowest position up to which enough tied positions lie
        above, _ = _count(rankings, first, last, low + 1, last, BLOCK)
        before = first - 1
        while limit - before > 1:
            middle = before + (limit - before) // 2
            _, tied = _count(rankings, first, last, low, middle, BLOCK)
            before = tl.where(above + tied >= budget, before, middle)
            limit = tl.where(above + tied >= budget, middle, limit)
    return low, limit


@triton.jit
def _count(rankings, first, last, threshold, limit, BLOCK: tl.constexpr):
    """How many of positions `first .. last` rank at `threshold` or above, and how many up to `limit` rank at it."""
    reach, tied = first * 0, first * 0
    for start in range(first // 16 * 16, last + 1, BLOCK):
        token = start + tl.arange(0, BLOCK)
        # [BLOCK]
        ranking = tl.load(rankings + token, mask=(token >= first) & (token <= last), other=-1, cache_modifier=".cg")
        reach += tl.sum((ranking >= threshold).to(tl.int32), 0)
        tied += tl.sum(((ranking == threshold) & (token <= limit)).to(tl.int32), 0)
    return reach, tied


def candidates_of(capacity: int) -> int:
    """Room for the candidates of a row: about twice as many as there are where logits are distributed normally."""
    return max(FEWEST_CANDIDATES, min(MOST_CANDIDATES, triton.next_power_of_2(capacity // 16)))


def warps_of(candidates: int) -> int:
    """Warps of a program of `_find_threshold` that holds so many candidates at once."""
    return 4 if candidates <= 2048 else 8
