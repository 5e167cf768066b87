"""The K highest rankings of one row, exactly, in few passes over memory: what training and decoding select with.

A ranking is an integer of 31 bits, the higher the better; equal ones go to the lower position. The K-th highest is the
*threshold*. Four ideas, in this order:

1. `bracket`: a sample of the row gives `low <= threshold < high`, almost surely, with few rankings in between.
2. `collect`: one pass over the row. Positions *above*, ranked `high` or more, are chosen. *Candidates*, ranked
   `low .. high - 1`, are listed.
3. `resolve`: the threshold is found among the candidates, and the best of them complete the choice.
4. `search`: where the sample misled (too many above, too few in all, or more candidates than the list holds), the
   threshold is found by bisection over the whole row, one *pivot* a pass.

OWN and AHEAD are the choice of a selecting step and the pooling of `pool_ahead` (specification, section 10).

Training launches 1, 2 and 3 one by one, one program for a full step, and pools its rankings from scores on the fly
(POOL > 0). Decoding does all in one launch, reads stored rankings (POOL = 0), and may share a row among several
programs.

A list of N entries is two arrays in memory, N tokens, then their N rankings, both int32; in training, whose tokens are
stored anew when they are in order, it is one array of int64, which takes half the stores. A kernel that ranks must be
compiled without fused multiply-add: see `SAME_IN_ALL_THREADS` in `refreshkv/ops/tiles.py`.
"""

import math

import triton
import triton.language as tl

HIGHEST = tl.constexpr(0x7FFFFFFF)
"""Above every ranking and every token."""

PREFERRED = tl.constexpr(1 << 30)
"""Added to the rankings of the recent window and of the sinks: above the bits of every probability."""

FIRST = tl.constexpr(0x7FFFFFFE)
"""The ranking of a selecting step's own position: above every other."""

BEYOND = tl.constexpr(0x7FFFFFFFFFFFFFFF)
"""Above every entry."""

SHORT_ROW = 2**15
"""Rows up to this long need no more than the least sample."""

LARGEST_SAMPLE = 2**14
"""`bracket` packs two counts of the sample into the halves of 32 bits."""


def sample_size(length: int, width: int, least: int, candidates: int, margin: float) -> int:
    """Positions of a row to sample, so that the brackets, `margin` standard deviations to either side of the threshold,
    mostly hold fewer than `candidates` rankings.

    length: of the row; width: how many are selected; least: the sample of a short row.
    """
    if length <= SHORT_ROW:
        return least
    share = min(width / length, 0.5)
    wanted = share * (1 - share) * (2 * margin * length / (0.6 * candidates)) ** 2
    return min(max(least, triton.next_power_of_2(math.ceil(wanted))), LARGEST_SAMPLE)


@triton.jit
def entry_of(ranking, token):
    """An int64 that orders by ranking, then by the lower position; all entries of a row differ."""
    return (ranking.to(tl.int64) << 32) + (token ^ HIGHEST)  # the same as HIGHEST - token


@triton.jit
def token_of(entry):
    """The token of an entry."""
    return ((entry & HIGHEST) ^ HIGHEST).to(tl.int32)


@triton.jit
def ranking_of(entry):
    """The ranking of an entry."""
    return (entry >> 32).to(tl.int32)


@triton.jit
def store_entries(tokens, rankings, slot, token, ranking, mask):
    """Stores entries in some slots of a list. rankings: None if `tokens` points to a list of int64."""
    if rankings is None:
        tl.store(tokens + slot, entry_of(ranking, token), mask=mask)
    else:
        tl.store(tokens + slot, token, mask=mask)
        tl.store(rankings + slot, ranking, mask=mask)


