"""The third kernel of a selecting step: it finds the threshold, the ranking of the last chosen position.

A position is chosen if it ranks above the threshold, or at the threshold and lies at `limit` or before. These two
numbers are the whole choice of a batch row and key/value head; `_attend_to_chosen` needs no list.

A sample of the rankings brackets the threshold. The positions ranked within the brackets are the *candidates*, some
hundreds or thousands. The programs that share the row list them, in any order, and count those above; the program that
arrives last resolves the threshold among the candidates by bisection. If the sample has misled, it searches the whole
row. These are the ideas of `refreshkv.ops.selection.top_k`, for a choice that needs no list of what is above.

Shapes: `B` batch rows, `Hkv` key/value heads, `L` tokens the cache has room for, `C` candidates.
"""

import triton
import triton.language as tl

from refreshkv.ops.selection.top_k import HIGHEST, bracket_of_sample
from refreshkv.ops.step.selecting.shares import sampled, share
from refreshkv.ops.tiles import BUDGET, PADDING, ROW_COLUMNS

FEWEST_CANDIDATES, MOST_CANDIDATES = 1024, 16384
"""Bounds of the room for candidates; if a row has more, the threshold is searched in the whole row."""

FEW = 2048
"""Candidates that are resolved in a small tile."""

MARGIN = 4.5
"""Standard deviations of the sample's count from the threshold to each bracket."""

BITS = 16
"""Upper bits of a ranking to which the brackets are found."""

SEARCHED = 4096
"""Positions taken at once where the whole row is searched."""

LISTED, ABOVE, ARRIVED, COUNTERS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""Columns of the counters (B, Hkv, 3): candidates, positions above them, and programs that have counted theirs."""

THRESHOLD, LIMIT, CHOICE_COLUMNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Columns of a choice (B, Hkv, 2): the threshold, and the last position chosen of those that rank at it."""


@triton.jit
def _find_threshold(
    row_ptr, selecting_ptr, ranking_ptr, sample_ptr, counter_ptr, candidate_ptr, choice_ptr, kv_heads, room, margin,
    STRETCH: tl.constexpr, SAMPLES: tl.constexpr, BITS: tl.constexpr, CANDIDATES: tl.constexpr, FEW: tl.constexpr,
    BLOCK: tl.constexpr, SEARCHED: tl.constexpr,
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
        choice = choice_ptr + CHOICE_COLUMNS * pair
        if budget >= position + 1 - padding:
            tl.store(choice + THRESHOLD, -1)
            tl.store(choice + LIMIT, position)
        else:
            rankings = ranking_ptr + pair.to(tl.int64) * room
            candidates = candidate_ptr + pair.to(tl.int64) * (2 * CANDIDATES)
            counters = counter_ptr + COUNTERS * pair
            samples = sample_ptr + pair * SAMPLES
            low, high = _bracket(samples, padding, position, budget, margin, STRETCH, SAMPLES, BITS)
            begin, end = share(padding, position + 1, part, parts)
            _list_candidates(rankings, begin, end, padding, low, high, counters, candidates, CANDIDATES, BLOCK)
            tl.debug_barrier()  # what all threads have written is there before the program counts as arrived
            if tl.atomic_add(counters + ARRIVED, 1, sem="acq_rel") == parts - 1:
                within = tl.load(counters + LISTED, cache_modifier=".cg")
                keep = budget - tl.load(counters + ABOVE, cache_modifier=".cg")
                threshold, limit = high - 1, padding - 1  # those above are all
                if (keep < 0) | (keep > within) | (within > CANDIDATES):
                    threshold, limit = _search(
                        rankings, padding, position, budget, keep * 0, keep * 0 + HIGHEST, SEARCHED
                    )
                elif (keep > 0) & (within <= FEW):
                    threshold, limit = _resolve(candidates, within, keep, low, high, position, CANDIDATES, FEW)
                elif keep > 0:
                    threshold, limit = _resolve(candidates, within, keep, low, high, position, CANDIDATES, CANDIDATES)
                tl.store(choice + THRESHOLD, threshold)
                tl.store(choice + LIMIT, limit)


@triton.jit
def _bracket(
    samples, first, last, budget, margin, STRETCH: tl.constexpr, SAMPLES: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """`low, high`: the `budget`-th highest ranking of `first .. last` is almost surely in `low .. high - 1`."""
    number = tl.arange(0, SAMPLES)
    token = sampled(number, STRETCH)
    exists = (token >= first) & (token <= last)
    # [SAMPLES]
    ranking = tl.load(samples + number, mask=exists, other=-1)
    drawn = tl.sum(exists.to(tl.int32), 0)
    share = budget.to(tl.float32) / (last + 1 - first)
    expected = share * drawn
    spread = expected * 0.0 if STRETCH == 1 else margin * tl.sqrt(expected * (1.0 - share))
    return bracket_of_sample(ranking, drawn, expected, spread, BITS)


@triton.jit
def _list_candidates(
    rankings, begin, end, first, low, high, counters, candidates, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Lists the positions `begin .. end - 1`, from `first` on, that rank in `low .. high - 1`, as far as there is room,
    and counts them and those above."""
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        # [BLOCK]
        ranking = tl.load(rankings + token, mask=(token >= first) & (token < end), other=-1)
        is_near = (ranking >= low) & (ranking < high)
        above += (ranking >= high).to(tl.int32)
        slot = tl.atomic_add(counters + LISTED + token * 0, 1, mask=is_near, sem="relaxed")
        fits = is_near & (slot < CANDIDATES)
        tl.store(candidates + slot, token, mask=fits)
        tl.store(candidates + CANDIDATES + slot, ranking, mask=fits)
    tl.atomic_add(counters + ABOVE, tl.sum(above, 0), sem="relaxed")


@triton.jit
def _resolve(candidates, count, keep, low, high, last, CANDIDATES: tl.constexpr, TAKEN: tl.constexpr):
    """The threshold, in `low .. high - 1`, and its limit, at most `last`, that leave the `keep` best of `count`
    candidates, TAKEN at most, which are listed in any order where there is room for CANDIDATES."""
    entry = tl.arange(0, TAKEN)
    # [TAKEN] twice
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
    """Room for the candidates of a row, of which mostly a fourteenth of its positions are."""
    return max(FEWEST_CANDIDATES, min(MOST_CANDIDATES, triton.next_power_of_2(capacity // 9)))


def warps_of(candidates: int) -> int:
    """Warps of a program of `_find_threshold` that holds so many candidates at once."""
    return 4 if candidates <= 2048 else 8
