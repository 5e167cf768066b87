"""The scores of a selecting step: the logits of all positions by the score keys.

`refreshkv.ops.step.attention._attend`, the first kernel of a step, calls `score_share` where the step is a selecting
one.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `DH` half of it padded to
a power of two, `L` tokens the cache has room for, `N` shares of the positions, `O` observing queries. A key/value head
has `R = O * G` rows of logits, padded to MR: row `o * G + g` is query head `g` of the group observing from position
`c - (O - 1) + o`, where `c` is the step's own position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.selection.score_keys import (
    UNPACKED_ABOVE,
    load_score_halves,
    quantize_halves,
    store_codes,
)
from refreshkv.ops.step.selecting.shares import share
from refreshkv.ops.step.selecting.threshold import COUNTERS
from refreshkv.ops.tiles import capped

TILE = {"SCORED": 128, "STAGES": 3}
"""Score keys of a tile of `score_share`, and tiles that it loads ahead, for 16-bit caches."""

WIDE_TILE = {"SCORED": 128, "STAGES": 3}
"""The same where the keys themselves are the score keys: two programs share a multiprocessor's memory."""

FLOAT32_TILE = {"SCORED": 64, "STAGES": 2}
"""The same for float32 caches and for wide heads, whose tiles are larger."""

LEAST = tl.constexpr(-1e30)
"""Where a maximum of logits begins: not at -inf, for the difference of two of those is not a number."""


