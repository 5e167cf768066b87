"""Triton kernels of a selecting step of decoding (docs/specification.md, section 10): score, rank, cut, attend, merge.

Five launches of fixed size, whatever is decided. `_score` stores the token and computes logits of all positions from
the score keys; `_rank` ranks the positions; `_cut` finds where the chosen ones end; `_attend` attends to the chosen
positions, in shares; `_merge` adds the shares up. What a row's step is, is decided in device memory; programs of rows
whose step is not a selecting one end at once. The definition is `refreshkv.ops.naive.selecting`.

The choice is a pair of numbers for each batch row and key/value head: a position is chosen if it ranks above `cut`, or
at `cut` and lies at `limit` or before. No list of the chosen is needed before they are attended to.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `L` tokens the cache has
room for, `N` splits, `O` observing queries, `R = O * G` rows of logits of a key/value head: row `o * G + g` is query
head `g` of the group observing from position `c - (O - 1) + o`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.selection.score_keys import (
    ScoreKeys,
    load_score_halves,
    padded_half,
    quantize_halves,
    store_codes,
)
from refreshkv.ops.tiles import LOG2E, padded_head, precision

SCORE_PROGRAMS, ATTEND_PROGRAMS = 2, 4
"""Programs of `_score` and of `_attend` on each multiprocessor, all at once."""

LARGEST_SPLIT = 128
"""Most splits of a row; the merge holds that many partial results at once."""

SCORE_TILE = {"BLOCK_N": 128, "STAGES": 5, "num_warps": 4}
"""Score keys that `_score` takes at once."""

ATTEND_TILE = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
"""Chosen keys that `_attend` takes at once, for 16-bit caches and heads up to 128."""

RANKED = 1024
"""Positions that a program of `_rank` or `_cut` takes at once."""

MOST_PARTS = 64
"""Most programs of `_rank`, and of `_cut`, that share a row."""

CHOOSE_PROGRAMS = 528
"""Programs of `_rank`, and of `_cut`, that a GPU runs at once."""

BINS = 256
"""Bins of the histogram of rankings. The last is for rankings above the highest possible cut."""

FINE = 160
"""Bins below that of an eighth of a power of two each; then come those of half a power of two."""

BIN_BITS = 20
"""Bits of a ranking within a fine bin."""

FEWEST_CANDIDATES, MOST_CANDIDATES = 1024, 8192
"""Positions in the bin of the cut that are sorted out at once; with more, the row is searched."""

SEARCHED = 4096
"""Positions taken at once where a row is searched."""

RUN = 64
"""Neighbouring positions that `_attend` gives to the same program. Runs go to the programs in turn, so that dense
places of a row are shared by all."""

SAME_IN_ALL_THREADS = {"enable_fp_fusion": False}
"""Of kernels that rank: the same operations give the same bits in all threads, and equal scores tie."""

LEAST = tl.constexpr(-1e30)
"""Where a maximum of logits begins."""

PREFERRED = tl.constexpr(1 << 30)
"""Added to the ranking of recent and sink positions: a probability's bits are less."""

ITSELF = tl.constexpr(0x7FFFFFFE)
"""The ranking of the step's own token: above all others."""


@triton.jit
def _is_selecting(position, prompt, stride, select_stride):
    """Whether the step at `position` is a selecting one under the fixed schedule (specification, section 10.1)."""
    step = position - (prompt - 1)
    return (step % select_stride == 0) & (step % stride != 0)


