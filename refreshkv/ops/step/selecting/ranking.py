"""The second kernel of a selecting step: it turns logits into rankings of the positions.

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
from refreshkv.ops.step.selecting.scoring import LEAST
from refreshkv.ops.step.selecting.shares import share
from refreshkv.ops.tiles import BUDGET, PADDING, ROW_COLUMNS, load_sinks, with_sink

COMPUTED_ANEW = 3
"""Largest pooling window whose scores are computed anew for each position; those of larger ones go through memory."""


@triton.jit
def _rank(
    logit_ptr, highest_ptr, total_ptr, row_ptr, selecting_ptr, score_ptr, ranking_ptr, histogram_ptr,
    kv_heads, room, splits, recent, sinks, reach, sink_ptr,
    G: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, OBSERVERS: tl.constexpr, POOL: tl.constexpr,
    BEFORE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, FINE: tl.constexpr, BIN_BITS: tl.constexpr,
    KEEPS: tl.constexpr,
):  # fmt: skip
    """Ranks one share of the positions of one batch row and key/value head, (B, Hkv, L) int32, and counts the positions
    of each bin, (B, Hkv, BINS) int32. KEEPS: it writes the scores, (B, Hkv, L) float32, and pools them from memory;
    else it computes each score anew in every window that holds it."""
    part, pair = tl.program_id(0), tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    position = tl.load(selecting_ptr + batch)
    if position >= 0:
        padding = tl.load(row_ptr + batch * ROW_COLUMNS + PADDING).to(tl.int32)
        row, number = tl.arange(0, MP), tl.arange(0, NP)
        pair_row = pair.to(tl.int64) * (G * OBSERVERS)
        inside = (row < G * OBSERVERS)[:, None] & (number < splits)[None, :]
        place = (pair_row + row)[:, None] * splits + number[None, :]
        # [MP, NP] twice
        highest = tl.load(highest_ptr + place, mask=inside, other=-float("inf"))
        total = tl.load(total_ptr + place, mask=inside, other=0.0)
        top = tl.maximum(tl.max(highest, 1), LEAST)
        total = tl.sum(total * tl.exp2(highest - top[:, None]), 1)
        lse = top + tl.log2(tl.where(total > 0.0, total, 1.0))  # LEAST for a row that sees nothing
        if sink_ptr is not None:
            head = pair % kv_heads * G + row % G
            lse = with_sink(lse, load_sinks(sink_ptr, head, row < G * OBSERVERS))

        logits_row = logit_ptr + pair_row * room
        scores = score_ptr + pair.to(tl.int64) * room
        rankings = ranking_ptr + pair.to(tl.int64) * room
        present = tl.minimum(position + 1 - padding, OBSERVERS).to(tl.float32)
        begin, end = share(padding, position + 1, part, tl.num_programs(0))
        # pooling windows reach beyond the share; the neighbouring program computes the same scores there
        AHEAD: tl.constexpr = POOL - 1 - BEFORE
        MARGIN: tl.constexpr = (BEFORE + 15) // 16 * 16
        scored = tl.maximum(begin - MARGIN, 0)
        scored_end = tl.where(begin < end, tl.minimum(end + AHEAD, position + 1), scored)
        if KEEPS:
            for start in range(scored, scored_end, BLOCK):
                token = start + tl.arange(0, BLOCK)
                score = _scores(logits_row, token, lse, row, present, room, G, OBSERVERS, BLOCK)
                tl.store(scores + token, score, mask=(token >= padding) & (token < scored_end))
            tl.debug_barrier()  # windows read what other threads wrote
        top = top_bin(reach, tl.load(row_ptr + batch * ROW_COLUMNS + BUDGET).to(tl.int32), BIN_BITS)
        counts = tl.zeros([BINS], tl.int32)
        for start in range(begin, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            exists = (token >= padding) & (token < end)
            best = tl.zeros([BLOCK], tl.float32)
            for away in tl.static_range(-BEFORE, POOL - BEFORE):
                near = token + away
                near_exists = (near >= padding) & (near < scored_end)
                # [BLOCK]
                if KEEPS:
                    score = tl.load(scores + near, mask=near_exists, other=0.0)
                else:
                    if POOL > 1:
                        near = tl.minimum(tl.maximum(near, padding), position)
                    score = _scores(logits_row, near, lse, row, present, room, G, OBSERVERS, BLOCK)
                best = tl.maximum(best, tl.where(near_exists, score, 0.0))
            preferred = (token > position - recent) | (token - padding < sinks)
            ranking = best.to(tl.int32, bitcast=True) + tl.where(preferred, PREFERRED, 0)
            ranking = tl.where(token == position, FIRST, ranking)
            tl.store(rankings + token, ranking, mask=exists)
            counts += tl.histogram(bin_of(ranking, top, BINS, FINE, BIN_BITS), BINS, mask=exists)
        tl.atomic_add(histogram_ptr + pair * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _scores(logits_row, token, lse, row, present, room, G: tl.constexpr, OBSERVERS: tl.constexpr, BLOCK: tl.constexpr):
    """The scores [BLOCK] of some positions before pooling: the group's highest probability, averaged over the observing
    queries. present: how many of these there are; lse [MP]: of each row of logits; row [MP]: the rows' numbers."""
    score = tl.zeros([BLOCK], tl.float32)
    for observer in tl.static_range(OBSERVERS):
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        for member in tl.static_range(G):
            shift = tl.sum(tl.where(row == observer * G + member, lse, 0.0), 0)
            logits = logits_row + (observer * G + member) * room
            # [BLOCK]
            best = tl.maximum(best, tl.load(logits + token) - shift)
        score += tl.exp2(best)
    if OBSERVERS > 1:
        score = tl.div_rn(score, tl.zeros([BLOCK], tl.float32) + present)
    return score
