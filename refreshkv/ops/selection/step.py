"""The Triton kernel for the selection of a decoding step: `top_k`, by one program or several for a row.

A row is the positions of one batch row and key/value head; programs of rows whose step is partial end at once.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `L` tokens the cache has
room for, `W` slots of a selection, `N` splits, `O` observing queries.
"""

import triton
import triton.language as tl

from refreshkv.ops.selection.top_k import (
    BEYOND,
    bracket,
    can_resolve,
    collect,
    entry_of,
    resolve,
    sample_size,
    search,
    token_of,
)
from refreshkv.ops.step.attention import _ranks_left
from refreshkv.ops.tiles import BUDGET, LAST_FULL, PADDING, ROW_COLUMNS

SAMPLE = 2048
"""Positions that a row's threshold is bracketed from, at least."""

MARGIN = 3.5
"""How far from the sample's threshold the brackets are, in standard deviations of its count."""

BITS = 15
"""To how many of 31 bits the brackets are found."""

CANDIDATES = 2048
"""Most candidates of a row that are listed; with more, the whole row is searched. Long rows may have more."""

BLOCK = 4096
"""Entries of a row taken at once."""

MOST_PARTS = 16
"""Most programs that share a row."""

PROGRAMS = 256
"""Programs of a selection that a GPU runs at once."""

WARPS = 16