@triton.jit
def pooled_rankings(
    scores, token, first, last, recent, sinks,
    POOL: tl.constexpr, AHEAD: tl.constexpr, OWN: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Rankings of tokens from scores, the positions `first .. last` of a row: a float32 >= 0 orders like its own bits,
    and the recent window and the sinks come first; with OWN the last position comes before them.

    Windows of POOL positions are centred or, if AHEAD, end at the token. INSIDE: all neighbours exist; else positions
    are clamped to the row, whose ends are then pooled twice, to no effect.
    """
    BEFORE: tl.constexpr = POOL - 1 if AHEAD else POOL // 2
    pooled = tl.zeros(token.shape, tl.float32)
    pointer = scores + token
    for away in tl.static_range(-BEFORE, POOL - BEFORE):
        if INSIDE:
            near = pointer + away
        else:
            near = scores + tl.minimum(tl.maximum(token + away, first), last)
        # as token
        pooled = tl.maximum(pooled, tl.load(near))
    preferred = (token > last - recent) | (token - first < sinks)
    ranking = pooled.to(tl.int32, bitcast=True) + tl.where(preferred, PREFERRED, 0)
    if OWN:
        ranking = tl.where(token == last, FIRST, ranking)
    return ranking


@triton.jit
def block_rankings(
    source, start, first, last, recent, sinks,
    POOL: tl.constexpr, AHEAD: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens from `start` on and their rankings, -1 outside `first .. last`. source: scores, or with POOL = 0 the
    rankings themselves."""
    token = start + tl.arange(0, BLOCK)
    if POOL == 0:
        # [BLOCK]
        ranking = tl.load(source + token, mask=(token >= first) & (token <= last), other=-1)
    else:
        if (start >= first + POOL - 1) & (start + BLOCK + POOL - 1 <= last + 1):
            ranking = pooled_rankings(source, token, first, last, recent, sinks, POOL, AHEAD, OWN, True)
        else:
            ranking = pooled_rankings(source, token, first, last, recent, sinks, POOL, AHEAD, OWN, False)
            ranking = tl.where((token >= first) & (token <= last), ranking, -1)
    return token, ranking


@triton.jit
def bracket(
    source, first, last, keep, margin, recent, sinks, POOL: tl.constexpr, SAMPLE: tl.constexpr, BITS: tl.constexpr,
    AHEAD: tl.constexpr = False, OWN: tl.constexpr = False,
):  # fmt: skip
    """`low, high`: the `keep`-th highest ranking of `first .. last` is almost surely in `low .. high - 1`.

    The sample is one position out of each of SAMPLE equal stretches; the brackets lie `margin` standard deviations of
    its count to either side, and are found to BITS of 31 bits.
    """
    count = last + 1 - first
    drawn = tl.minimum(count, SAMPLE)
    number = tl.arange(0, SAMPLE)
    stretch = tl.maximum(count // SAMPLE, 1)
    token = (number.to(tl.int64) * count // drawn).to(tl.int32) + ((number * 40503) >> 8) % stretch
    token = first + tl.minimum(token, count - 1)
    if POOL == 0:
        # [SAMPLE]
        ranking = tl.load(source + token, mask=number < drawn, other=-1)
    else:
        ranking = pooled_rankings(source, token, first, last, recent, sinks, POOL, AHEAD, OWN, False)
        ranking = tl.where(number < drawn, ranking, -1)
    share = keep.to(tl.float32) / count
    expected = share * drawn
    spread = tl.where(count > SAMPLE, margin * tl.sqrt(expected * (1.0 - share)), 0.0)
    few, many = (expected - spread).to(tl.int32) - 1, (expected + spread).to(tl.int32) + 2
    low, high = keep * 0, keep * 0
    for digit in range(BITS):
        bit = 1 << (30 - digit)
        # two searches at once, their counts in the halves of one integer
        reached = (ranking >= low + bit).to(tl.int32) + ((ranking >= high + bit).to(tl.int32) << 16)
        reached = tl.sum(reached, 0)
        low = tl.where((reached & 0xFFFF) >= many, low + bit, low)
        high = tl.where((reached >> 16) >= few, high + bit, high)
    low = tl.where(many <= drawn, low, 0)
    high = tl.where(few > 0, high + (1 << (31 - BITS)), HIGHEST)
    return low, high


@triton.jit
def collect(
    source, first, last, recent, sinks, low, high, ties, keep, tokens, rankings, candidates,
    POOL: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr = False,
    OWN: tl.constexpr = False,
):  # fmt: skip
    """Positions ranked `high` or more go to the first of `keep` slots of `tokens` and `rankings`, in order; those in
    `low .. high - 1` are listed in `candidates`, in order, as far as there is room. Returns how many are above, and how
    many candidates there are.

    ties: so many of the candidates go to the last slots instead; None: none of them. rankings: None if the lists are of
    int64.
    """
    above, between = keep * 0, keep * 0
    for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
        token, ranking = block_rankings(source, start, first, last, recent, sinks, POOL, AHEAD, OWN, BLOCK)
        is_above, is_between = ranking >= high, (ranking >= low) & (ranking < high)
        both = is_above.to(tl.int32) + (is_between.to(tl.int32) << 16)  # in one scan: a block has less than 2^16
        order = tl.cumsum(both, 0) - both
        nth = between + (order >> 16)
        is_chosen, slot = is_above, above + (order & 0xFFFF)
        if ties is not None:
            is_chosen = is_above | (is_between & (nth < ties))
            slot = tl.where(is_above, slot, keep - ties + nth)
        is_chosen = is_chosen & (slot < keep)
        store_entries(tokens, rankings, slot, token, ranking, is_chosen)
        is_listed = is_between & (nth < CANDIDATES)
        if rankings is None:
            store_entries(candidates, None, nth, token, ranking, is_listed)
        else:
            store_entries(candidates, candidates + CANDIDATES, nth, token, ranking, is_listed)
        total = tl.sum(both, 0)
        above += total & 0xFFFF
        between += total >> 16
    return above, between


@triton.jit
def can_resolve(above, between, keep, CANDIDATES: tl.constexpr):
    """True if the candidates complete the choice, and are all listed."""
    return (above <= keep) & (above + between >= keep) & (between <= CANDIDATES)


@triton.jit
def threshold_of(values, wanted, low, high, reached):
    """The highest threshold in `low .. high - 1` that at least `wanted` of the values reach, or a lower one that
    exactly as many reach. `reached` values, at least `wanted`, reach low; fewer reach high."""
    while (high - low > 1) & (reached != wanted):
        pivot = low + (high - low) // 2
        count = tl.sum((values >= pivot).to(tl.int32), 0)
        low = tl.where(count >= wanted, pivot, low)
        reached = tl.where(count >= wanted, count, reached)
        high = tl.where(count >= wanted, high, pivot)
    return low


@triton.jit
def store_lowest(entry, count, tokens, rankings, end):
    """Stores the `count` lowest entries in the slots before `end`, the lowest last; returns the highest of them, or -1.
    Entries that are none are BEYOND. rankings: None if nobody needs them."""
    reached = tl.full([], -1, tl.int64)
    for nth in range(count):
        reached = tl.min(tl.where(entry > reached, entry, BEYOND), 0)
        tl.store(tokens + end - 1 - nth, token_of(reached))
        if rankings is not None:
            tl.store(rankings + end - 1 - nth, ranking_of(reached))
    return reached


@triton.jit
def resolve(token, ranking, exists, between, above, keep, low, high, tokens, rankings, tail):
    """Puts the best candidates behind the `above` positions that are chosen already, up to `keep` of them, which are
    more. The `tail` lowest come last, in order of rank, if the candidates are as many. Returns how many are in order.

    token, ranking, exists: the `between` candidates in order of position; tail: None, like 0, needs no order.
    """
    missing = keep - above
    threshold = threshold_of(tl.where(exists, ranking, -1), missing, low, high, between)
    higher, tied = exists & (ranking > threshold), exists & (ranking == threshold)
    ties = missing - tl.sum(higher.to(tl.int32), 0)  # of which the first ones are in
    taken = higher | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= ties))
    ordered = keep * 0
    if tail is not None:
        ordered = tl.where(tail <= missing, tail, 0)
        entry = tl.where(taken, entry_of(ranking, token), BEYOND)
        taken = taken & (entry > store_lowest(entry, ordered, tokens, rankings, keep))
    slot = above + tl.cumsum(taken.to(tl.int32), 0) - 1
    store_entries(tokens, rankings, slot, token, ranking, taken)
    return ordered


@triton.jit
def count_reaching(
    source, first, last, recent, sinks, pivot,
    POOL: tl.constexpr, AHEAD: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of the positions `first .. last` are ranked `pivot`, which is positive, or more."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
        _, ranking = block_rankings(source, start, first, last, recent, sinks, POOL, AHEAD, OWN, BLOCK)
        count += (ranking >= pivot).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def search(
    source, first, last, recent, sinks, low, high, above, between, keep, tokens, rankings, candidates,
    POOL: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr = False,
    OWN: tl.constexpr = False,
):  # fmt: skip
    """The whole choice, by bisection over the row, where the candidates cannot be resolved. low, high, above, between:
    what `bracket` and `collect` returned; the brackets are used if the threshold is between them."""
    is_between = (above < keep) & (above + between >= keep)
    low, high = tl.where(is_between, low, 0), tl.where(is_between, high, HIGHEST)
    reached = keep * 0 - 1
    while (high - low > 1) & (reached != keep):
        pivot = low + (high - low) // 2
        count = count_reaching(source, first, last, recent, sinks, pivot, POOL, AHEAD, OWN, BLOCK)
        low = tl.where(count >= keep, pivot, low)
        reached = tl.where(count >= keep, count, reached)
        high = tl.where(count >= keep, high, pivot)
    higher = count_reaching(source, first, last, recent, sinks, low + 1, POOL, AHEAD, OWN, BLOCK)
    collect(
        source, first, last, recent, sinks, low, low + 1, keep - higher, keep, tokens, rankings, candidates,
        POOL, CANDIDATES, BLOCK, AHEAD, OWN,
    )  # fmt: skip
