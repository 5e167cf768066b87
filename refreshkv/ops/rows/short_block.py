"""Causal attention of a few tokens behind many, by Triton: a block of drafts, a rectified step, a short further turn.

A program takes all queries of a key/value head, which are a few tokens of its group of query heads, to one share of the
keys, so that keys and values are read once. A second launch merges the shares.

Shapes: `B` batch rows, `n` tokens of the block, `L` positions, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`,
`D` head size, `N` splits of the keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.step.attention import splits_of, tile_of
from refreshkv.ops.step.finishing import merge_shares
from refreshkv.ops.tiles import LOG2E, attend, on_its_device, padded_head, padded_splits, precision

MOST_ROWS = 64
"""Queries that a program takes; more of them read the keys once more."""


@triton.jit(do_not_specialize=["length", "count"])
def _attend_block(
    query_ptr, key_ptr, value_ptr, padding_ptr, columns_ptr, partial_ptr, highest_ptr, total_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, kv_heads, length, count, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of MP queries, pairs of token and head, to one share of the keys: maximum and sum (B, n, H, N), output
    (B, n, H, N, D)."""
    split, splits, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    row, column = tl.program_id(2) * MP + tl.arange(0, MP), tl.arange(0, DP)
    number, head = row // G, kv_head * G + row % G
    exists, in_head = number < count, column < D
    query_ptr += batch * query_b
    query_row = query_ptr + head * query_h + number * query_t
    # [MP, DP]
    query = tl.load(query_row[:, None] + column[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
    position = length - count + number
    if columns_ptr is not None:
        length = tl.load(columns_ptr + count - 1).to(tl.int32) + 1
        position = tl.load(columns_ptr + number, mask=exists, other=0).to(tl.int32)
    padding = 0
    if padding_ptr is not None:
        padding = tl.load(padding_ptr + batch).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length - padding, splits), BLOCK_N) * BLOCK_N
    first = padding + split * share
    last = tl.minimum(first + share, length)
    keys = key_ptr + batch * key_b + kv_head * key_h
    values = value_ptr + batch * value_b + kv_head * value_h
    highest = tl.full([MP], -float("inf"), tl.float32)
    total = tl.zeros([MP], tl.float32)
    result = tl.zeros([MP, DP], tl.float32)
    for start in range(first, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        here = (token < last)[:, None] & in_head[None, :]
        place = token.to(tl.int64)[:, None]
        # [BLOCK_N, DP] twice
        key = tl.load(keys + place * key_t + column[None, :], mask=here, other=0.0)
        value = tl.load(values + place * value_t + column[None, :], mask=here, other=0.0)
        visible = (token[None, :] <= position[:, None]) & (token < last)[None, :]
        highest, total, result = attend(query, key, value, visible, highest, total, result, scale, PRECISION, None)
    place = (((batch * count + number) * kv_heads * G + head) * splits + split).to(tl.int64)
    tl.store(highest_ptr + place, highest, mask=exists)
    tl.store(total_ptr + place, total, mask=exists)
    tl.store(partial_ptr + place[:, None] * D + column[None, :], result, mask=exists[:, None] & in_head[None, :])


@triton.jit
def _merge(
    partial_ptr, highest_ptr, total_ptr, output_ptr, splits, D: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr
):  # fmt: skip
    """Merges the shares of one query into its output [D]."""
    row = tl.program_id(0).to(tl.int64)
    merge_shares(partial_ptr, highest_ptr, total_ptr, None, output_ptr, row, 0, 0, 0, splits, 1, D, 1, DP, NP)


@on_its_device
def short_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left_padding: Tensor | None,
    scaling: float,
    columns: Tensor | None = None,
) -> Tensor:
    """query (B, H, n, D): the last n of L positions, or those of `columns` (n,) int64, which ascend and which the host
    does not read; key, value (B, Hkv, L, D); left_padding (B,) int64 or None.

    Returns (B, H, n, D), without gradient.
    """
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    batch, heads, count, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    group, pairs = heads // kv_heads, batch * kv_heads
    rows = min(MOST_ROWS, max(16, triton.next_power_of_2(group * count)))
    tiles = triton.cdiv(group * count, rows)
    splits = splits_of(pairs * tiles, query.device)
    tile = tile_of(query)
    if rows > 32:  # so that two programs share a multiprocessor's memory
        tile = tile | {"num_stages": min(tile["num_stages"], 2)}
    partial = query.new_empty(batch, count, heads, splits, head_dim, dtype=torch.float32)
    highest, total = (query.new_empty(partial.shape[:-1], dtype=torch.float32) for _ in range(2))
    _attend_block[splits, pairs, tiles](
        query, key, value, left_padding, columns, partial, highest, total,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], kv_heads, length, count, scaling * LOG2E,
        G=group, D=head_dim, DP=padded_head(head_dim), MP=rows, PRECISION=precision(query), **tile,
    )  # fmt: skip
    output = query.new_empty(batch, count, heads, head_dim)
    _merge[batch * count * heads,](
        partial, highest, total, output, splits,
        D=head_dim, DP=padded_head(head_dim), NP=padded_splits(splits), num_warps=2,
    )  # fmt: skip
    return output.transpose(1, 2)