def parts_of(pairs: int, capacity: int) -> int:
    """Programs for each of so many rows: a power of two, as large as gives each of them some work."""
    parts = 1
    while 2 * parts <= min(MOST_PARTS, PROGRAMS // pairs, capacity // BLOCK * 2):
        parts *= 2
    return parts


def sizes_of(capacity: int, width: int, parts: int) -> dict[str, int]:
    """The sample, the room for candidates, and what is taken at once, for rows of up to `capacity` tokens of which
    `width` are selected."""
    candidates = CANDIDATES
    while capacity > 24 * candidates and candidates < 8 * CANDIDATES:
        candidates *= 2
    sample = sample_size(capacity, width, SAMPLE, candidates, MARGIN)
    return {"SAMPLE": sample, "BITS": BITS, "CANDIDATES": candidates, "BLOCK": BLOCK // min(2, parts), "PARTS": parts}


@triton.jit
def _choose(
    rankings, candidates, selected, chosen, first, last, keep, tail, margin,
    SAMPLE: tl.constexpr, BITS: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The `keep` highest rankings of `first .. last`, their positions and themselves, unsorted but for the `tail`
    lowest. Returns how many of these still have to be put in order."""
    low, high = bracket(rankings, first, last, keep, margin, 0, 0, 0, SAMPLE, BITS)
    above, between = collect(
        rankings, first, last, 0, 0, low, high, None, keep, selected, chosen, candidates, 0, CANDIDATES, BLOCK
    )
    tl.debug_barrier()  # candidates are read by other threads than wrote them
    if can_resolve(above, between, keep, CANDIDATES):
        if above < keep:
            number = tl.arange(0, CANDIDATES)
            exists = number < between
            # [CANDIDATES] twice
            token = tl.load(candidates + number, mask=exists, other=0)
            ranking = tl.load(candidates + CANDIDATES + number, mask=exists, other=-1)
            tail -= resolve(token, ranking, exists, between, above, keep, low, high, selected, chosen, tail)
    else:
        search(
            rankings, first, last, 0, 0, low, high, above, between, keep, selected, chosen, candidates,
            0, CANDIDATES, BLOCK,
        )  # fmt: skip
    return tail


@triton.jit
def _collect_part(
    rankings, candidates, stage, counts, first, last, keep, part, room, margin,
    SAMPLE: tl.constexpr, BITS: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`collect` for one of PARTS shares of a row's positions, into lists of the part's own: what is above into `stage`,
    `room` entries a part, and CANDIDATES candidates a part. Returns the brackets."""
    low, high = bracket(rankings, first, last, keep, margin, 0, 0, 0, SAMPLE, BITS)
    base = first // BLOCK * BLOCK
    share = tl.cdiv(tl.cdiv(last + 1 - base, PARTS), BLOCK) * BLOCK
    part_first = tl.maximum(first, base + part * share)
    part_last = tl.minimum(last, base + (part + 1) * share - 1)
    tokens = stage + part * 2 * room
    above, between = collect(
        rankings, part_first, part_last, 0, 0, low, high, None, room, tokens, tokens + room,
        candidates + part * 2 * CANDIDATES, 0, CANDIDATES, BLOCK,
    )  # fmt: skip
    tl.store(counts + 2 * part, above)
    tl.store(counts + 2 * part + 1, between)
    return low, high


@triton.jit
def _segment_of(counts, index, PARTS: tl.constexpr):
    """Maps an index into the concatenation of PARTS lists, of lengths counts[0], counts[2], ..., to the list and the
    index of its first entry."""
    segment, segment_first = tl.zeros(index.shape, tl.int32), tl.zeros(index.shape, tl.int32)
    end = tl.full([], 0, tl.int32)
    for part in tl.static_range(PARTS):
        end += tl.load(counts + 2 * part, cache_modifier=".cg")
        segment += (index >= end).to(tl.int32)
        segment_first = tl.where(index >= end, end, segment_first)
    return segment, segment_first


@triton.jit
def _choose_from_parts(
    rankings, candidates, stage, counts, selected, chosen, first, last, keep, tail, low, high, room,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `_choose`, from what all parts have collected. What other programs wrote is read past the L1 cache (.cg),
    which their stores do not reach."""
    part = tl.arange(0, PARTS)
    # [PARTS] twice
    above = tl.sum(tl.load(counts + 2 * part, cache_modifier=".cg"), 0)
    between = tl.sum(tl.load(counts + 2 * part + 1, cache_modifier=".cg"), 0)
    if can_resolve(above, between, keep, CANDIDATES):
        for start in range(0, above, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            exists = slot < above
            segment, segment_first = _segment_of(counts, slot, PARTS)
            pointer = stage + segment * 2 * room + slot - segment_first
            # [BLOCK] twice
            token = tl.load(pointer, mask=exists, other=0, cache_modifier=".cg")
            ranking = tl.load(pointer + room, mask=exists, other=0, cache_modifier=".cg")
            tl.store(selected + slot, token, mask=exists)
            tl.store(chosen + slot, ranking, mask=exists)
        if above < keep:
            number = tl.arange(0, CANDIDATES)
            exists = number < between
            segment, segment_first = _segment_of(counts + 1, number, PARTS)
            pointer = candidates + segment * 2 * CANDIDATES + number - segment_first
            # [CANDIDATES] twice
            token = tl.load(pointer, mask=exists, other=0, cache_modifier=".cg")
            ranking = tl.load(pointer + CANDIDATES, mask=exists, other=-1, cache_modifier=".cg")
            tail -= resolve(token, ranking, exists, between, above, keep, low, high, selected, chosen, tail)
    else:
        search(
            rankings, first, last, 0, 0, low, high, above, between, keep, selected, chosen, candidates,
            0, CANDIDATES, BLOCK,
        )  # fmt: skip
    return tail


@triton.jit
def _order_tail(selected, chosen, size, tail, BLOCK: tl.constexpr, SORTED_RANKS: tl.constexpr):
    """Moves the `tail` lowest of `size` entries to the end, in order of rank; the others keep their own order."""
    number = tl.arange(0, SORTED_RANKS)
    lowest = tl.zeros([SORTED_RANKS], tl.int64)
    reached = tl.full([], -1, tl.int64)
    for nth in range(tail):  # each round finds the next one up
        following = tl.full([], BEYOND, tl.int64)
        for start in range(0, size, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            # [BLOCK] twice
            token = tl.load(selected + slot, mask=slot < size, other=0)
            ranking = tl.load(chosen + slot, mask=slot < size, other=0)
            entry = entry_of(ranking, token)
            entry = tl.where((slot < size) & (entry > reached), entry, BEYOND)
            following = tl.minimum(following, tl.min(entry, 0))
        reached = following
        lowest = tl.where(number == nth, reached, lowest)
    moved = size * 0
    for start in range(0, size, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        # [BLOCK] twice
        token = tl.load(selected + slot, mask=slot < size, other=0)
        ranking = tl.load(chosen + slot, mask=slot < size, other=0)
        entry = entry_of(ranking, token)
        stays = (slot < size) & (entry > reached)
        place = moved + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.debug_barrier()  # entries move down onto slots that other threads may not have read yet
        tl.store(selected + place, token, mask=stays)
        tl.store(chosen + place, ranking, mask=stays)
        moved += tl.sum(stays.to(tl.int32), 0)
        tl.debug_barrier()
    tl.store(selected + size - 1 - number, token_of(lowest), mask=number < tail)
    tl.store(chosen + size - 1 - number, (lowest >> 32).to(tl.int32), mask=number < tail)


@triton.jit
def _select(
    ranking_ptr, candidate_ptr, stage_ptr, count_ptr, arrived_ptr, selected_ptr, chosen_ptr, row_ptr, length_ptr,
    full_ptr, flag_ptr, now_ptr, then_ptr, kv_heads, capacity, width, room, margin,
    D: tl.constexpr, DP: tl.constexpr, SIMILARITY: tl.constexpr,
    SAMPLE: tl.constexpr, BITS: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SORTED_RANKS: tl.constexpr, LAST_RANKS: tl.constexpr, SELECTS: tl.constexpr,
):  # fmt: skip
    """Ends a step of one batch row and key/value head: selects if it was full, else puts the ranks that drop next in
    order, SORTED_RANKS at a time. A selecting step (SELECTS) has kept its own choice, in any order.

    PARTS programs share the row's positions; the one that arrives last completes the selection.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    selected, chosen = selected_ptr + pair.to(tl.int64) * width, chosen_ptr + pair.to(tl.int64) * width
    position = tl.load(full_ptr + batch)
    row_state = row_ptr + batch * ROW_COLUMNS
    budget = tl.load(row_state + BUDGET).to(tl.int32)
    padding = tl.load(row_state + PADDING).to(tl.int32)
    size, tail = position * 0, position * 0
    if position >= 0:
        size = tl.minimum(budget, position + 1 - padding)
        rankings = ranking_ptr + pair.to(tl.int64) * capacity
        candidates = candidate_ptr + pair.to(tl.int64) * PARTS * 2 * CANDIDATES
        completes = part == 0
        if PARTS == 1:
            tail = tl.minimum(size, LAST_RANKS)
            tail = _choose(
                rankings, candidates, selected, chosen, padding, position, size, tail, margin,
                SAMPLE, BITS, CANDIDATES, BLOCK,
            )  # fmt: skip
        else:
            stage, counts = stage_ptr + pair.to(tl.int64) * 2 * PARTS * room, count_ptr + pair * 2 * PARTS
            low, high = _collect_part(
                rankings, candidates, stage, counts, padding, position, size, part, room, margin,
                SAMPLE, BITS, CANDIDATES, BLOCK, PARTS,
            )  # fmt: skip
            tl.debug_barrier()  # all threads have written before the program counts as arrived
            completes = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == PARTS - 1
            if completes:
                tail = tl.minimum(size, LAST_RANKS)
                tail = _choose_from_parts(
                    rankings, candidates, stage, counts, selected, chosen, padding, position, size, tail, low, high,
                    room, CANDIDATES, BLOCK, PARTS,
                )  # fmt: skip
        if completes & (kv_head == 0):
            tl.store(flag_ptr + batch * capacity + position, tl.full([], 1, tl.int1))
            tl.store(row_state + LAST_FULL, position.to(tl.int64))
            if SIMILARITY:
                column = tl.arange(0, DP)
                # [DP]
                mean = tl.load(now_ptr + batch * D + column, mask=column < D, other=0.0)
                tl.store(then_ptr + batch * D + column, mean, mask=column < D)
    elif ((LAST_RANKS == SORTED_RANKS) | (SELECTS and LAST_RANKS > 0)) & (part == 0):
        last_full = tl.load(row_state + LAST_FULL).to(tl.int32)
        since = tl.load(length_ptr).to(tl.int32) - 1 - last_full
        whole = tl.minimum(budget, last_full + 1 - padding)
        size = _ranks_left(last_full, budget, padding, since)
        if (whole > size) & ((whole - size) % SORTED_RANKS == 0):
            tail = tl.minimum(size, SORTED_RANKS)
        if SELECTS:
            if since == 0:
                tail = tl.minimum(size, LAST_RANKS)
    if tail > 0:
        tl.debug_barrier()
        _order_tail(selected, chosen, size, tail, BLOCK, SORTED_RANKS)
