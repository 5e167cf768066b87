"""The first stage of `_choose_and_attend`: it turns logits into rankings of the positions.

A ranking is an integer of 31 bits, the higher the better; equal ones go to the lower position. It is the bits of the
pooled score, a float32 >= 0, which order like the number. Sinks and recent positions come before all others, and the
step's own position before those.

Shapes: `B` batch rows, `Hkv` key/value heads, `G` query heads of a group, `L` tokens the cache has room for, `N` shares
of the logits, padded to NP, `O` observing queries, `R = O * G` rows of logits, padded to MP.
"""

import triton
import triton.language as tl

from refreshkv.ops.selection.top_k import FIRST, PREFERRED
from refreshkv.ops.step.selecting.bins import bin_of, top_bin
from refreshkv.ops.step.selecting.counting import count_each, counted, zero_counters
from refreshkv.ops.step.selecting.scoring import LEAST
from refreshkv.ops.step.selecting.shares import share
from refreshkv.ops.tiles import load_sinks, with_sink

COMPUTED_ANEW = 3
"""Largest pooling window whose scores are computed anew for each position; those of larger ones go through memory."""


@triton.jit
def load_sums(highest_ptr, total_ptr, pair, splits, ROWS: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr):
    """The maximum and the sum of each share of the logits: (MP, NP) twice."""
    row, number = tl.arange(0, MP), tl.arange(0, NP)
    inside = (row < ROWS)[:, None] & (number < splits)[None, :]
    place = (pair.to(tl.int64) * ROWS + row)[:, None] * splits + number[None, :]
    # [MP, NP] twice
    highest = tl.load(highest_ptr + place, mask=inside, other=-float("inf"))
    total = tl.load(total_ptr + place, mask=inside, other=0.0)
    return highest, total