@triton.jit
def _score(
    query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, code_ptr, token_scale_ptr, observer_ptr, length_ptr, row_ptr,
    selecting_ptr, histogram_ptr, counter_ptr, logit_ptr, highest_ptr, total_ptr,
    query_b, query_h, key_b, key_h, value_b, value_h, kv_heads, capacity, room, stride, select_stride, scale,
    G: tl.constexpr, D: tl.constexpr, DH: tl.constexpr, MP: tl.constexpr, OBSERVERS: tl.constexpr,
    BITS: tl.constexpr, BINS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One share of the positions of one row and key/value head: logits (B, Hkv, R, L), in units of log 2, and their
    maximum and sum (B, Hkv, R, N). The first program takes the token itself too, and stores
    it with its score key."""
    split, pair = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(length_ptr).to(tl.int32)
    padding = tl.load(row_ptr + batch * 4 + 2).to(tl.int32)
    prompt = tl.load(row_ptr + batch * 4 + 3).to(tl.int32)
    selecting = _is_selecting(position, prompt, stride, select_stride)
    if (split == 0) & (kv_head == 0):
        tl.store(selecting_ptr + batch, tl.where(selecting, position, -1))
    if selecting:
        row, column = tl.arange(0, MP), tl.arange(0, DH)
        head = kv_head * G + row % G
        sees = position - (OBSERVERS - 1) + row // G
        is_row = (row < G * OBSERVERS) & (sees >= padding)
        in_half = column < D // 2
        newest = (row // G == OBSERVERS - 1)[:, None] & (row < G * OBSERVERS)[:, None] & in_half[None, :]
        # two [MP, DH]: the halves of all rows' queries
        own_query = query_ptr + batch * query_b + head[:, None] * query_h + column[None, :]
        low_query = tl.load(own_query, mask=newest, other=0.0)
        high_query = tl.load(own_query + D // 2, mask=newest, other=0.0)
        pair_row = pair.to(tl.int64) * (G * OBSERVERS)
        if OBSERVERS > 1:
            slots = observer_ptr + (batch * kv_heads * G + head)[:, None] * (OBSERVERS * D) + column[None, :]
            if split == 0:
                last_slot = slots + (position % OBSERVERS) * D
                tl.store(last_slot, low_query, mask=newest)
                tl.store(last_slot + D // 2, high_query, mask=newest)
            older = is_row[:, None] & (row // G < OBSERVERS - 1)[:, None] & in_half[None, :]
            slots += (tl.maximum(sees, 0) % OBSERVERS)[:, None] * D
            low_query += tl.load(slots, mask=older, other=0.0)
            high_query += tl.load(slots + D // 2, mask=older, other=0.0)

        codes = code_ptr + pair.to(tl.int64) * capacity * (D // 2 if BITS == 4 else D)
        token_scales = token_scale_ptr + pair.to(tl.int64) * capacity
        logits_row = logit_ptr + pair_row * room
        own_logit = tl.full([MP], -float("inf"), tl.float32)
        if split == 0:
            logit = _store_token(
                low_query, high_query, key_ptr + batch * key_b + kv_head * key_h,
                value_ptr + batch * value_b + kv_head * value_h, keys_ptr + pair.to(tl.int64) * capacity * D,
                values_ptr + pair.to(tl.int64) * capacity * D, codes, token_scales, position, D, DH, BITS,
            )  # fmt: skip
            logit = tl.where(sees >= position, logit * scale, -float("inf"))
            tl.store(logits_row + row.to(tl.int64) * room + position, logit, mask=row < G * OBSERVERS)
            own_logit = logit
            tl.store(histogram_ptr + pair * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
            tl.store(counter_ptr + 2 * pair + tl.arange(0, 2), tl.zeros([2], tl.int32))

        first, last = _share(padding, position, split, splits)
        # [BLOCK_N, MP]: a softmax for each place of the tile, reduced once, at the end; LEAST instead of -inf, for the
        # difference of two is a number
        highest = tl.full([BLOCK_N, MP], LEAST, tl.float32)
        total = tl.zeros([BLOCK_N, MP], tl.float32)
        low_query, high_query = tl.trans(low_query), tl.trans(high_query)
        logits_row += row.to(tl.int64)[None, :] * room
        for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
            token = start + tl.arange(0, BLOCK_N)
            known = tl.minimum(token, position)
            # two [BLOCK_N, DH]
            low, high = load_score_halves(codes, known, D, DH, BITS, low_query.dtype, ASM)
            logits = tl.dot(low, low_query, input_precision=PRECISION)
            logits = tl.dot(high, high_query, logits, input_precision=PRECISION)
            if BITS == 16:
                logits = logits * scale
            else:
                logits = logits * (tl.load(token_scales + known) * scale)[:, None]
            visible = (token >= padding)[:, None] & (token < last)[:, None]
            if OBSERVERS > 1:
                visible = visible & (token[:, None] <= sees[None, :])
            logits = tl.where(visible, logits, -float("inf"))
            tl.store(logits_row + token[:, None], logits, mask=(row < G * OBSERVERS)[None, :] & (token < last)[:, None])
            higher = tl.maximum(highest, logits)
            total = total * tl.exp2(highest - higher) + tl.exp2(logits - higher)
            highest = higher
        top = tl.maximum(tl.max(highest, 0), own_logit)
        total = tl.sum(total * tl.exp2(highest - top[None, :]), 0) + tl.exp2(own_logit - top)
        highest = top
        place = (pair_row + row) * splits + split
        tl.store(highest_ptr + place, highest, mask=row < G * OBSERVERS)
        tl.store(total_ptr + place, total, mask=row < G * OBSERVERS)


@triton.jit
def _store_token(
    low_query, high_query, key_ptr, value_ptr, keys, values, codes, token_scales, position,
    D: tl.constexpr, DH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Stores the token's key, value and score key at `position`; returns its dot products with the queries (MP,)."""
    one, column = tl.arange(0, 1), tl.arange(0, DH)
    mask = (one < 1)[:, None] & (column < D // 2)[None, :]
    token = position + one
    place = token.to(tl.int64)[:, None] * D + column[None, :]
    half: tl.constexpr = D // 2
    # [1, DH] each
    low = tl.load(key_ptr + column[None, :], mask=mask, other=0.0)
    high = tl.load(key_ptr + half + column[None, :], mask=mask, other=0.0)
    tl.store(keys + place, low, mask=mask)
    tl.store(keys + place + half, high, mask=mask)
    tl.store(values + place, tl.load(value_ptr + column[None, :], mask=mask, other=0.0), mask=mask)
    tl.store(values + place + half, tl.load(value_ptr + half + column[None, :], mask=mask, other=0.0), mask=mask)
    low, high = low.to(tl.float32), high.to(tl.float32)
    if BITS < 16:
        low, high, token_scale = quantize_halves(low, high, BITS)
        store_codes(codes, token, column, mask, low, high, D, BITS)
        tl.store(token_scales + token, token_scale)
    dot = tl.sum(low_query.to(tl.float32) * low, 1) + tl.sum(high_query.to(tl.float32) * high, 1)
    if BITS < 16:
        dot = dot * tl.sum(token_scale, 0)
    return dot


@triton.jit
def _rank(
    logit_ptr, highest_ptr, total_ptr, row_ptr, selecting_ptr, score_ptr, ranking_ptr, histogram_ptr,
    kv_heads, room, splits, recent, sinks, reach,
    G: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, OBSERVERS: tl.constexpr, POOL: tl.constexpr,
    BEFORE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, FINE: tl.constexpr, BIN_BITS: tl.constexpr,
):  # fmt: skip
    """Ranks one share of the positions of one row and key/value head: (B, Hkv, L) int32, and counts the rankings'
    upper bits, (B, Hkv, BINS) int32. Scores (B, Hkv, L) float32 are left behind."""
    part, pair = tl.program_id(0), tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    position = tl.load(selecting_ptr + batch)
    if position >= 0:
        padding = tl.load(row_ptr + batch * 4 + 2).to(tl.int32)
        row, number = tl.arange(0, MP), tl.arange(0, NP)
        pair_row = pair.to(tl.int64) * (G * OBSERVERS)
        # [MP, NP]: each row's log-sum-exp from its shares
        inside = (row < G * OBSERVERS)[:, None] & (number < splits)[None, :]
        place = (pair_row + row)[:, None] * splits + number[None, :]
        highest = tl.load(highest_ptr + place, mask=inside, other=-float("inf"))
        total = tl.load(total_ptr + place, mask=inside, other=0.0)
        top = tl.maximum(tl.max(highest, 1), LEAST)
        total = tl.sum(total * tl.exp2(highest - top[:, None]), 1)
        lse = top + tl.log2(tl.where(total > 0.0, total, 1.0))  # LEAST for a row that sees nothing

        logits_row = logit_ptr + pair_row * room
        scores = score_ptr + pair.to(tl.int64) * room
        rankings = ranking_ptr + pair.to(tl.int64) * room
        present = tl.minimum(position + 1 - padding, OBSERVERS).to(tl.float32)
        begin, end = _share(padding, position + 1, part, tl.num_programs(0))
        # windows reach beyond the share; the neighbouring program computes the same scores there
        AHEAD: tl.constexpr = POOL - 1 - BEFORE
        MARGIN: tl.constexpr = (BEFORE + 15) // 16 * 16
        scored = tl.maximum(begin - MARGIN, 0)
        scored_end = tl.where(begin < end, tl.minimum(end + AHEAD, position + 1), scored)
        for start in range(scored, scored_end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            score = tl.zeros([BLOCK], tl.float32)
            for observer in tl.static_range(OBSERVERS):
                best = tl.full([BLOCK], -float("inf"), tl.float32)
                for member in tl.static_range(G):
                    shift = tl.sum(tl.where(row == observer * G + member, lse, 0.0), 0)
                    logits = logits_row + (observer * G + member) * room
                    best = tl.maximum(best, tl.load(logits + token) - shift)
                score += tl.exp2(best)
            if OBSERVERS > 1:
                score = tl.div_rn(score, tl.zeros([BLOCK], tl.float32) + present)
            exists = (token >= padding) & (token < scored_end)
            tl.store(scores + token, score, mask=exists)
        tl.debug_barrier()  # windows read what other threads wrote
        top = _top_bin(reach, tl.load(row_ptr + batch * 4 + 1).to(tl.int32), BIN_BITS)
        counts = tl.zeros([BINS], tl.int32)
        for start in range(begin, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            exists = (token >= padding) & (token < end)
            best = tl.zeros([BLOCK], tl.float32)
            for away in tl.static_range(-BEFORE, POOL - BEFORE):
                near = token + away
                near_exists = (near >= padding) & (near < scored_end)
                best = tl.maximum(best, tl.load(scores + near, mask=near_exists, other=0.0))
            preferred = (token > position - recent) | (token - padding < sinks)
            ranking = best.to(tl.int32, bitcast=True) + tl.where(preferred, PREFERRED, 0)
            ranking = tl.where(token == position, ITSELF, ranking)
            tl.store(rankings + token, ranking, mask=exists)
            counts += tl.histogram(_bin_of(ranking, top, BINS, FINE, BIN_BITS), BINS, mask=exists)
        tl.atomic_add(histogram_ptr + pair * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _top_bin(reach, budget, BIN_BITS: tl.constexpr):
    """The upper bits of a ranking that the cut does not pass: the scores of a row sum to `reach` at most."""
    bound = tl.minimum(tl.div_rn(reach, tl.maximum(budget, 1).to(tl.float32)), 1.0)
    return bound.to(tl.int32, bitcast=True) >> BIN_BITS


@triton.jit
def _bin_of(ranking, top, BINS: tl.constexpr, FINE: tl.constexpr, BIN_BITS: tl.constexpr):
    """The bin of a ranking: the last one is above `top`; FINE bins and coarse ones, 4 times as wide, lie below."""
    below = top - (ranking >> BIN_BITS)
    below = tl.where(below < FINE, below, FINE + ((below - FINE) >> 2))
    return tl.minimum(tl.maximum(BINS - 2 - below, 0), BINS - 1)


@triton.jit
def _bounds_of_bin(number, top, BINS: tl.constexpr, FINE: tl.constexpr, BIN_BITS: tl.constexpr):
    """Rankings `low .. high-1` are in the bin."""
    below = BINS - 2 - number
    coarse = below >= FINE
    below = tl.where(coarse, FINE + (below - FINE) * 4, below)
    low = tl.maximum(top - below - tl.where(coarse, 3, 0), 0) << BIN_BITS
    high = tl.where(number == BINS - 1, 0x7FFFFFFF, (top - below + 1) << BIN_BITS)
    return tl.where(number == 0, 0, low), high


@triton.jit
def _share(first, end, part, parts):
    """Positions `begin .. end-1`, of which `first .. end-1` exist, that one of so many programs takes."""
    base = first // 16 * 16
    share = tl.cdiv(tl.cdiv(end - base, parts), 16) * 16
    begin = base + part * share
    return begin, tl.minimum(begin + share, end)


@triton.jit
def _place_in_list(taken):
    """Where the entries taken (N, 4) go in a list that keeps their order, and how many there are."""
    taken = taken.to(tl.int32)
    of_line = tl.sum(taken, 1)
    before = tl.cumsum(of_line, 0) - of_line
    return before[:, None] + tl.cumsum(taken, 1) - taken, tl.sum(of_line, 0)


@triton.jit
def _cut(
    row_ptr, selecting_ptr, ranking_ptr, histogram_ptr, counter_ptr, candidate_ptr, cut_ptr, kv_heads, room, reach,
    BINS: tl.constexpr, FINE: tl.constexpr, BIN_BITS: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
    SEARCHED: tl.constexpr,
):  # fmt: skip
    """Finds the cut of one row and key/value head and its limit: (B, Hkv, 2) int32.

    The histogram says in which bin the cut lies. The programs that share the row list the bin's positions, the one
    that comes last sorts them out; it reads what the others wrote past the L1 cache.
    """
    part, pair = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    batch = (pair // kv_heads).to(tl.int64)
    position = tl.load(selecting_ptr + batch)
    if position >= 0:
        budget = tl.load(row_ptr + batch * 4 + 1).to(tl.int32)
        padding = tl.load(row_ptr + batch * 4 + 2).to(tl.int32)
        if budget >= position + 1 - padding:
            tl.store(cut_ptr + 2 * pair, -1)
            tl.store(cut_ptr + 2 * pair + 1, position)
        else:
            rankings = ranking_ptr + pair.to(tl.int64) * room
            candidates = candidate_ptr + pair.to(tl.int64) * (2 * CANDIDATES)
            number = tl.arange(0, BINS)
            # [BINS], the highest bin first: how many positions are in it or above
            reached = tl.cumsum(tl.load(histogram_ptr + pair * BINS + BINS - 1 - number), 0)
            bins_above = tl.sum((reached < budget).to(tl.int32), 0)
            above = tl.max(tl.where(reached < budget, reached, 0), 0)
            within = tl.sum(tl.where(number == bins_above, reached, 0), 0) - above
            top = _top_bin(reach, budget, BIN_BITS)
            low, high = _bounds_of_bin(BINS - 1 - bins_above, top, BINS, FINE, BIN_BITS)
            begin, end = _share(padding, position + 1, part, parts)
            line = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
            for start in range(begin, end, BLOCK):
                # [BLOCK / 4, 4]
                token = start + line
                ranking = tl.load(rankings + token)
                is_near = (ranking >= low) & (ranking < high) & (token >= padding) & (token < end)
                slot, count = _place_in_list(is_near)
                slot += tl.atomic_add(counter_ptr + 2 * pair, count, sem="relaxed")
                is_near = is_near & (slot < CANDIDATES)
                tl.store(candidates + slot, token, mask=is_near)
                tl.store(candidates + CANDIDATES + slot, ranking, mask=is_near)
            tl.debug_barrier()  # what all threads have written is there before the program counts as arrived
            if tl.atomic_add(counter_ptr + 2 * pair + 1, 1, sem="acq_rel") == parts - 1:
                cut, limit = low, position
                if within <= CANDIDATES:
                    cut, limit = _sort_out(candidates, within, budget - above, low, high, position, CANDIDATES)
                else:
                    cut, limit = _search_cut(rankings, padding, position, budget, low, high, SEARCHED)
                tl.store(cut_ptr + 2 * pair, cut)
                tl.store(cut_ptr + 2 * pair + 1, limit)


@triton.jit
def _sort_out(candidates, count, keep, low, high, last, CANDIDATES: tl.constexpr):
    """The cut, in `low .. high-1`, and its limit, at most `last`, for `keep` of `count` candidates in any order."""
    entry = tl.arange(0, CANDIDATES)
    token = tl.load(candidates + entry, mask=entry < count, other=0, cache_modifier=".cg")
    ranking = tl.load(candidates + CANDIDATES + entry, mask=entry < count, other=-1, cache_modifier=".cg")
    reached, limit = count, last
    while (high - low > 1) & (reached != keep):
        middle = low + (high - low) // 2
        reach = tl.sum((ranking >= middle).to(tl.int32), 0)
        low = tl.where(reach >= keep, middle, low)
        reached = tl.where(reach >= keep, reach, reached)
        high = tl.where(reach >= keep, high, middle)
    if reached != keep:
        ties = keep - tl.sum((ranking > low).to(tl.int32), 0)
        limit = tl.max(tl.where(ranking == low, token, -1), 0)
        token = tl.where(ranking == low, token, 0x7FFFFFFF)
        before = tl.min(token, 0) - 1  # tied positions are mostly neighbours
        while limit - before > 1:
            middle = before + (limit - before) // 2
            enough = tl.sum((token <= middle).to(tl.int32), 0) >= ties
            before = tl.where(enough, before, middle)
            limit = tl.where(enough, middle, limit)
    return low, limit


@triton.jit
def _search_cut(rankings, first, last, budget, low, high, BLOCK: tl.constexpr):
    """As `_sort_out`, of a whole row, which is read once for each bit."""
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
def _count(rankings, first, last, cut, limit, BLOCK: tl.constexpr):
    """How many of positions `first .. last` rank at `cut` or above, and how many of those up to `limit` at `cut`."""
    reach, tied = first * 0, first * 0
    for start in range(first // 16 * 16, last + 1, BLOCK):
        token = start + tl.arange(0, BLOCK)
        ranking = tl.load(rankings + token, mask=(token >= first) & (token <= last), other=-1, cache_modifier=".cg")
        reach += tl.sum((ranking >= cut).to(tl.int32), 0)
        tied += tl.sum(((ranking == cut) & (token <= limit)).to(tl.int32), 0)
    return reach, tied


@triton.jit
def _attend(
    query_ptr, keys_ptr, values_ptr, row_ptr, selecting_ptr, ranking_ptr, cut_ptr, list_ptr,
    partial_ptr, highest_ptr, total_ptr, query_b, query_h, kv_heads, capacity, ranking_room, list_room, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, RUN: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one row and key/value head to the chosen positions in every N-th run of RUN positions: maximum and
    sum (B, H, N), output (B, H, N, D). The positions are listed in memory of the program's own first."""
    split, pair = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(selecting_ptr + batch)
    if position >= 0:
        padding = tl.load(row_ptr + batch * 4 + 2).to(tl.int32)
        cut, limit = tl.load(cut_ptr + 2 * pair), tl.load(cut_ptr + 2 * pair + 1)
        row, column = tl.arange(0, MP), tl.arange(0, DP)
        in_head = column < D
        mask = (row < G)[:, None] & in_head[None, :]
        queries = query_ptr + batch * query_b + (kv_head * G + row)[:, None] * query_h + column[None, :]
        query = tl.load(queries, mask=mask, other=0.0)
        rankings = ranking_ptr + pair.to(tl.int64) * ranking_room
        listed = list_ptr + (pair.to(tl.int64) * splits + split) * list_room
        base = padding // RUN * RUN
        runs = tl.cdiv(position + 1 - base, RUN)
        own = tl.cdiv(tl.maximum(runs - split, 0), splits) * RUN
        count = position * 0
        line = tl.arange(0, LISTED // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        for start in range(0, own, LISTED):
            # [LISTED / 4, 4]
            number = start + line
            token = base + (number // RUN * splits + split) * RUN + number % RUN
            exists = (number < own) & (token >= padding) & (token <= position)
            ranking = tl.load(rankings + token, mask=exists, other=-1)
            is_chosen = exists & ((ranking > cut) | ((ranking == cut) & (token <= limit)))
            slot, chosen = _place_in_list(is_chosen)
            tl.store(listed + count + slot, token, mask=is_chosen)
            count += chosen
        tl.debug_barrier()
        keys = keys_ptr + pair.to(tl.int64) * capacity * D
        values = values_ptr + pair.to(tl.int64) * capacity * D
        highest = tl.full([MP], -float("inf"), tl.float32)
        total = tl.zeros([MP], tl.float32)
        result = tl.zeros([MP, DP], tl.float32)
        for start in range(0, count, BLOCK_N):
            entry = start + tl.arange(0, BLOCK_N)
            exists = entry < count
            token = tl.load(listed + entry, mask=exists, other=0)
            place = token.to(tl.int64)[:, None] * D + column[None, :]
            here = exists[:, None] & in_head[None, :]
            # two [BLOCK_N, DP]
            key = tl.load(keys + place, mask=here, other=0.0)
            value = tl.load(values + place, mask=here, other=0.0)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            logits = tl.where(exists[None, :], logits, -float("inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            weight = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(weight, 1)
            result = result * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
            highest = higher
        place = (batch * kv_heads * G + kv_head * G + row) * splits + split
        tl.store(highest_ptr + place, highest, mask=row < G)
        tl.store(total_ptr + place, total, mask=row < G)
        if count > 0:
            tl.store(partial_ptr + place[:, None] * D + column[None, :], result, mask=mask)


@triton.jit
def _merge(
    partial_ptr, highest_ptr, total_ptr, output_ptr, length_ptr, selecting_ptr, kv_heads, splits,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Merges the shares of one query head, in fixed order, into the output (B, 1, H, D); counts the token."""
    member, pair = tl.program_id(0), tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    head = pair.to(tl.int64) * G + member
    if tl.load(selecting_ptr + batch) >= 0:
        number, column = tl.arange(0, NP), tl.arange(0, DP)
        highest = tl.load(highest_ptr + head * splits + number, mask=number < splits, other=-float("inf"))
        total = tl.load(total_ptr + head * splits + number, mask=number < splits, other=0.0)
        weight = tl.exp2(highest - tl.max(highest, 0))
        there = (highest > -float("inf"))[:, None] & (column < D)[None, :]
        # [NP, DP]
        result = tl.load(partial_ptr + (head * splits + number)[:, None] * D + column[None, :], mask=there, other=0.0)
        result = tl.sum(result * weight[:, None], 0) / tl.sum(total * weight, 0)
        tl.store(output_ptr + head * D + column, result.to(output_ptr.dtype.element_ty), mask=column < D)
    if (member == 0) & (pair == 0):
        tl.store(length_ptr, tl.load(length_ptr) + 1)


@dataclass
class SelectingScratch:
    """What the launches of a selecting step hand on to each other; layers that follow one another may share it.

    Rows of positions have `L'` places, more than L, so that tiles may be read whole.
    """

    selecting: Tensor
    """(B,) int32: the position if the row's step is a selecting one, or -1."""
    logits: Tensor
    """(B, Hkv, R, L') float32, in units of log 2."""
    highest: Tensor
    """(B, Hkv, R, N) float32, as `total`: maximum and sum of each share of the logits."""
    total: Tensor
    scores: Tensor
    """(B, Hkv, L') float32: probabilities, before they are pooled."""
    rankings: Tensor
    """(B, Hkv, L') int32: the higher the better."""
    histogram: Tensor
    """(B, Hkv, BINS) int32: of the rankings' upper bits."""
    counters: Tensor
    """(B, Hkv, 2) int32: candidates listed, and programs of `_cut` that have listed theirs."""
    candidates: Tensor
    """(B, Hkv, 2, C) int32: positions in the bin of the cut, and their rankings."""
    cuts: Tensor
    """(B, Hkv, 2) int32: the cut and its limit."""
    listed: Tensor
    """(B, Hkv, N, .) int32: positions that a program of `_attend` attends to."""

    @classmethod
    def empty(cls, heads: int, keys: Tensor, observation_window: int) -> "SelectingScratch":
        """Scratch for caches like keys (B, Hkv, L, D)."""
        batch, kv_heads, capacity, _ = keys.shape
        pairs, device = batch * kv_heads, keys.device
        splits, score_splits = splits_of(pairs, device, ATTEND_PROGRAMS), splits_of(pairs, device, SCORE_PROGRAMS)
        rows = heads // kv_heads * observation_window
        room = triton.cdiv(capacity, 16) * 16 + RANKED

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(batch, kv_heads, *shape, dtype=dtype, device=device)

        return cls(
            selecting=torch.empty(batch, dtype=torch.int32, device=device),
            logits=buffer(rows, room, dtype=torch.float32),
            highest=buffer(rows, score_splits, dtype=torch.float32),
            total=buffer(rows, score_splits, dtype=torch.float32),
            scores=buffer(room, dtype=torch.float32),
            rankings=buffer(room),
            histogram=buffer(BINS),
            counters=buffer(2),
            candidates=buffer(2, candidates_of(capacity)),
            cuts=buffer(2),
            listed=buffer(splits, list_room(capacity, splits)),
        )


def candidates_of(capacity: int) -> int:
    """Room for the positions in the bin of the cut: about twice as many as there are if logits are distributed
    normally."""
    return max(FEWEST_CANDIDATES, min(MOST_CANDIDATES, triton.next_power_of_2(capacity // 16)))


def splits_of(pairs: int, device: torch.device, per_processor: int) -> int:
    """Shares of a row for so many pairs of batch rows and key/value heads: as many programs as run at once."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(LARGEST_SPLIT, per_processor * processors // pairs))


def list_room(capacity: int, splits: int) -> int:
    """Positions that one of so many programs of `_attend` goes through at most."""
    return triton.cdiv(triton.cdiv(capacity, RUN) + 1, splits) * RUN


def parts_of(pairs: int, capacity: int, pool_kernel: int) -> int:
    """Programs of `_rank` or `_cut` for each row: each takes its positions, and what their windows reach, at once."""
    reach = 16 * triton.cdiv(pool_kernel, 16) + 16
    wanted = triton.cdiv(capacity, max(RANKED - reach, 16))
    return max(1, min(wanted, MOST_PARTS, CHOOSE_PROGRAMS // pairs))


def score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    score_keys: ScoreKeys,
    length: Tensor,
    row_state: Tensor,
    observers: Tensor,
    scratch: SelectingScratch,
    *,
    stride: int,
    select_stride: int,
    scaling: float,
    asm: bool | None = None,
    **tile: int,
) -> None:
    """The first launch; arguments as in `selecting_step`."""
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    group, window = heads // kv_heads, observers.shape[2]
    half = padded_half(head_dim)
    if asm is None:
        asm = (
            query.is_cuda and query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) >= (9, 0)
        )
    tile = (SCORE_TILE if query.element_size() == 2 else SCORE_TILE | {"BLOCK_N": 64, "STAGES": 2}) | tile
    _score[scratch.highest.shape[3], batch * kv_heads](
        query, key, value, keys, values, score_keys.codes, score_keys.scales, observers, length, row_state,
        scratch.selecting, scratch.histogram, scratch.counters, scratch.logits, scratch.highest, scratch.total,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], kv_heads, capacity,
        scratch.logits.shape[3], stride, select_stride,
        scaling * LOG2E, G=group, D=head_dim, DH=half, MP=max(8, triton.next_power_of_2(group * window)),
        OBSERVERS=window, BITS=score_keys.bits, BINS=BINS, PRECISION=precision(query), ASM=asm, **tile,
    )  # fmt: skip


def rank(
    row_state: Tensor,
    scratch: SelectingScratch,
    group: int,
    *,
    pool_kernel: int,
    pool_ahead: bool,
    recent_window: int,
    sink_tokens: int,
    warps: int = 4,
) -> None:
    """The second launch; arguments as in `selecting_step`."""
    batch, kv_heads, rows, room = scratch.logits.shape
    splits = scratch.highest.shape[3]
    _rank[parts_of(batch * kv_heads, room - RANKED, pool_kernel), batch * kv_heads](
        scratch.logits, scratch.highest, scratch.total, row_state, scratch.selecting, scratch.scores, scratch.rankings,
        scratch.histogram, kv_heads, room, splits, recent_window, sink_tokens, float(group * pool_kernel),
        G=group, MP=triton.next_power_of_2(rows), NP=max(2, triton.next_power_of_2(splits)), OBSERVERS=rows // group,
        POOL=pool_kernel, BEFORE=pool_kernel - 1 if pool_ahead else pool_kernel // 2, BLOCK=RANKED, BINS=BINS,
        FINE=FINE, BIN_BITS=BIN_BITS, num_warps=warps, **SAME_IN_ALL_THREADS,
    )  # fmt: skip


def cut(row_state: Tensor, scratch: SelectingScratch, group: int, pool_kernel: int, warps: int | None = None) -> None:
    """The third launch: what `scratch.cuts` says."""
    batch, kv_heads, room = scratch.rankings.shape
    candidates = scratch.candidates.shape[3]
    _cut[parts_of(batch * kv_heads, room - RANKED, 1), batch * kv_heads](
        row_state, scratch.selecting, scratch.rankings, scratch.histogram, scratch.counters, scratch.candidates,
        scratch.cuts, kv_heads, room, float(group * pool_kernel), BINS=BINS, FINE=FINE, BIN_BITS=BIN_BITS,
        CANDIDATES=candidates,
        BLOCK=RANKED, SEARCHED=SEARCHED,
        num_warps=warps or (4 if candidates <= 2048 else 8),
    )  # fmt: skip


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    row_state: Tensor,
    scratch: SelectingScratch,
    scaling: float,
    **tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fourth launch: what each program attended to, (B, H, N, D), and its maximum and sum, (B, H, N)."""
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    group = heads // kv_heads
    splits, room = scratch.listed.shape[2:]
    partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=query.device)
    highest, total = (torch.empty(batch, heads, splits, dtype=torch.float32, device=query.device) for _ in range(2))
    if query.element_size() * padded_head(head_dim) > 256:
        tile = {"BLOCK_N": 32, "num_warps": 8 if query.element_size() == 4 else 4, "num_stages": 2} | tile
    _attend[splits, batch * kv_heads](
        query, keys, values, row_state, scratch.selecting, scratch.rankings, scratch.cuts, scratch.listed,
        partial, highest, total, *query.stride()[:2], kv_heads, capacity, scratch.rankings.shape[2], room,
        scaling * LOG2E,
        G=group, D=head_dim, DP=padded_head(head_dim), MP=max(16, triton.next_power_of_2(group)), RUN=RUN,
        LISTED=min(4096, triton.next_power_of_2(room)), PRECISION=precision(query), **(ATTEND_TILE | tile),
    )  # fmt: skip
    return partial, highest, total


def merge(
    partial: Tensor, highest: Tensor, total: Tensor, output: Tensor, length: Tensor, scratch: SelectingScratch
) -> None:
    """The last launch: the output (B, 1, H, D) of rows whose step is a selecting one; length counts the token."""
    batch, heads, splits, head_dim = partial.shape
    kv_heads = scratch.rankings.shape[1]
    _merge[heads // kv_heads, batch * kv_heads](
        partial, highest, total, output, length, scratch.selecting, kv_heads, splits,
        G=heads // kv_heads, D=head_dim, DP=padded_head(head_dim), NP=max(2, triton.next_power_of_2(splits)),
        num_warps=4,
    )  # fmt: skip


def selecting_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    score_keys: ScoreKeys,
    length: Tensor,
    row_state: Tensor,
    observers: Tensor,
    scratch: SelectingScratch,
    *,
    stride: int,
    select_stride: int,
    pool_kernel: int,
    pool_ahead: bool,
    recent_window: int,
    sink_tokens: int,
    scaling: float,
) -> Tensor:
    """A decoding step of the rows for which it is a selecting one: (B, 1, H, D), and 0 in other rows.

    query (B, H, 1, D), key, value (B, Hkv, 1, D): the token's. Changed in place: keys, values (B, Hkv, L, D) and
    score_keys get the token, observers (B, H, O, D) its query in slot `position % O`, length () int64 counts it.
    row_state (B, 4) int64: last full position, budget, padded columns, length of the last prompt block. stride: steps
    between full steps, which are not selecting ones. `scratch.cuts` and `scratch.rankings` then say what was chosen.
    The caller sees to it that the cache has room.
    """
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    score(
        query, key, value, keys, values, score_keys, length, row_state, observers, scratch,
        stride=stride, select_stride=select_stride, scaling=scaling,
    )  # fmt: skip
    group = query.shape[1] // keys.shape[1]
    options = {"pool_kernel": pool_kernel, "recent_window": recent_window, "sink_tokens": sink_tokens}
    rank(row_state, scratch, group, pool_ahead=pool_ahead, **options)
    cut(row_state, scratch, group, pool_kernel)
    shares = attend(query, keys, values, row_state, scratch, scaling)
    output = query.new_zeros(query.shape[0], 1, *query.shape[1::2])
    merge(*shares, output, length, scratch)
    return output


def chosen_positions(scratch: SelectingScratch, left_padding: Tensor) -> Tensor:
    """Which positions the rows of the last selecting step kept: (B, Hkv, L) bool, False in other rows."""
    token = torch.arange(scratch.rankings.shape[2], device=scratch.rankings.device)
    cut, limit = scratch.cuts.unsqueeze(-1).unbind(2)
    exists = (token >= left_padding[:, None, None]) & (token <= scratch.selecting[:, None, None])
    return exists & ((scratch.rankings > cut) | ((scratch.rankings == cut) & (token <= limit)))
