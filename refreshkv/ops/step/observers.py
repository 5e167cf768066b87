"""Triton kernels for selections by several observing queries: their softmax, split over keys, and their mean scores.

Both read the keys once; programs of batch rows whose step is partial end at once.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `L` tokens the cache has
room for, `N` splits, `O` observing queries; the query of position `p` is in slot `p % O`.
"""

import triton
import triton.language as tl

from refreshkv.ops.tiles import PADDING, ROW_COLUMNS, capped, load_sinks, with_sink


@triton.jit
def _observer_sums(
    observer_ptr, keys_ptr, row_ptr, full_ptr, highest_ptr, total_ptr, kv_heads, capacity, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, OBSERVERS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of each observing query over one share of the keys that it sees: two (B, H, O, N)."""
    split, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(full_ptr + batch)
    if position >= 0:
        padding = tl.load(row_ptr + batch * ROW_COLUMNS + PADDING).to(tl.int32)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        seen_from = position - (OBSERVERS - 1) + row // G
        exists = (row < OBSERVERS * G) & (seen_from >= padding)
        head = (batch * kv_heads + kv_head) * G + row % G
        column = tl.arange(0, DP)
        in_head = column < D
        slot = head * OBSERVERS + tl.maximum(seen_from, 0) % OBSERVERS
        observers = observer_ptr + slot[:, None] * D + column[None, :]
        # [BLOCK_M, DP]
        query = tl.load(observers, mask=exists[:, None] & in_head[None, :], other=0.0)
        keys = keys_ptr + pair.to(tl.int64) * capacity * D
        share = tl.cdiv(position + 1 - padding, splits)
        first = padding + split * share
        last = tl.minimum(first + share, position + 1)
        highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(first, last, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            here = (token < last)[:, None] & in_head[None, :]
            # [BLOCK_N, DP]
            key = tl.load(keys + token.to(tl.int64)[:, None] * D + column[None, :], mask=here, other=0.0)
            # [BLOCK_M, BLOCK_N]
            logits = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale, CAP)
            visible = (token[None, :] <= seen_from[:, None]) & (token < last)[None, :]
            logits = tl.where(visible, logits, -float("inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            safe = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2(highest - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
            highest = higher
        place = (head * OBSERVERS + row // G) * splits + split
        tl.store(highest_ptr + place, highest, mask=row < OBSERVERS * G)
        tl.store(total_ptr + place, total, mask=row < OBSERVERS * G)


@triton.jit
def _observer_scores(
    observer_ptr, keys_ptr, row_ptr, full_ptr, highest_ptr, total_ptr, score_ptr, kv_heads, capacity, splits, scale,
    sink_ptr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr, OBSERVERS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Probabilities, maximum over the group, mean over the observing queries: (B, Hkv, L) float32."""
    pair = tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(full_ptr + batch)
    if position >= 0:
        padding = tl.load(row_ptr + batch * ROW_COLUMNS + PADDING).to(tl.int32)
        member, number, column = tl.arange(0, GP), tl.arange(0, NP), tl.arange(0, DP)
        in_head, in_group = column < D, member < G
        head = (batch * kv_heads + kv_head) * G + member
        keys = keys_ptr + pair.to(tl.int64) * capacity * D
        present = tl.minimum(position + 1 - padding, OBSERVERS)
        first = padding + tl.program_id(0) * BLOCK_N
        for start in range(first, position + 1, tl.num_programs(0) * BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            here = (token <= position)[:, None] & in_head[None, :]
            # [BLOCK_N, DP]
            key = tl.load(keys + token.to(tl.int64)[:, None] * D + column[None, :], mask=here, other=0.0)
            score = tl.zeros([BLOCK_N], tl.float32)
            for observer in range(OBSERVERS - present, OBSERVERS):
                seen_from = position - (OBSERVERS - 1) + observer
                place = (head * OBSERVERS + observer)[:, None] * splits + number[None, :]
                inside = in_group[:, None] & (number < splits)[None, :]
                # [GP, NP] twice
                highest = tl.load(highest_ptr + place, mask=inside, other=-float("inf"))
                total = tl.load(total_ptr + place, mask=inside, other=0.0)
                top = tl.where(in_group, tl.max(highest, 1), 0.0)
                total = tl.sum(total * tl.exp2(highest - top[:, None]), 1)
                lse = top + tl.log2(tl.where(in_group, total, 1.0))
                if sink_ptr is not None:
                    lse = with_sink(lse, load_sinks(sink_ptr, kv_head * G + member, in_group))
                slot = head * OBSERVERS + seen_from % OBSERVERS
                observers = observer_ptr + slot[:, None] * D + column[None, :]
                # [GP, DP]
                query = tl.load(observers, mask=in_group[:, None] & in_head[None, :], other=0.0)
                logits = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale, CAP) - lse[:, None]
                best = tl.max(tl.where(in_group[:, None], logits, -float("inf")), 0)
                score += tl.where(token <= seen_from, tl.exp2(best), 0.0)
            tl.store(score_ptr + pair.to(tl.int64) * capacity + token, score / present, mask=token <= position)
