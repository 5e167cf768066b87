"""The scores of a selecting step: the logits of all positions by the score keys.

`refreshkv.ops.step.attention._attend`, the first kernel of a step, calls `score_share` where the step is a selecting
one.

With 16-bit caches and codes of 8 or 4 bits the products are those of whole numbers: a query is rounded to whole
numbers of 16 bits, whose upper and lower bytes are multiplied by the codes (`query_bytes`). A number of a bfloat16
query is rounded if it is less than about a 100th of the largest, by at most a 32000th of that. Fewer instructions
unpack codes to bytes than to floats, and the sums are exact.

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
    ABOVE,
    load_code_halves,
    load_score_halves,
    padded_half,
    quantize_halves,
    store_codes,
)
from refreshkv.ops.step.selecting.shares import share
from refreshkv.ops.step.selecting.threshold import COUNTERS
from refreshkv.ops.tiles import capped

TILE = {"SCORED": 128, "STAGES": 4}
"""Score keys of a tile of `score_share`, and tiles that it loads ahead, for 16-bit caches."""

WIDE_TILE = {"SCORED": 128, "STAGES": 3}
"""The same where the keys themselves are the score keys: two programs share a multiprocessor's memory."""

FLOAT32_TILE = {"SCORED": 64, "STAGES": 2}
"""The same for float32 caches and for wide heads, whose tiles are larger."""

SAMPLED = tl.constexpr(64)
"""So many positions of a row are sampled; logits of 16 bits are relative to their mean."""

LEAST = tl.constexpr(-1e30)
"""Where a maximum of logits begins: not at -inf, for the difference of two of those is not a number."""


