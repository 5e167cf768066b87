"""The threshold of a selecting step: the ranking of the last chosen position.

A position is chosen if it ranks above the threshold, or at the threshold and lies at `limit` or before. These two
numbers are the whole choice of a batch row and key/value head.

The first histogram of the rankings says which bin holds the threshold (`find_bin`); the positions in that bin are the
*candidates*. The second one, of the candidates, says which part of the bin holds it (`find_part`); those in that part
are the *finalists*. The programs that share the row list them; each then finds the same threshold among them
(`resolve_few`, or `resolve` where they are many) or, if the list has no room for all, in the whole row (`search`).

Shapes: `B` batch rows, `Hkv` key/value heads, `F` finalists.
"""

import triton
import triton.language as tl

from refreshkv.ops.selection.top_k import HIGHEST
from refreshkv.ops.step.selecting.bins import bounds_of_bin, top_bin

MOST_FINALISTS = 512
"""Room for the finalists; if a row has more, the threshold is searched in the whole row."""

FEW_FINALISTS = 64
"""So many finalists are compared with each other at once."""

SEARCHED = 4096
"""Positions taken at once where the whole row is searched."""

RANKED, COUNTED, FINALISTS, LISTED, ATTENDED = (tl.constexpr(number) for number in range(5))
"""Columns of the counters of a row: programs that have ranked their share, programs that have counted their candidates,
finalists that have a place in the list, programs that have listed theirs, and programs that have attended."""

COUNTERS = tl.constexpr(8)
"""Columns, some of them free, because Triton's ranges have powers of two."""

THRESHOLD, LIMIT, CHOICE_COLUMNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Columns of a choice (B, Hkv, 2): the threshold, and the last position chosen of those that rank at it."""


@triton.jit
def find_bin(
    histogram, budget, count, reach, BINS: tl.constexpr, FINE: tl.constexpr, COARSE_BITS: tl.constexpr,
    BIN_BITS: tl.constexpr,
):  # fmt: skip
    """`low, high, above, within`: the threshold of a row of `count` positions is in `low .. high - 1`; so many
    positions rank above, and so many there. All are above if the budget takes them all."""
    bins_above, above, within = _last_bin(histogram, budget, count, BINS)
    low, high = bounds_of_bin(
        BINS - 1 - bins_above, top_bin(reach, budget, BIN_BITS), BINS, FINE, COARSE_BITS, BIN_BITS
    )
    if budget >= count:
        low, high, above, within = low * 0, high * 0, count, within * 0
    return low, high, above, within


@triton.jit
def find_part(histogram, budget, low, high, above, within, BINS: tl.constexpr):
    """As `find_bin`, from what that returns and the second histogram: one of BINS parts of the bin."""
    if within > 0:
        parts_above, more, within = _last_bin(histogram, budget - above, within, BINS)
        above += more
        size = 1 << _part_bits(low, high, BINS)
        low += (BINS - 1 - parts_above) * size
        high = low + tl.minimum(size, high - low)  # int32 may not hold low + size
    return low, high, above, within


@triton.jit
def part_of(ranking, low, high, BINS: tl.constexpr):
    """Maps rankings in `low .. high - 1` to the parts that `find_part` finds."""
    return (ranking - low) >> _part_bits(low, high, BINS)


@triton.jit
def _part_bits(low, high, BINS: tl.constexpr):
    """The exponent of the size of a part: the least power of two of which BINS hold `low .. high - 1`."""
    size = tl.cdiv(high - low, BINS)
    bits = (size.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # the exponent of a float32
    return bits + tl.where((1 << bits) < size, 1, 0)


@triton.jit
def _last_bin(histogram, wanted, total, BINS: tl.constexpr):
    """How many bins lie above the one that holds the `wanted`-th best of `total` positions, how many of these are in
    those, and how many in that one. The lowest bin may count more than there are."""
    number = tl.arange(0, BINS)
    # [BINS], the highest bin first: other programs have added to it
    counts = tl.load(histogram + BINS - 1 - number, cache_modifier=".cg")
    # how many positions are in it or above
    reached = tl.cumsum(counts, 0)
    # the last bin that too few positions reach, and how many do, in one number: one reduction
    last_above = tl.max(tl.where(reached < wanted, ((number + 1).to(tl.int64) << 32) + reached, 0), 0)
    bins_above, above = (last_above >> 32).to(tl.int32), last_above.to(tl.int32)
    within = tl.sum(tl.where(number == bins_above, counts, 0), 0)
    return bins_above, above, tl.where(bins_above == BINS - 1, total - above, within)


@triton.jit
def resolve_few(finalists, count, keep, MOST: tl.constexpr, FEW: tl.constexpr):
    """The ranking and the position of the `keep`-th best of `count` finalists, FEW at most, which are listed in any
    order: the threshold and its limit."""
    entry = tl.arange(0, FEW)
    # [FEW] twice: other programs have written some of them
    ranking = tl.load(finalists + MOST + entry, mask=entry < count, other=-1, cache_modifier=".cg")
    token = tl.load(finalists + entry, mask=entry < count, other=0, cache_modifier=".cg")
    ties_before = (ranking[None, :] == ranking[:, None]) & (token[None, :] < token[:, None])
    better = tl.sum(((ranking[None, :] > ranking[:, None]) | ties_before).to(tl.int32), 1)
    # the one that has so many better ones, as one number: one reduction
    last = tl.max(tl.where((better == keep - 1) & (entry < count), (ranking.to(tl.int64) << 32) + token, 0), 0)
    return (last >> 32).to(tl.int32), last.to(tl.int32)


@triton.jit
def resolve(finalists, count, keep, low, high, last, MOST: tl.constexpr):
    """The threshold, in `low .. high - 1`, and its limit, at most `last`, that leave the `keep` best of `count`
    finalists, which are listed in any order."""
    entry = tl.arange(0, MOST)
    # [MOST]: other programs have written some of them
    ranking = tl.load(finalists + MOST + entry, mask=entry < count, other=-1, cache_modifier=".cg")
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
        # [MOST]
        token = tl.load(finalists + entry, mask=entry < count, other=0, cache_modifier=".cg")
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
def search(rankings, first, last, budget, low, high, BLOCK: tl.constexpr):
    """As `resolve`, for the `budget` best of positions `first .. last`, which are read once for each bit."""
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
