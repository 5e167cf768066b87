"""Triton kernels of a decoding step: attention of one query a batch row over the full or the small cache.

Two launches of fixed size, whatever is decided. `_attend` splits the keys of a batch row among programs: each decides
from device memory whether the step is full, and writes a softmax over its share of the keys; the first one also writes
the token's key and value into the cache. The second launch merges the shares and, at full steps, ranks the positions
for the selection (`finishing.py`).

For a cache with selecting steps (SELECTS) the second launch is that of `refreshkv.ops.step.selecting`. Where the step
is a selecting one, `_attend` scores the positions in place of attending to them.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `L` tokens the cache has
room for, `L'` a few more, `W` slots of a selection, `N` splits, `O` observing queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.step.selecting.scoring import score_share, store_own_score_key
from refreshkv.ops.tiles import (
    BUDGET,
    LAST_FULL,
    PADDING,
    PROMPT_LENGTH,
    ROW_COLUMNS,
    attend_by_logits,
    capped,
    most_at_once,
)

REFRESH, FULL, COMPACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a cache is: one that refreshes; one that is always read whole; one of at most K entries, whose first
`row_state[LAST_FULL]` entries are read but for the one that the new token replaces."""

PROGRAMS_PER_PROCESSOR = 2
"""Programs of `_attend` for each multiprocessor: its tiles leave room for so many, so that all run at once."""

LARGEST_SPLIT = 128
"""Most splits of a batch row; what merges them holds that many partial results at once."""

TILE = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
"""Keys that `_attend` takes at once, for 16-bit caches and heads up to 128."""


@triton.jit
def _is_full(
    query_ptr, then_ptr, query_h, position, prompt, stride, threshold,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, SIMILARITY: tl.constexpr,
):  # fmt: skip
    """Whether this step of one batch row is full: the rule of `refreshkv.ops.schedule` on the device."""
    full = (position - (prompt - 1)) % stride == 0
    if SIMILARITY:
        if full:
            now = _mean_query(query_ptr, query_h, H, D, HP, DP)
            column = tl.arange(0, DP)
            # [DP]
            then = tl.load(then_ptr + column, mask=column < D, other=0.0)
            now_length = tl.maximum(tl.sqrt(tl.sum(now * now, 0)), 1e-8)
            then_length = tl.maximum(tl.sqrt(tl.sum(then * then, 0)), 1e-8)
            full = tl.sum(now * then, 0) / (now_length * then_length) <= threshold
    return full


@triton.jit
def _mean_query(query_ptr, query_h, H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr):
    """Mean over the query heads of one batch row in float32: [DP]."""
    head, column = tl.arange(0, HP), tl.arange(0, DP)
    mask = (head < H)[:, None] & (column < D)[None, :]
    # [HP, DP]
    query = tl.load(query_ptr + head[:, None] * query_h + column[None, :], mask=mask, other=0.0)
    return tl.sum(query.to(tl.float32), 0) / H


@triton.jit
def _ranks_left(last_full, budget, padding, since):
    """How many ranks of the selection the queue still holds, `since` steps after it was made (specification,
    section 4)."""
    size = tl.minimum(budget, last_full + 1 - padding)
    return tl.maximum(size - tl.maximum(size + since - 1 - budget, 0), 0)


