"""The fourth kernel of a selecting step: attention to the chosen positions, in shares.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, padded to MP, `D` head size, padded to
DP, `N` shares.
"""

import triton
import triton.language as tl

from refreshkv.ops.step.selecting.shares import place_in_list
from refreshkv.ops.step.selecting.threshold import CHOICE_COLUMNS, LIMIT, THRESHOLD
from refreshkv.ops.tiles import PADDING, ROW_COLUMNS, capped

PROGRAMS_PER_PROCESSOR = 4
"""Programs of `_attend_to_chosen` for each multiprocessor: all run at once."""

MOST_LISTED = 1024
"""Most positions of its share that a program of `_attend_to_chosen` compares with the threshold at once."""

LIST_STAGES = 2
"""Tiles of these positions that are on their way at once."""


@triton.jit
def _attend_to_chosen(
    query_ptr, keys_ptr, values_ptr, row_ptr, selecting_ptr, ranking_ptr, choice_ptr, list_ptr, count_ptr,
    partial_ptr, highest_ptr, total_ptr, query_b, query_h, kv_heads, capacity, ranking_room, list_room, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, RUN: tl.constexpr, LISTED: tl.constexpr,
    LIST_STAGES: tl.constexpr, ATTENDS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Attends to one share of the chosen positions of one batch row and key/value head: maximum and sum (B, H, N),
    output (B, H, N, D).

    A share is every N-th run of RUN positions. The program first lists the chosen ones in its own part of the memory
    (B, Hkv, N, .), and counts them (B, Hkv, N). Without ATTENDS it does no more.
    """
    split, pair = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(selecting_ptr + batch)
    if position >= 0:
        padding = tl.load(row_ptr + batch * ROW_COLUMNS + PADDING).to(tl.int32)
        threshold = tl.load(choice_ptr + CHOICE_COLUMNS * pair + THRESHOLD)
        limit = tl.load(choice_ptr + CHOICE_COLUMNS * pair + LIMIT)
        row, column = tl.arange(0, MP), tl.arange(0, DP)
        in_head = column < D
        mask = (row < G)[:, None] & in_head[None, :]
        queries = query_ptr + batch * query_b + (kv_head * G + row)[:, None] * query_h + column[None, :]
        # [MP, DP]
        query = tl.load(queries, mask=mask, other=0.0)
        rankings = ranking_ptr + pair.to(tl.int64) * ranking_room
        listed = list_ptr + (pair.to(tl.int64) * splits + split) * list_room
        base = padding // RUN * RUN
        runs = tl.cdiv(position + 1 - base, RUN)
        own = tl.cdiv(tl.maximum(runs - split, 0), splits) * RUN
        count = position * 0
        line = tl.arange(0, LISTED // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        for start in tl.range(0, own, LISTED, num_stages=LIST_STAGES):
            number = start + line
            token = base + (number // RUN * splits + split) * RUN + number % RUN
            exists = (number < own) & (token >= padding) & (token <= position)
            # [LISTED / 4, 4]
            ranking = tl.load(rankings + token, mask=exists, other=-1)
            is_chosen = exists & ((ranking > threshold) | ((ranking == threshold) & (token <= limit)))
            slot, chosen = place_in_list(is_chosen)
            tl.store(listed + count + slot, token, mask=is_chosen)
            count += chosen
        tl.store(count_ptr + pair * splits + split, count)
        if ATTENDS:
            tl.debug_barrier()  # a thread reads entries that others have listed
            keys = keys_ptr + pair.to(tl.int64) * capacity * D
            values = values_ptr + pair.to(tl.int64) * capacity * D
            highest = tl.full([MP], -float("inf"), tl.float32)
            total = tl.zeros([MP], tl.float32)
            result = tl.zeros([MP, DP], tl.float32)
            for start in range(0, count, BLOCK_N):
                entry = start + tl.arange(0, BLOCK_N)
                exists = entry < count
                # [BLOCK_N]
                token = tl.load(listed + entry, mask=exists, other=0)
                place = token.to(tl.int64)[:, None] * D + column[None, :]
                here = exists[:, None] & in_head[None, :]
                # [BLOCK_N, DP] twice
                key = tl.load(keys + place, mask=here, other=0.0)
                value = tl.load(values + place, mask=here, other=0.0)
                # [MP, BLOCK_N]
                logits = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale, CAP)
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