@triton.jit
def rank_share(
    logits_row, middle_ptr, highest, total, scores, rankings, histogram, pair, position, padding, budget, part, parts,
    kv_heads, room, recent, sinks, reach, sink_ptr,
    G: tl.constexpr, MP: tl.constexpr, OBSERVERS: tl.constexpr, POOL: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr, BINS: tl.constexpr, FINE: tl.constexpr, COARSE_BITS: tl.constexpr,
    BIN_BITS: tl.constexpr, KEEPS: tl.constexpr, PREFERS: tl.constexpr, RUN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Ranks one share of the positions of one batch row and key/value head, (L,) int32, and counts the positions of
    each bin, (BINS,) int32. Tiles have BLOCK positions, the last ones REST. Bin 0 also counts a tile's positions before
    the row's first one and behind the share. ASM: PTX instructions count.

    middle_ptr: (B, Hkv, R), what is to be added to logits of 16 bits. highest, total: what `load_sums` gives. KEEPS: it
    writes the scores, (L,) float32, and pools them from memory; else it computes each score anew in every window that
    holds it. PREFERS: there are sinks or a recent window. Where the row's first and last runs of RUN positions reach
    beyond it, the ranking is -1.
    """
    row = tl.arange(0, MP)
    top = tl.maximum(tl.max(highest, 1), LEAST)
    total = tl.sum(total * tl.exp2(highest - top[:, None]), 1)
    lse = top + tl.log2(tl.where(total > 0.0, total, 1.0))  # LEAST for a row that sees nothing
    if sink_ptr is not None:
        head = pair % kv_heads * G + row % G
        lse = with_sink(lse, load_sinks(sink_ptr, head, row < G * OBSERVERS))
    if logits_row.dtype.element_ty == tl.float16:
        lse -= tl.load(middle_ptr + pair.to(tl.int64) * (G * OBSERVERS) + row, mask=row < G * OBSERVERS, other=0.0)

    present = tl.minimum(position + 1 - padding, OBSERVERS).to(tl.float32)
    begin, end = share(padding, position + 1, part, parts)
    # pooling windows reach beyond the share; the neighbouring program computes the same scores there
    AHEAD: tl.constexpr = POOL - 1 - BEFORE
    MARGIN: tl.constexpr = (BEFORE + 15) // 16 * 16
    scored = tl.maximum(begin - MARGIN, 0)
    scored_end = tl.where(begin < end, tl.minimum(end + AHEAD, position + 1), scored)
    if KEEPS:
        for start in range(scored, scored_end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            score = _scores(logits_row + start, tl.arange(0, BLOCK), lse, row, present, room, G, OBSERVERS)
            tl.store(scores + token, score, mask=(token >= padding) & (token < scored_end))
        tl.debug_barrier()  # windows read what other threads wrote
    top = top_bin(reach, budget, BIN_BITS)
    counters, rest_counters = zero_counters(BINS, ASM), zero_counters(BINS, ASM)
    whole_end = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    for start in range(begin, whole_end, BLOCK):
        number = _rank_tile(
            logits_row, scores, rankings, lse, row, present, room, start, padding, end, scored_end, position, recent,
            sinks, top, G, OBSERVERS, POOL, BEFORE, BINS, FINE, COARSE_BITS, BIN_BITS, KEEPS, PREFERS, BLOCK, True,
        )  # fmt: skip
        counters = count_each(counters, number, BINS, ASM)
    for start in range(whole_end, end, REST):
        number = _rank_tile(
            logits_row, scores, rankings, lse, row, present, room, start, padding, end, scored_end, position, recent,
            sinks, top, G, OBSERVERS, POOL, BEFORE, BINS, FINE, COARSE_BITS, BIN_BITS, KEEPS, PREFERS, REST, False,
        )  # fmt: skip
        # not by a mask: after a reshape, Triton (3.6 to 3.9) orders a histogram's mask in another way than its entries
        number = tl.where(start + _lane(REST) < end, number, 0)
        rest_counters = count_each(rest_counters, number, BINS, ASM)
    counts = counted(counters, whole_end - begin, BINS, ASM)
    counts += counted(rest_counters, tl.cdiv(tl.maximum(end - whole_end, 0), REST) * REST, BINS, ASM)
    tl.atomic_add(histogram + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")
    tl.debug_barrier()  # tiles have written some of these rankings
    in_run = tl.arange(0, RUN)
    if part == 0:
        token = padding // RUN * RUN + in_run
        tl.store(rankings + token, tl.full([RUN], -1, tl.int32), mask=token < padding)
    if part == parts - 1:
        token = position // RUN * RUN + in_run
        tl.store(rankings + token, tl.full([RUN], -1, tl.int32), mask=token > position)


@triton.jit
def _rank_tile(
    logits_row, scores, rankings, lse, row, present, room, start, padding, end, scored_end, position, recent, sinks,
    top, G: tl.constexpr, OBSERVERS: tl.constexpr, POOL: tl.constexpr, BEFORE: tl.constexpr, BINS: tl.constexpr,
    FINE: tl.constexpr, COARSE_BITS: tl.constexpr, BIN_BITS: tl.constexpr, KEEPS: tl.constexpr, PREFERS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Ranks a tile of BLOCK positions, of which WHOLE says that all are before `end`; returns their bins,
    (BLOCK / 4, 4)."""
    lane = _lane(BLOCK)
    token = start + lane
    if (POOL == 2) & (BEFORE == 1):
        # logits of positions before the row's first one are -inf, as far as tiles begin before it
        best = _log_scores(logits_row + start, lane, lse, row, present, room, G, OBSERVERS)
        # [BLOCK / 4, 1]: with two dimensions, as the tile, threads need not exchange it
        first = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 1)[None, :]
        left = _log_scores(logits_row + start - 1, first, lse, row, present, room, G, OBSERVERS)
        best = _pooled_with_left(best, tl.max(tl.where(start + first > padding, left, -float("inf")), 1), BLOCK // 4)
    else:
        best = tl.full([BLOCK // 4, 4], -float("inf"), tl.float32)
        for away in tl.static_range(-BEFORE, POOL - BEFORE):
            near_exists = (token + away >= padding) & (token + away < scored_end)
            if KEEPS:
                # [BLOCK / 4, 4]
                score = tl.load(scores + start + away + lane, mask=near_exists, other=0.0)
            else:
                score = _log_scores(logits_row + start + away, lane, lse, row, present, room, G, OBSERVERS)
            best = tl.maximum(best, tl.where(near_exists & (token >= padding), score, -float("inf")))
    if (OBSERVERS == 1) & (not KEEPS):
        best = tl.exp2(best)
    ranking = best.to(tl.int32, bitcast=True)
    if PREFERS:
        preferred = (token > position - recent) | (token - padding < sinks)
        ranking += tl.where(preferred & (token >= padding), PREFERRED, 0)
    if WHOLE:
        if position < start + BLOCK:
            ranking = tl.where(token == position, FIRST, ranking)
        tl.store(rankings + start + lane, ranking)
    else:
        ranking = tl.where(token == position, FIRST, ranking)
        tl.store(rankings + start + lane, ranking, mask=token < end)
    return bin_of(ranking, top, BINS, FINE, COARSE_BITS, BIN_BITS)


@triton.jit
def _lane(BLOCK: tl.constexpr):
    """The numbers of a tile's positions, (BLOCK / 4, 4), of which the last dimension is in one thread."""
    return tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def _pooled_with_left(best, left, N: tl.constexpr):
    """The maximum of each number (N, 4) and the one to its left; left (N,): those to the left of the first column."""
    even, odd = tl.split(tl.reshape(best, [N, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    even = tl.join(tl.maximum(first, left), tl.maximum(third, second))
    odd = tl.join(tl.maximum(second, first), tl.maximum(fourth, third))
    return tl.reshape(tl.join(even, odd), [N, 4])


@triton.jit
def _log_scores(logits, lane, lse, row, present, room, G: tl.constexpr, OBSERVERS: tl.constexpr):
    """`_scores`, or of a single observer their logarithms of base 2, which order alike."""
    if OBSERVERS == 1:
        return _best_logits(logits, lane, lse, row, 0, room, G)
    else:
        return _scores(logits, lane, lse, row, present, room, G, OBSERVERS)


@triton.jit
def _scores(logits, lane, lse, row, present, room, G: tl.constexpr, OBSERVERS: tl.constexpr):
    """The scores of some positions before pooling, in the shape of `lane`: the group's highest probability, averaged
    over the observing queries.

    logits: the first of the positions in the first row of logits; lane: the positions' numbers from there; lse [MP]: of
    each row; row [MP]: the rows' numbers; present: how many observing queries there are. Before the first row and
    behind each there is memory for a tile's positions that do not exist.
    """
    score = tl.zeros(lane.shape, tl.float32)
    for observer in tl.static_range(OBSERVERS):
        score += tl.exp2(_best_logits(logits, lane, lse, row, observer * G, room, G))
    if OBSERVERS > 1:
        score = tl.div_rn(score, tl.zeros(lane.shape, tl.float32) + present)
    return score


@triton.jit
def _best_logits(logits, lane, lse, row, first: tl.constexpr, room, G: tl.constexpr):
    """The highest of G rows of logits from `first` on, less their log-sum-exps. Arguments as in `_scores`."""
    best = tl.full(lane.shape, -float("inf"), tl.float32)
    for member in tl.static_range(G):
        shift = tl.sum(tl.where(row == first + member, lse, 0.0), 0)
        # as lane
        best = tl.maximum(best, tl.load(logits + (first + member) * room + lane).to(tl.float32) - shift)
    if logits.dtype.element_ty == tl.float16:
        best = tl.minimum(best, 0.0)  # rounding must not make a probability larger than 1
    return best
