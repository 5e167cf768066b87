"""The Triton kernel for the selection of a decoding step; programs of rows whose step is partial end at once.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `L` tokens the cache has
room for, `W` slots of a selection, `N` splits, `O` observing queries.
"""

import triton
import triton.language as tl

from refreshkv.ops.step.attention import _left
from refreshkv.ops.tiles import sample_size

SAMPLE = 2048
"""Rankings of a row from which the cut is guessed, at least."""

MARGIN = 3.5
"""How far from the guess the cut may be, in standard deviations of the sample's count."""

DOUBTS = 2048
"""Most positions that may be in doubt after the guess; with more, the whole row is searched. Long rows have more."""

BLOCK = 4096
"""Entries of a row taken at once."""

MOST_PARTS = 16
"""Most programs that share a row."""

PROGRAMS = 256
"""Programs of a selection that a GPU runs at once."""

WARPS = 16


def parts_of(pairs: int, capacity: int) -> int:
    """Programs for each of so many pairs of rows and key/value heads: a power of two, as long as each has some work."""
    parts = 1
    while 2 * parts <= min(MOST_PARTS, PROGRAMS // pairs, capacity // BLOCK * 2):
        parts *= 2
    return parts


def sizes_of(capacity: int, width: int, parts: int) -> dict[str, int]:
    """The sample, the room for those in doubt, and what is taken at once, for rows of up to `capacity` tokens of which
    `width` are selected."""
    doubts = DOUBTS
    while capacity > 24 * doubts and doubts < 8 * DOUBTS:
        doubts *= 2
    sample = sample_size(capacity, width, SAMPLE, doubts, MARGIN)
    return {"SAMPLE": sample, "DOUBTS": doubts, "BLOCK": BLOCK // min(2, parts), "PARTS": parts}


@triton.jit
def _kth(values, k, low, high):
    """The highest `cut` in `low .. high-1` with at least k values >= cut (at least k are >= low, fewer >= high), or a
    lower one that as many values reach; and how many do."""
    reached = tl.sum((values >= low).to(tl.int32), 0)
    while (high - low > 1) & (reached != k):
        middle = low + (high - low) // 2
        count = tl.sum((values >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        reached = tl.where(count >= k, count, reached)
        high = tl.where(count >= k, high, middle)
    return low, reached


@triton.jit
def _guess(rankings, first, count, keep, margin, SAMPLE: tl.constexpr):
    """Bounds of the cut from a sample: the `keep`-th highest ranking is likely in `low .. high-1`.

    Two searches at once, over the upper 15 of 31 bits, their counts packed in one integer.
    """
    number = tl.arange(0, SAMPLE)
    drawn = tl.minimum(count, SAMPLE)
    index = first + (number.to(tl.int64) * count // drawn).to(tl.int32)
    sample = tl.load(rankings + index, mask=number < drawn, other=-1)
    share = keep.to(tl.float32) / count.to(tl.float32)
    expected = share * drawn.to(tl.float32)
    doubt = margin * tl.sqrt(expected * (1.0 - share)) + 2.0
    below = tl.minimum((expected + doubt).to(tl.int32) + 1, drawn)  # so many of the sample are surely >= low
    above = (expected - doubt).to(tl.int32)
    low, high = keep * 0, keep * 0
    for step in range(15):
        bit = 1 << (30 - step)
        reached = (sample >= low + bit).to(tl.int32) + ((sample >= high + bit).to(tl.int32) << 16)
        reached = tl.sum(reached, 0)
        low = tl.where((reached & 0xFFFF) >= below, low + bit, low)
        high = tl.where((reached >> 16) >= tl.maximum(above, 1), high + bit, high)
    low = tl.where(expected + doubt + 1 >= drawn, 0, low)
    high = tl.where(above < 1, 0x7FFFFFFF, high + (1 << 16))
    return low, high


@triton.jit
def _collect(
    rankings, doubts, selected, chosen, first, last, low, high, keep, ties,
    DOUBTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entries ranked `high` or more go into the selection, in order of position; those in `low .. high-1` are listed in
    `doubts`, but for the first `ties`, which go in behind. Returns how many are above, and how many between."""
    above, between = keep * 0, keep * 0
    for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
        token = start + tl.arange(0, BLOCK)
        ranking = tl.load(rankings + token, mask=(token >= first) & (token <= last), other=-1)
        is_above, is_between = ranking >= high, (ranking >= low) & (ranking < high)
        both = is_above.to(tl.int32) + (is_between.to(tl.int32) << 16)  # in one scan: a block has less than 2^16
        order = tl.cumsum(both, 0)
        place = above + (order & 0xFFFF) - 1
        nth = between + (order >> 16) - 1
        goes_in = is_above | (is_between & (nth < ties))
        place = tl.where(is_above, place, keep - ties + nth)
        goes_in = goes_in & (place < keep)
        tl.store(selected + place, token, mask=goes_in)
        tl.store(chosen + place, ranking, mask=goes_in)
        tl.store(doubts + nth, token, mask=is_between & (nth >= ties) & (nth < DOUBTS))
        total = tl.sum(both, 0)
        above += total & 0xFFFF
        between += total >> 16
    return above, between


@triton.jit
def _search(rankings, first, last, keep, low, high, BLOCK: tl.constexpr):
    """`_kth` of the whole row, and how many are higher than the cut."""
    reached = keep * 0 - 1
    while (high - low > 1) & (reached != keep):
        middle = low + (high - low) // 2
        count = keep * 0
        for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
            token = start + tl.arange(0, BLOCK)
            ranking = tl.load(rankings + token, mask=(token >= first) & (token <= last), other=-1)
            count += tl.sum((ranking >= middle).to(tl.int32), 0)
        low = tl.where(count >= keep, middle, low)
        reached = tl.where(count >= keep, count, reached)
        high = tl.where(count >= keep, high, middle)
    above = keep * 0
    for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
        token = start + tl.arange(0, BLOCK)
        ranking = tl.load(rankings + token, mask=(token >= first) & (token <= last), other=-1)
        above += tl.sum((ranking > low).to(tl.int32), 0)
    return low, above


@triton.jit
def _take(token, ranking, exists, selected, chosen, above, keep, low, high, tail):
    """Puts the best of the doubtful entries behind the `above` sure ones, of which there are too few; the `tail` lowest
    come last, in order of rank, if there are so many. Returns how many still have to be put in order."""
    remaining = keep - above
    cut, _ = _kth(tl.where(exists, ranking, -1), remaining, low, high)
    higher, tied = exists & (ranking > cut), exists & (ranking == cut)
    ties = remaining - tl.sum(higher.to(tl.int32), 0)
    taken = higher | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= ties))
    beyond = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    # all entries differ as (ranking, lower position first); each round finds the next one up
    entry = tl.where(taken, (ranking.to(tl.int64) << 32) + (0x7FFFFFFF - token), beyond)
    reached = tl.full([], -1, tl.int64)
    ordered = tl.where(tail <= remaining, tail, 0)
    for nth in range(ordered):
        reached = tl.min(tl.where(entry > reached, entry, beyond), 0)
        tl.store(selected + keep - 1 - nth, (0x7FFFFFFF - (reached & 0x7FFFFFFF)).to(tl.int32))
        tl.store(chosen + keep - 1 - nth, (reached >> 32).to(tl.int32))
    stays = taken & (entry > reached)
    place = above + tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(selected + place, token, mask=stays)
    tl.store(chosen + place, ranking, mask=stays)
    return tail - ordered


@triton.jit
def _choose(
    rankings, doubts, selected, chosen, first, last, keep, tail, margin,
    SAMPLE: tl.constexpr, DOUBTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The `keep` highest rankings of `first .. last`, ties to the lower position: positions and rankings, unsorted but
    for the `tail` lowest. Returns how many of these still have to be put in order."""
    low, high = _guess(rankings, first, last + 1 - first, keep, margin, SAMPLE)
    above, between = _collect(rankings, doubts, selected, chosen, first, last, low, high, keep, 0, DOUBTS, BLOCK)
    tl.debug_barrier()
    if (above <= keep) & (above + between >= keep) & (between <= DOUBTS):
        number = tl.arange(0, DOUBTS)
        token = tl.load(doubts + number, mask=number < between, other=0)
        ranking = tl.load(rankings + token, mask=number < between, other=-1)
        if above < keep:
            tail = _take(token, ranking, number < between, selected, chosen, above, keep, low, high, tail)
    else:
        _choose_by_search(
            rankings, doubts, selected, chosen, first, last, keep, low, high, above, between, DOUBTS, BLOCK
        )
    return tail


@triton.jit
def _choose_by_search(
    rankings, doubts, selected, chosen, first, last, keep, low, high, above, between,
    DOUBTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_choose`, without order, where the guess was wrong or too many are in doubt."""
    within = (above < keep) & (above + between >= keep)
    low, high = tl.where(within, low, 0), tl.where(within, high, 0x7FFFFFFF)
    cut, higher = _search(rankings, first, last, keep, low, high, BLOCK)
    _collect(rankings, doubts, selected, chosen, first, last, cut, cut + 1, keep, keep - higher, DOUBTS, BLOCK)


@triton.jit
def _collect_part(
    rankings, doubts, stage, counts, first, last, keep, part, room, margin,
    SAMPLE: tl.constexpr, DOUBTS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One of PARTS shares of a row's positions: `_collect`, into memory of the part's own. Returns the guess."""
    low, high = _guess(rankings, first, last + 1 - first, keep, margin, SAMPLE)
    base = first // BLOCK * BLOCK
    share = tl.cdiv(tl.cdiv(last + 1 - base, PARTS), BLOCK) * BLOCK
    begin = tl.maximum(first, base + part * share)
    end = tl.minimum(last, base + (part + 1) * share - 1)
    own_stage = stage + part * 2 * room
    above, between = _collect(
        rankings, doubts + part * DOUBTS, own_stage, own_stage + room, begin, end, low, high, room, 0, DOUBTS, BLOCK
    )
    tl.store(counts + 2 * part, above)
    tl.store(counts + 2 * part + 1, between)
    return low, high


@triton.jit
def _find(counts, slot, PARTS: tl.constexpr):
    """Of entries that the parts hold in turn, as many as every other count says: which part has the entry `slot`, and
    how many are in the parts before it."""
    part_of, before = tl.zeros(slot.shape, tl.int32), tl.zeros(slot.shape, tl.int32)
    passed = tl.full([], 0, tl.int32)
    for part in tl.static_range(PARTS):
        passed += tl.load(counts + 2 * part, cache_modifier=".cg")
        part_of += (slot >= passed).to(tl.int32)
        before = tl.where(slot >= passed, passed, before)
    return part_of, before


@triton.jit
def _choose_from_parts(
    rankings, doubts, stage, counts, selected, chosen, first, last, keep, tail, low, high, room,
    DOUBTS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `_choose`, from what all parts have collected; their memory is read past the L1 cache, which others do not
    write to."""
    part = tl.arange(0, PARTS)
    above = tl.sum(tl.load(counts + 2 * part, cache_modifier=".cg"), 0)
    between = tl.sum(tl.load(counts + 2 * part + 1, cache_modifier=".cg"), 0)
    if (above <= keep) & (above + between >= keep) & (between <= DOUBTS):
        for start in range(0, above, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            part_of, before = _find(counts, slot, PARTS)
            place = stage + part_of * 2 * room + slot - before
            token = tl.load(place, mask=slot < above, other=0, cache_modifier=".cg")
            ranking = tl.load(place + room, mask=slot < above, other=0, cache_modifier=".cg")
            tl.store(selected + slot, token, mask=slot < above)
            tl.store(chosen + slot, ranking, mask=slot < above)
        if above < keep:
            number = tl.arange(0, DOUBTS)
            part_of, before = _find(counts + 1, number, PARTS)
            place = doubts + part_of * DOUBTS + number - before
            token = tl.load(place, mask=number < between, other=0, cache_modifier=".cg")
            ranking = tl.load(rankings + token, mask=number < between, other=-1)
            tail = _take(token, ranking, number < between, selected, chosen, above, keep, low, high, tail)
    else:
        _choose_by_search(
            rankings, doubts, selected, chosen, first, last, keep, low, high, above, between, DOUBTS, BLOCK
        )
    return tail


@triton.jit
def _order_tail(selected, chosen, size, tail, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Moves the `tail` lowest of `size` entries to the end, in order of rank; the others keep their own order."""
    # all entries differ as (ranking, lower position first); each round finds the next one up
    number = tl.arange(0, TAIL)
    lowest = tl.zeros([TAIL], tl.int64)
    reached = tl.full([], -1, tl.int64)
    beyond = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for nth in range(tail):
        following = beyond
        for start in range(0, size, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            token = tl.load(selected + slot, mask=slot < size, other=0)
            ranking = tl.load(chosen + slot, mask=slot < size, other=0)
            entry = (ranking.to(tl.int64) << 32) + (0x7FFFFFFF - token)
            entry = tl.where((slot < size) & (entry > reached), entry, beyond)
            following = tl.minimum(following, tl.min(entry, 0))
        reached = following
        lowest = tl.where(number == nth, reached, lowest)
    moved = size * 0
    for start in range(0, size, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        token = tl.load(selected + slot, mask=slot < size, other=0)
        ranking = tl.load(chosen + slot, mask=slot < size, other=0)
        entry = (ranking.to(tl.int64) << 32) + (0x7FFFFFFF - token)
        stays = (slot < size) & (entry > reached)
        place = moved + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.debug_barrier()  # entries move down onto ones that others still have to read
        tl.store(selected + place, token, mask=stays)
        tl.store(chosen + place, ranking, mask=stays)
        moved += tl.sum(stays.to(tl.int32), 0)
        tl.debug_barrier()
    tl.store(selected + size - 1 - number, (0x7FFFFFFF - (lowest & 0x7FFFFFFF)).to(tl.int32), mask=number < tail)
    tl.store(chosen + size - 1 - number, (lowest >> 32).to(tl.int32), mask=number < tail)


@triton.jit
def _select(
    ranking_ptr, doubt_ptr, stage_ptr, count_ptr, arrived_ptr, selected_ptr, chosen_ptr, row_ptr, length_ptr, full_ptr,
    flag_ptr, now_ptr, then_ptr, kv_heads, capacity, width, room, margin,
    D: tl.constexpr, DP: tl.constexpr, SIMILARITY: tl.constexpr,
    SAMPLE: tl.constexpr, DOUBTS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, TAIL: tl.constexpr,
    LAST_RANKS: tl.constexpr,
):  # fmt: skip
    """Ends a step of one row and key/value head: selects if it was full, keeps the ranks that drop next in order.

    PARTS programs share a row's positions; the one that comes last completes the selection.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    selected, chosen = selected_ptr + pair.to(tl.int64) * width, chosen_ptr + pair.to(tl.int64) * width
    position = tl.load(full_ptr + batch)
    budget = tl.load(row_ptr + batch * 4 + 1).to(tl.int32)
    padding = tl.load(row_ptr + batch * 4 + 2).to(tl.int32)
    size, tail = position * 0, position * 0
    if position >= 0:
        size = tl.minimum(budget, position + 1 - padding)
        rankings, doubts = ranking_ptr + pair.to(tl.int64) * capacity, doubt_ptr + pair.to(tl.int64) * PARTS * DOUBTS
        completes = part == 0
        if PARTS == 1:
            tail = tl.minimum(size, LAST_RANKS)
            tail = _choose(
                rankings, doubts, selected, chosen, padding, position, size, tail, margin, SAMPLE, DOUBTS, BLOCK
            )
        else:
            stage, counts = stage_ptr + pair.to(tl.int64) * 2 * PARTS * room, count_ptr + pair * 2 * PARTS
            low, high = _collect_part(
                rankings, doubts, stage, counts, padding, position, size, part, room, margin,
                SAMPLE, DOUBTS, BLOCK, PARTS,
            )  # fmt: skip
            tl.debug_barrier()  # what all threads have written is there before the program counts as arrived
            completes = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == PARTS - 1
            if completes:
                tail = tl.minimum(size, LAST_RANKS)
                tail = _choose_from_parts(
                    rankings, doubts, stage, counts, selected, chosen, padding, position, size, tail, low, high, room,
                    DOUBTS, BLOCK, PARTS,
                )  # fmt: skip
        if completes & (kv_head == 0):
            tl.store(flag_ptr + batch * capacity + position, tl.full([], 1, tl.int1))
            tl.store(row_ptr + batch * 4 + 0, position.to(tl.int64))
            if SIMILARITY:
                column = tl.arange(0, DP)
                mean = tl.load(now_ptr + batch * D + column, mask=column < D, other=0.0)
                tl.store(then_ptr + batch * D + column, mean, mask=column < D)
    elif (LAST_RANKS == TAIL) & (part == 0):
        since = tl.load(length_ptr).to(tl.int32) - 1 - tl.load(row_ptr + batch * 4 + 0).to(tl.int32)
        anchor = tl.load(row_ptr + batch * 4 + 0).to(tl.int32)
        whole = tl.minimum(budget, anchor + 1 - padding)
        size = _left(anchor, budget, padding, since)
        if (whole > size) & ((whole - size) % TAIL == 0):
            tail = tl.minimum(size, TAIL)
    if tail > 0:
        tl.debug_barrier()
        _order_tail(selected, chosen, size, tail, BLOCK, TAIL)
