"""The first kernel of a selecting step: it stores the token and scores all positions by the score keys.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `DH` half of it padded to
a power of two, `L` tokens the cache has room for, `N` shares of the positions, `O` observing queries. A key/value head
has `R = O * G` rows of logits, padded to MP: row `o * G + g` is query head `g` of the group observing from position
`c - (O - 1) + o`, where `c` is the step's own position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.selection.score_keys import load_score_halves, quantize_halves, store_codes
from refreshkv.ops.step.selecting.shares import share
from refreshkv.ops.step.selecting.threshold import COUNTERS
from refreshkv.ops.tiles import PADDING, PROMPT_LENGTH, ROW_COLUMNS

PROGRAMS_PER_PROCESSOR = 2
"""Programs of `_score` for each multiprocessor: its tiles leave room for so many, so that all run at once."""

TILE = {"BLOCK_N": 128, "STAGES": 5, "num_warps": 4}
"""Score keys that `_score` takes at once, and tiles that it loads ahead, for 16-bit caches."""

FLOAT32_TILE = {"BLOCK_N": 64, "STAGES": 2, "num_warps": 4}
"""The same for float32 caches, whose tiles are wider."""

LEAST = tl.constexpr(-1e30)
"""Where a maximum of logits begins: not at -inf, for the difference of two of those is not a number."""


@triton.jit
def _is_selecting(position, prompt, stride, select_stride):
    """Whether the step at `position` is a selecting one under the fixed schedule (specification, section 10)."""
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
    """Computes the logits of one share of the positions of one batch row and key/value head, (B, Hkv, R, L), in units
    of log 2, and their maximum and sum, (B, Hkv, R, N).

    The first program also scores the token itself, stores its key, value and score key, puts its query among the
    observers, and clears the histogram and the counters for the launches that follow.
    """
    split, pair = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(length_ptr).to(tl.int32)
    padding = tl.load(row_ptr + batch * ROW_COLUMNS + PADDING).to(tl.int32)
    prompt = tl.load(row_ptr + batch * ROW_COLUMNS + PROMPT_LENGTH).to(tl.int32)
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
        # [MP, DH] twice: the halves of the step's own queries, zero in other rows
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
            # [MP, DH] twice: those of the earlier queries, zero in the rows that have theirs already
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
            tl.store(counter_ptr + COUNTERS * pair + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))

        first, last = share(padding, position, split, splits)
        # [BLOCK_N, MP] twice: one running softmax for each row of the tile; they are merged once, after the loop
        highest = tl.full([BLOCK_N, MP], LEAST, tl.float32)
        total = tl.zeros([BLOCK_N, MP], tl.float32)
        low_query, high_query = tl.trans(low_query), tl.trans(high_query)
        logits_row += row.to(tl.int64)[None, :] * room
        for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
            token = start + tl.arange(0, BLOCK_N)
            known = tl.minimum(token, position)
            # [BLOCK_N, DH] twice
            low, high = load_score_halves(codes, known, D, DH, BITS, low_query.dtype, ASM)
            logits = tl.dot(low, low_query, input_precision=PRECISION)
            logits = tl.dot(high, high_query, logits, input_precision=PRECISION)
            if BITS == 16:
                logits = logits * scale
            else:
                # [BLOCK_N]
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
    """Stores the token's key, value and score key at `position`; returns the score key's products with the queries
    [MP]."""
    one, column = tl.arange(0, 1), tl.arange(0, DH)
    mask = (one < 1)[:, None] & (column < D // 2)[None, :]
    token = position + one
    place = token.to(tl.int64)[:, None] * D + column[None, :]
    half: tl.constexpr = D // 2
    # [1, DH], four times
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


def tile_of(query: Tensor, **changes: int) -> dict[str, int]:
    """The tile of `_score`, with some of its entries changed."""
    return (TILE if query.element_size() == 2 else FLOAT32_TILE) | changes


def unpacks_by_ptx(query: Tensor) -> bool:
    """True if 4-bit codes are unpacked by PTX instructions: for bfloat16 queries, on Hopper and later."""
    return query.is_cuda and query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) >= (9, 0)