@triton.jit
def score_share(
    query_ptr, key_ptr, code_ptr, token_scale_ptr, observer_ptr, histogram_ptr, counter_ptr, logit_ptr, highest_ptr,
    total_ptr, query_h, kv_heads, capacity, room, scale, pair, position, padding, split, splits,
    G: tl.constexpr, D: tl.constexpr, DH: tl.constexpr, MR: tl.constexpr, OBSERVERS: tl.constexpr,
    BITS: tl.constexpr, BINS: tl.constexpr, SCORED: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Computes the logits of one share of the positions of one batch row and key/value head, (B, Hkv, R, L), in units
    of log 2, and their maximum and sum, (B, Hkv, R, N).

    query_ptr, key_ptr: the batch row's queries, and the token's own key. The first program also scores the token
    itself, and clears the histograms and the counters for the launches that follow. CAP: as in `tiles.capped`.

    A tile of products has MR columns, 8 at least. Where half of them hold all R rows, a tile is of two tiles of score
    keys: queries in its left half for the first, in its right half for the second, and zeros in their place. Two tiles
    of 16-bit score keys would take too much memory.
    """
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    TWO: tl.constexpr = (BITS < 16) & (2 * G * OBSERVERS <= MR)
    HALF: tl.constexpr = MR // 2 if TWO else MR
    place, column = tl.arange(0, MR), tl.arange(0, DH)
    row, is_right = place % HALF, place >= HALF
    exists = row < G * OBSERVERS
    head = kv_head * G + row % G
    sees = position - (OBSERVERS - 1) + row // G
    is_row = exists & (sees >= padding)
    in_half = column < D // 2
    own_query = query_ptr + head * query_h
    slots = observer_ptr + (batch * kv_heads * G + head) * (OBSERVERS * D) + (tl.maximum(sees, 0) % OBSERVERS) * D
    # [MR, DH] twice
    low_query = _observing_queries(own_query, slots, row, is_row, column, in_half, G, OBSERVERS)
    high_query = _observing_queries(own_query, slots, row, is_row, D // 2 + column, in_half, G, OBSERVERS)

    pair_row = pair.to(tl.int64) * (G * OBSERVERS)
    codes = code_ptr + pair.to(tl.int64) * capacity * (D // 2 if BITS == 4 else D)
    token_scales = token_scale_ptr + pair.to(tl.int64) * capacity
    logits_row = logit_ptr + (pair_row + row) * room
    own_logit = tl.full([MR], -float("inf"), tl.float32)
    if split == 0:
        low, high, token_scale = own_score_key(key_ptr, D, DH, BITS)
        # [MR]
        dot = tl.sum(low_query.to(tl.float32) * low, 1) + tl.sum(high_query.to(tl.float32) * high, 1)
        if BITS < 16:
            dot = dot * tl.sum(token_scale, 0)
        own_logit = tl.where((sees >= position) & (place < HALF), capped(dot * scale, CAP), -float("inf"))
        tl.store(logits_row + position, own_logit, mask=exists & (place < HALF))
        tl.store(histogram_ptr + pair * (2 * BINS) + tl.arange(0, 2 * BINS), tl.zeros([2 * BINS], tl.int32))
        tl.store(counter_ptr + COUNTERS * pair + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))

    first, last = share(padding, position, split, splits)
    # [SCORED, MR] twice: one running softmax for each number of the tile; they are merged once, after the loop
    highest = tl.full([SCORED, MR], LEAST, tl.float32)
    total = tl.zeros([SCORED, MR], tl.float32)
    # [1, MR]: what unpacking adds to each product
    above = tl.zeros([1, MR], tl.float32)
    if (BITS == 4) & ASM:
        both = tl.sum(low_query.to(tl.float32), 1) + tl.sum(high_query.to(tl.float32), 1)
        above += UNPACKED_ABOVE * both[None, :]
    left_low, left_high = tl.trans(low_query), tl.trans(high_query)
    if TWO:
        right_low = tl.where(is_right[None, :], left_low, 0.0)
        right_high = tl.where(is_right[None, :], left_high, 0.0)
        left_low = tl.where(is_right[None, :], 0.0, left_low)
        left_high = tl.where(is_right[None, :], 0.0, left_high)
    for start in tl.range(first, last, SCORED * (2 if TWO else 1), num_stages=STAGES):
        token = start + tl.arange(0, SCORED)
        known = tl.minimum(token, position)
        logits = tl.zeros([SCORED, MR], tl.float32) - above
        # [SCORED, DH] twice
        low, high = load_score_halves(codes, known, D, DH, BITS, low_query.dtype, ASM)
        logits = tl.dot(low, left_low, logits, input_precision=PRECISION)
        logits = tl.dot(high, left_high, logits, input_precision=PRECISION)
        if TWO:
            known_right = tl.minimum(token + SCORED, position)
            # [SCORED, DH] twice
            low, high = load_score_halves(codes, known_right, D, DH, BITS, low_query.dtype, ASM)
            logits = tl.dot(low, right_low, logits, input_precision=PRECISION)
            logits = tl.dot(high, right_high, logits, input_precision=PRECISION)
        if BITS == 16:
            logits = logits * scale
        else:
            # [SCORED]
            token_scale = (tl.load(token_scales + known) * scale)[:, None]
            if TWO:
                # [SCORED]
                scale_right = (tl.load(token_scales + known_right) * scale)[:, None]
                token_scale = tl.where(is_right[None, :], scale_right, token_scale)
            logits = logits * token_scale
        logits = capped(logits, CAP)
        # [SCORED, MR]: the tokens of the products
        token = token[:, None] + tl.where(is_right, SCORED, 0)[None, :]
        visible = (token >= padding) & (token < last)
        if OBSERVERS > 1:
            visible = visible & (token <= sees[None, :])
        logits = tl.where(visible, logits, -float("inf"))
        tl.store(logits_row[None, :] + token, logits, mask=exists[None, :] & (token < last))
        # of the two terms of a running softmax, the higher one weighs 1
        weight = tl.exp2(-tl.abs(logits - highest))
        total = tl.where(logits > highest, total * weight + 1.0, total + weight)
        highest = tl.maximum(highest, logits)
    top = tl.maximum(tl.max(highest, 0), own_logit)
    total = tl.sum(total * tl.exp2(highest - top[None, :]), 0) + tl.exp2(own_logit - top)
    if TWO:
        both = tl.reshape(top, [2, HALF])
        top = tl.max(both, 0)
        total = tl.sum(tl.reshape(total, [2, HALF]) * tl.exp2(both - top[None, :]), 0)
    row = tl.arange(0, HALF)
    place = (pair_row + row) * splits + split
    tl.store(highest_ptr + place, top, mask=row < G * OBSERVERS)
    tl.store(total_ptr + place, total, mask=row < G * OBSERVERS)


@triton.jit
def _observing_queries(own_query, slots, row, is_row, column, in_tile, G: tl.constexpr, OBSERVERS: tl.constexpr):
    """Some columns (C,) of the observing queries, (MR, C): the step's own from `own_query` (MR,), the earlier ones from
    their `slots` (MR,), zero in rows that observe nothing."""
    newest = is_row & (row // G == OBSERVERS - 1)
    query = tl.load(own_query[:, None] + column[None, :], mask=newest[:, None] & in_tile[None, :], other=0.0)
    if OBSERVERS > 1:
        older = is_row & (row // G < OBSERVERS - 1)
        query += tl.load(slots[:, None] + column[None, :], mask=older[:, None] & in_tile[None, :], other=0.0)
    return query


@triton.jit
def own_score_key(key_ptr, D: tl.constexpr, DH: tl.constexpr, BITS: tl.constexpr):
    """The two halves of the token's score key, as codes with fewer than 16 bits, and its scale: twice [1, DH], [1]."""
    column = tl.arange(0, DH)[None, :]
    # [1, DH] twice
    low = tl.load(key_ptr + column, mask=column < D // 2, other=0.0).to(tl.float32)
    high = tl.load(key_ptr + D // 2 + column, mask=column < D // 2, other=0.0).to(tl.float32)
    if BITS == 16:
        return low, high, tl.full([1], 1.0, tl.float32)
    else:
        return quantize_halves(low, high, BITS)


@triton.jit
def store_own_score_key(
    key_ptr, code_ptr, token_scale_ptr, capacity, pair, position, D: tl.constexpr, DH: tl.constexpr, BITS: tl.constexpr
):
    """Stores the token's score key at `position`, of 8 or 4 bits."""
    column = tl.arange(0, DH)
    low, high, token_scale = own_score_key(key_ptr, D, DH, BITS)
    token = position + tl.arange(0, 1)
    codes = code_ptr + pair.to(tl.int64) * capacity * (D // 2 if BITS == 4 else D)
    store_codes(codes, token, column, (token >= 0)[:, None] & (column < D // 2)[None, :], low, high, D, BITS)
    tl.store(token_scale_ptr + pair.to(tl.int64) * capacity + token, token_scale)


def tile_of(query: Tensor, bits: int) -> dict[str, int]:
    """The tile of `score_share` for score keys of so many bits."""
    if query.element_size() != 2 or query.shape[-1] > 128:
        return FLOAT32_TILE
    return WIDE_TILE if bits == 16 else TILE


def unpacks_by_ptx(query: Tensor) -> bool:
    """True if 4-bit codes are unpacked by PTX instructions: for bfloat16 queries, on Hopper and later."""
    return query.is_cuda and query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) >= (9, 0)