@triton.jit
def score_share(
    query_ptr, key_ptr, code_ptr, token_scale_ptr, observer_ptr, histogram_ptr, counter_ptr, logit_ptr, middle_ptr,
    highest_ptr, total_ptr, query_h, kv_heads, capacity, room, scale, pair, position, padding, split, splits,
    G: tl.constexpr, D: tl.constexpr, DH: tl.constexpr, MR: tl.constexpr, OBSERVERS: tl.constexpr,
    BITS: tl.constexpr, BINS: tl.constexpr, SCORED: tl.constexpr, PRECISION: tl.constexpr, BYTES: tl.constexpr,
    ASM: tl.constexpr, STAGES: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Computes the logits of one share of the positions of one batch row and key/value head, (B, Hkv, R, L), in units
    of log 2, and their maximum and sum, (B, Hkv, R, N).

    query_ptr, key_ptr: the batch row's queries, and the token's own key. The first program also scores the token
    itself, and clears the histograms and the counters for the launches that follow. BYTES: it multiplies whole numbers.
    CAP: as in `tiles.capped`. Where logits have 16 bits, they are relative to `middle` (B, Hkv, R), the mean of the
    row's logits of a sample of the positions, so that those near a threshold are small numbers.
    """
    NARROW: tl.constexpr = logit_ptr.dtype.element_ty == tl.float16
    PARTS: tl.constexpr = 2 if BYTES else 1
    pair_row = pair.to(tl.int64) * (G * OBSERVERS)
    codes = code_ptr + pair.to(tl.int64) * capacity * (D // 2 if BITS == 4 else D)
    token_scales = token_scale_ptr + pair.to(tl.int64) * capacity
    if NARROW:  # on their way while the queries are
        sampled = padding + tl.arange(0, SAMPLED) * (position - padding) // SAMPLED
        sample = _load_score_keys(codes, token_scales, sampled, query_ptr.dtype.element_ty, D, DH, BITS, BYTES, ASM)
    # [PARTS * MR, DH] twice: with BYTES every query twice
    low_query, high_query = _observing_queries(
        query_ptr, observer_ptr, query_h, kv_heads, pair, position, padding, tl.arange(0, PARTS * MR) // PARTS, G, D,
        DH, OBSERVERS,
    )  # fmt: skip
    row = tl.arange(0, MR)
    exists = row < G * OBSERVERS
    sees = position - (OBSERVERS - 1) + row // G
    logits_row = logit_ptr + (pair_row + row) * room
    own_logit = tl.full([MR], -float("inf"), tl.float32)
    if split == 0:
        low, high, token_scale = own_score_key(key_ptr, D, DH, BITS)
        # [PARTS * MR]
        dot = tl.sum(low_query.to(tl.float32) * low, 1) + tl.sum(high_query.to(tl.float32) * high, 1)
        if BYTES:
            dot = _first_of_two(dot, MR)
        if BITS < 16:
            dot = dot * tl.sum(token_scale, 0)
        own_logit = tl.where(sees >= position, capped(dot * scale, CAP), -float("inf"))
        tl.store(histogram_ptr + pair * (2 * BINS) + tl.arange(0, 2 * BINS), tl.zeros([2 * BINS], tl.int32))
        tl.store(counter_ptr + COUNTERS * pair + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))

    first, last = share(padding, position, split, splits)
    # [SCORED, MR] twice: one running softmax for each number of the tile; they are merged once, after the loop
    highest = tl.full([SCORED, MR], LEAST, tl.float32)
    total = tl.zeros([SCORED, MR], tl.float32)
    row_scale, sums = tl.zeros([MR], tl.float32) + scale, tl.zeros([MR], tl.int32)
    if BYTES:
        low_query, high_query, sums, unit = query_bytes(low_query, high_query, MR)
        row_scale *= unit
    middle = tl.zeros([MR], tl.float32)
    if NARROW:
        of_sample = _logits(*sample, low_query, high_query, sums, row_scale, MR, BITS, BYTES, PRECISION, CAP)
        middle = tl.sum(of_sample, 0) / SAMPLED
    for start in tl.range(first, last, SCORED, num_stages=STAGES):
        token = start + tl.arange(0, SCORED)
        known = tl.minimum(token, position)
        low, high, token_scale = _load_score_keys(
            codes, token_scales, known, query_ptr.dtype.element_ty, D, DH, BITS, BYTES, ASM
        )
        logits = _logits(
            low, high, token_scale, low_query, high_query, sums, row_scale, MR, BITS, BYTES, PRECISION, CAP
        )
        token = token[:, None]
        visible = (token >= padding) & (token < last)
        if OBSERVERS > 1:
            visible = visible & (token <= sees[None, :])
        logits = tl.where(visible, logits, -float("inf"))
        tl.store(logits_row[None, :] + token, logits - middle[None, :], mask=exists[None, :] & (token < last))
        # of the two terms of a running softmax, the higher one weighs 1
        weight = tl.exp2(-tl.abs(logits - highest))
        total = tl.where(logits > highest, total * weight + 1.0, total + weight)
        highest = tl.maximum(highest, logits)
    top = tl.maximum(tl.max(highest, 0), own_logit)
    total = tl.sum(total * tl.exp2(highest - top[None, :]), 0) + tl.exp2(own_logit - top)
    place = (pair_row + row) * splits + split
    tl.store(highest_ptr + place, top, mask=exists)
    tl.store(total_ptr + place, total, mask=exists)
    if split == 0:
        tl.store(logits_row + position, own_logit - middle, mask=exists)
        if NARROW:
            tl.store(middle_ptr + pair_row + row, middle, mask=exists)


@triton.jit
def _load_score_keys(
    codes, token_scales, token, dtype: tl.constexpr, D: tl.constexpr, DH: tl.constexpr, BITS: tl.constexpr,
    BYTES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The score keys of tokens (N,), all of which exist: two halves (N, DH), as bytes or of type `dtype`, and what they
    are to be multiplied by, (N,)."""
    # [N, DH] twice, then [N]
    if BYTES:
        low, high = load_code_halves(codes, token, D, DH, BITS, ASM)
    else:
        low, high = load_score_halves(codes, token, D, DH, BITS, dtype)
    token_scale = tl.full(token.shape, 1.0, tl.float32)
    if BITS < 16:
        token_scale = tl.load(token_scales + token)
    return low, high, token_scale


@triton.jit
def _logits(
    low, high, token_scale, low_query, high_query, sums, row_scale, MR: tl.constexpr, BITS: tl.constexpr,
    BYTES: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The logits of N tokens, (N, MR), of what `_load_score_keys` loads.

    low_query, high_query: the queries' halves (MR, DH), or what `query_bytes` makes of them, as are the `sums` (MR,).
    row_scale (MR,): what the products of each row are to be multiplied by."""
    if BYTES:
        # [N, 2 * MR]
        products = tl.dot(low, tl.trans(low_query), out_dtype=tl.int32)
        products = tl.dot(high, tl.trans(high_query), products, out_dtype=tl.int32)
        upper, lower = tl.split(tl.reshape(products, [low.shape[0], MR, 2]))
        products = upper * 256 + lower
        if BITS == 4:
            products -= ABOVE * sums[None, :]
        # [N, MR]
        logits = products.to(tl.float32)
    else:
        # [N, MR]
        logits = tl.dot(low, tl.trans(low_query), input_precision=PRECISION)
        logits = tl.dot(high, tl.trans(high_query), logits, input_precision=PRECISION)
    return capped(logits * row_scale[None, :] * token_scale[:, None], CAP)


@triton.jit
def query_bytes(low, high, MR: tl.constexpr):
    """Rounds queries to whole numbers of a unit, so that the largest of each is about 2^14 .. 2^15.

    low, high (2 * MR, DH): the two halves of each query, which is in two rows. The first gets the upper and the second
    the lower bytes of its numbers, upper * 256 + lower. Returns these, int8, twice (2 * MR, DH); the sum of each
    query's numbers, int32, and its unit: (MR,) twice.
    """
    low, high = low.to(tl.float32), high.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    # the exponent's bits of a float32, of one a little larger, for two signed bytes hold 32639 at most; of very small
    # numbers, the least whose unit is a normal float32
    exponent = tl.maximum((largest * 1.004).to(tl.int32, bitcast=True) >> 23, 15)
    per_unit = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    low = tl.floor(low * per_unit[:, None] + 0.5).to(tl.int32)
    high = tl.floor(high * per_unit[:, None] + 0.5).to(tl.int32)
    sums = tl.sum(low, 1) + tl.sum(high, 1)
    return _bytes(low, MR), _bytes(high, MR), _first_of_two(sums, MR), _first_of_two(unit, MR)


@triton.jit
def _bytes(number, MR: tl.constexpr):
    """The upper bytes of the even and the lower bytes of the odd rows of whole numbers (2 * MR, DH), signed: int8."""
    upper = (number + 128) >> 8
    is_upper = tl.arange(0, 2 * MR) % 2 == 0
    return tl.where(is_upper[:, None], upper, number - upper * 256).to(tl.int8)


@triton.jit
def _first_of_two(number, MR: tl.constexpr):
    """The even ones of (2 * MR,) numbers."""
    first, _ = tl.split(tl.reshape(number, [MR, 2]))
    return first


@triton.jit
def _observing_queries(
    query_ptr, observer_ptr, query_h, kv_heads, pair, position, padding, row,
    G: tl.constexpr, D: tl.constexpr, DH: tl.constexpr, OBSERVERS: tl.constexpr,
):  # fmt: skip
    """The observing queries of the rows (M,): two halves (M, DH), the step's own from the batch row's queries, the
    earlier ones from their slots; zero in rows that observe nothing."""
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    head = kv_head * G + row % G
    sees = position - (OBSERVERS - 1) + row // G
    is_row = (row < G * OBSERVERS) & (sees >= padding)
    slots = observer_ptr + (batch * kv_heads * G + head) * (OBSERVERS * D) + (tl.maximum(sees, 0) % OBSERVERS) * D
    column = tl.arange(0, DH)
    newest = (is_row & (row // G == OBSERVERS - 1))[:, None] & (column < D // 2)[None, :]
    place = (query_ptr + head * query_h)[:, None] + column[None, :]
    low, high = tl.load(place, mask=newest, other=0.0), tl.load(place + D // 2, mask=newest, other=0.0)
    if OBSERVERS > 1:
        older = (is_row & (row // G < OBSERVERS - 1))[:, None] & (column < D // 2)[None, :]
        place = slots[:, None] + column[None, :]
        low += tl.load(place, mask=older, other=0.0)
        high += tl.load(place + D // 2, mask=older, other=0.0)
    return low, high


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


def tile_of(query: Tensor, bits: int, rows: int) -> dict[str, int]:
    """The tile of `score_share` for score keys of so many bits, and so many rows of logits of a key/value head."""
    # tiles of products have eight columns at least, they multiply 32 bytes at a time, and int32 holds sums of 512
    half = padded_half(query.shape[-1])
    in_bytes = bits < 16 and query.element_size() == 2 and 32 <= half <= 256
    kind = {"BYTES": in_bytes, "DH": half, "MR": max(4 if in_bytes else 8, triton.next_power_of_2(rows))}
    if query.element_size() != 2 or query.shape[-1] > 128:
        return kind | FLOAT32_TILE
    return kind | (WIDE_TILE if bits == 16 else TILE)


def takes_ptx(query: Tensor) -> bool:
    """True if the kernels may have PTX instructions: on GPUs of NVIDIA."""
    return query.is_cuda and torch.version.hip is None