@triton.jit
def _walk(
    query, keys, values, selected, logits_row, first, last, left, oldest, slot, highest, total, result, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, BLOCK_N: tl.constexpr,
    line, WHOLE: tl.constexpr, STORE: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Takes the entries `first .. last - 1` of a batch row into the running softmax.

    WHOLE: entry `i` is position `oldest + i`; else the first `left` entries are the selection's, and those after them
    the positions from `oldest` on. STORE writes the logits at their positions, into lines of `line` numbers; SKIP
    passes over `slot`. CAP: as in `tiles.capped`.
    """
    column, row = tl.arange(0, DP), tl.arange(0, MP)
    in_head = column < D
    for start in range(first, last, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        exists = entry < last
        if WHOLE:
            token = oldest + entry
            if SKIP:
                exists = exists & (token != slot)
        else:
            # [BLOCK_N]
            token = tl.load(selected + entry, mask=exists & (entry < left), other=0)
            token = tl.where(entry < left, token, oldest + entry - left)
        place = token.to(tl.int64)[:, None] * D + column[None, :]
        here = exists[:, None] & in_head[None, :]
        # [BLOCK_N, DP] twice
        key = tl.load(keys + place, mask=here, other=0.0)
        value = tl.load(values + place, mask=here, other=0.0)
        # [MP, BLOCK_N]
        logits = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale, CAP)
        if STORE:
            place = row.to(tl.int64)[:, None] * line + token[None, :]
            tl.store(logits_row + place, logits, mask=(row < G)[:, None] & exists[None, :])
        highest, total, result = attend_by_logits(logits, value, exists[None, :], highest, total, result, PRECISION)
    return highest, total, result


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, length_ptr, row_ptr, slot_ptr, selected_ptr, then_ptr,
    observer_ptr, full_ptr, now_ptr, arrived_ptr, logit_ptr, partial_ptr, highest_ptr, total_ptr,
    code_ptr, token_scale_ptr, selecting_ptr, histogram_ptr, counter_ptr, middle_ptr, score_highest_ptr,
    score_total_ptr,
    query_b, query_h, key_b, key_h, value_b, value_h, kv_heads, capacity, room, width, stride, select_stride, threshold,
    scale,
    G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr,
    OBSERVERS: tl.constexpr, MODE: tl.constexpr, SIMILARITY: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SELECTS: tl.constexpr, DH: tl.constexpr, MR: tl.constexpr,
    BITS: tl.constexpr, BINS: tl.constexpr, SCORED: tl.constexpr, BYTES: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr, ATTENDS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One share of the keys of one batch row and key/value head: its maximum and sum (B, H, N), its output
    (B, H, N, D). At selecting steps the logits of the share by the score keys instead. Without ATTENDS, other steps of
    a cache with selecting steps only store the token."""
    split, pair = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    row, column = tl.arange(0, MP), tl.arange(0, DP)
    in_head = column < D
    mask = (row < G)[:, None] & in_head[None, :]
    query_ptr += batch * query_b
    key_ptr += batch * key_b + kv_head * key_h
    # [MP, DP], then [DP] twice
    query = tl.load(query_ptr + (kv_head * G + row)[:, None] * query_h + column[None, :], mask=mask, other=0.0)
    new_key = tl.load(key_ptr + column, mask=in_head, other=0.0)
    new_value = tl.load(value_ptr + batch * value_b + kv_head * value_h + column, mask=in_head, other=0.0)
    position = tl.minimum(tl.load(length_ptr), capacity).to(tl.int32)
    row_state = row_ptr + batch * ROW_COLUMNS
    last_full = tl.load(row_state + LAST_FULL).to(tl.int32)
    budget = tl.load(row_state + BUDGET).to(tl.int32)
    padding = tl.load(row_state + PADDING).to(tl.int32)
    prompt = tl.load(row_state + PROMPT_LENGTH).to(tl.int32)

    slot = position
    oldest, count = padding, position - padding
    left = count * 0
    full = MODE != REFRESH
    if MODE == COMPACT:
        slot = tl.load(slot_ptr + pair).to(tl.int32)
        count = last_full - padding  # here the number of entries
    if MODE == REFRESH:
        full = _is_full(
            query_ptr, then_ptr + batch * D, query_h, position, prompt, stride, threshold, H, D, HP, DP, SIMILARITY
        )
        if not full:
            left = _ranks_left(last_full, budget, padding, position - last_full)
            oldest = tl.maximum(last_full + 1, position - budget)
            count = left + position - oldest
        if split == 0:
            tl.store(arrived_ptr + pair, 0)
        if (split == 0) & (kv_head == 0):
            tl.store(full_ptr + batch, tl.where(full & (position < capacity), position, -1))
            if SIMILARITY:
                if full:
                    mean = _mean_query(query_ptr, query_h, H, D, HP, DP)
                    tl.store(now_ptr + batch * D + column, mean, mask=in_head)
        if SELECTS:
            # a step beyond the cache's room goes the partial step's way
            selecting = ((position - (prompt - 1)) % select_stride == 0) & (full == 0) & (position < capacity)
            if (split == 0) & (kv_head == 0):
                tl.store(selecting_ptr + batch, tl.where(selecting, position, -1))

    # the first share begins with the token itself, and writes its key and value into the cache
    own = split == 0
    keys = keys_ptr + pair.to(tl.int64) * capacity * D
    values = values_ptr + pair.to(tl.int64) * capacity * D
    line = room if SELECTS else capacity  # of logits
    logits_row = logit_ptr + (batch * H + kv_head * G) * line
    logit = capped(tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale, CAP)
    if own:
        if slot < capacity:
            place = slot.to(tl.int64) * D + column
            tl.store(keys + place, new_key, mask=in_head)
            tl.store(values + place, new_value, mask=in_head)
            if BITS < 16:
                store_own_score_key(key_ptr, code_ptr, token_scale_ptr, capacity, pair, position, D, DH, BITS)
            if STORE:
                if full:
                    tl.store(logits_row + row.to(tl.int64) * line + slot, logit, mask=row < G)
        if OBSERVERS > 1:
            observer = (batch * H + kv_head * G + row) * OBSERVERS + position % OBSERVERS
            tl.store(observer_ptr + observer[:, None] * D + column[None, :], query, mask=mask)

    if SELECTS:
        if selecting:
            score_share(
                query_ptr, key_ptr, code_ptr, token_scale_ptr, observer_ptr, histogram_ptr, counter_ptr, logit_ptr,
                middle_ptr, score_highest_ptr, score_total_ptr, query_h, kv_heads, capacity, room, scale, pair,
                position, padding, split, splits, G, D, DH, MR, OBSERVERS, BITS, BINS, SCORED, PRECISION, BYTES, ASM,
                STAGES, CAP,
            )  # fmt: skip
        elif ATTENDS:
            _attend_share(
                query, logit, new_value, keys, values, selected_ptr + pair.to(tl.int64) * width, logits_row,
                partial_ptr, highest_ptr, total_ptr, batch * H + kv_head * G, split, splits, full, count, left, oldest,
                slot, capacity, line, scale, G, D, DP, MP, BLOCK_N, MODE, STORE, PRECISION, CAP,
            )  # fmt: skip
    else:
        _attend_share(
            query, logit, new_value, keys, values, selected_ptr + pair.to(tl.int64) * width, logits_row, partial_ptr,
            highest_ptr, total_ptr, batch * H + kv_head * G, split, splits, full, count, left, oldest, slot, capacity,
            line, scale, G, D, DP, MP, BLOCK_N, MODE, STORE, PRECISION, CAP,
        )  # fmt: skip


@triton.jit
def _attend_share(
    query, logit, new_value, keys, values, selected, logits_row, partial_ptr, highest_ptr, total_ptr, first_head,
    split, splits, full, count, left, oldest, slot, capacity, line, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, BLOCK_N: tl.constexpr, MODE: tl.constexpr,
    STORE: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Attention to one share of `count` entries, and of the first share to the token itself, whose logits and value are
    known: maximum and sum (B, H, N), output (B, H, N, D), of the group's heads from `first_head` on."""
    row, column = tl.arange(0, MP), tl.arange(0, DP)
    mask = (row < G)[:, None] & (column < D)[None, :]
    own = split == 0
    share = tl.cdiv(tl.cdiv(count, splits), 8) * 8
    first = tl.minimum(split * share, count)
    last = tl.minimum(first + share, count)
    highest = tl.where(own, logit, -float("inf"))
    total = tl.where(own, 1.0, 0.0) + tl.zeros([MP], tl.float32)
    result = tl.where(own, new_value.to(tl.float32), 0.0)[None, :] + tl.zeros([MP, DP], tl.float32)
    if own:
        if slot >= capacity:
            total = total * float("nan")  # beyond the cache's room: a token that was not kept must not pass for one
    if full:
        highest, total, result = _walk(
            query, keys, values, selected, logits_row, first, last, left, oldest, slot, highest, total, result,
            scale, G, D, DP, MP, BLOCK_N, line, True, STORE, MODE == COMPACT, PRECISION, CAP,
        )  # fmt: skip
    else:
        highest, total, result = _walk(
            query, keys, values, selected, logits_row, first, last, left, oldest, slot, highest, total, result,
            scale, G, D, DP, MP, BLOCK_N, line, False, False, False, PRECISION, CAP,
        )  # fmt: skip
    place = (first_head + row) * splits + split
    tl.store(highest_ptr + place, highest, mask=row < G)
    tl.store(total_ptr + place, total, mask=row < G)
    if own | (first < last):
        tl.store(partial_ptr + place[:, None] * D + column[None, :], result, mask=mask)


def splits_of(pairs: int, device: torch.device, per_processor: int = PROGRAMS_PER_PROCESSOR) -> int:
    """Splits of the keys for so many pairs of batch row and key/value head: as many programs as run at once, if
    `per_processor` of them do on each multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(LARGEST_SPLIT, per_processor * processors // pairs))


def tile_of(query: Tensor) -> dict[str, int]:
    """The tile of `_attend`: smaller for float32 and for wide heads, whose tiles fill the shared memory."""
    if most := most_at_once(query):
        return {"BLOCK_N": most, "num_warps": 8 if query.element_size() == 4 else 4, "num_stages": 2}
    return TILE
