"""Triton kernels for the full steps of a row: one query position, all keys up to it, many positions to a tile.

Shapes: `B` batch rows, `C` checks, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `L` keys.
The rows of a key/value head are the pairs (check, head of the group), check first, so that a tile of neighbouring
rows ends at almost the same key. Checks that are not full, position -1, are skipped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.tiles import (
    LOG2E,
    attend,
    attend_backward,
    attend_backward_keys,
    block_sizes,
    padded_head,
    precision,
)


@triton.jit
def _rows(position_ptr, padding_ptr, batch, tile, checks, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile: each row's check, head of the group, position (-1 outside), and the first column that exists."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    check = row // G
    position = tl.load(position_ptr + batch * checks + check, mask=check < checks, other=-1).to(tl.int32)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    return check, row % G, position, padding


@triton.jit
def _forward(
    query_ptr, key_ptr, value_ptr, position_ptr, padding_ptr, output_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_t, output_h,
    checks, prompt, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    check, head, position, padding = _rows(position_ptr, padding_ptr, batch, tile, checks, G, BLOCK_M)
    last = tl.max(position, 0)
    if last < 0:
        return
    heads = tl.num_programs(1) * G
    head = kv_head * G + head
    exists = position >= 0
    column = tl.arange(0, DP)
    in_head = column < D
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + position.to(tl.int64) * query_t
    query = tl.load(query_row[:, None] + column[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, DP], tl.float32)
    for start in range(padding // BLOCK_N * BLOCK_N, last + 1, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        here = (token <= last)[:, None] & in_head[None, :]
        key = tl.load(keys + token.to(tl.int64)[:, None] * key_t + column[None, :], mask=here, other=0.0)
        value = tl.load(values + token.to(tl.int64)[:, None] * value_t + column[None, :], mask=here, other=0.0)
        visible = (token[None, :] <= position[:, None]) & (token[None, :] >= padding)
        highest, total, result = attend(query, key, value, visible, highest, total, result, scale, PRECISION)
    total = tl.where(exists, total, 1.0)
    result = result / total[:, None]
    tl.store(lse_ptr + (batch * heads + head) * checks + check, highest + tl.log2(total), mask=exists)
    decoded = position.to(tl.int64) - prompt
    output_row = output_ptr + batch * output_b + decoded * output_t + head.to(tl.int64) * output_h
    tl.store(
        output_row[:, None] + column[None, :],
        result.to(output_ptr.dtype.element_ty),
        mask=(decoded >= 0)[:, None] & in_head[None, :],
    )


@triton.jit
def _backward_query(
    query_ptr, key_ptr, value_ptr, position_ptr, padding_ptr, lse_ptr, delta_ptr, upstream_ptr, query_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, grad_b, grad_h, grad_t, decoded_rows, checks, prompt, scale, softmax_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    check, head, position, padding = _rows(position_ptr, padding_ptr, batch, tile, checks, G, BLOCK_M)
    last = tl.max(position, 0)
    if last < prompt:
        return
    heads = tl.num_programs(1) * G
    head = kv_head * G + head
    decoded = position.to(tl.int64) - prompt
    exists = decoded >= 0
    column = tl.arange(0, DP)
    in_head = column < D
    mask = exists[:, None] & in_head[None, :]
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + position.to(tl.int64) * query_t
    query = tl.load(query_row[:, None] + column[None, :], mask=mask, other=0.0)
    upstream_row = upstream_ptr + batch * upstream_b + decoded * upstream_t + head.to(tl.int64) * upstream_h
    upstream = tl.load(upstream_row[:, None] + column[None, :], mask=mask, other=0.0)
    lse = tl.load(lse_ptr + (batch * heads + head) * checks + check, mask=exists, other=0.0)
    delta = tl.load(delta_ptr + (batch * heads + head) * decoded_rows + decoded, mask=exists, other=0.0)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    query_grad = tl.zeros([BLOCK_M, DP], tl.float32)
    for start in range(padding // BLOCK_N * BLOCK_N, last + 1, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        here = (token <= last)[:, None] & in_head[None, :]
        key = tl.load(keys + token.to(tl.int64)[:, None] * key_t + column[None, :], mask=here, other=0.0)
        value = tl.load(values + token.to(tl.int64)[:, None] * value_t + column[None, :], mask=here, other=0.0)
        visible = (token[None, :] <= position[:, None]) & (token[None, :] >= padding) & exists[:, None]
        query_grad = attend_backward(query, key, value, visible, lse, delta, upstream, query_grad, scale, PRECISION)
    grad_row = query_grad_ptr + batch * grad_b + head.to(tl.int64) * grad_h + decoded * grad_t
    result = (query_grad * softmax_scale).to(query_grad_ptr.dtype.element_ty)
    tl.store(grad_row[:, None] + column[None, :], result, mask=mask)


@triton.jit
def _backward_key_value(
    query_ptr, key_ptr, value_ptr, position_ptr, padding_ptr, lse_ptr, delta_ptr, upstream_ptr,
    key_grad_ptr, value_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, decoded_rows, checks, length, prompt, stride, scale, softmax_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes, and so begins, the float32 sums of the key and value gradients: (B, Hkv, L, D)."""
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * G
    start = block * BLOCK_N
    token = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, DP)
    in_head = column < D
    here = (token < length)[:, None] & in_head[None, :]
    wide = token.to(tl.int64)[:, None]
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    key = tl.load(keys + wide * key_t + column[None, :], mask=here, other=0.0)
    value = tl.load(values + wide * value_t + column[None, :], mask=here, other=0.0)
    key_grad = tl.zeros([BLOCK_N, DP], tl.float32)
    value_grad = tl.zeros([BLOCK_N, DP], tl.float32)
    # the first check after the prompt whose position is not before this block
    first = tl.maximum(1, (start - prompt + stride) // stride) * G // BLOCK_M
    for tile in range(first, tl.cdiv(checks * G, BLOCK_M)):
        check, head, position, padding = _rows(position_ptr, padding_ptr, batch, tile, checks, G, BLOCK_M)
        head = kv_head * G + head
        decoded = position.to(tl.int64) - prompt
        exists = decoded >= 0
        mask = exists[:, None] & in_head[None, :]
        query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + position.to(tl.int64) * query_t
        query = tl.load(query_row[:, None] + column[None, :], mask=mask, other=0.0)
        upstream_row = upstream_ptr + batch * upstream_b + decoded * upstream_t + head.to(tl.int64) * upstream_h
        upstream = tl.load(upstream_row[:, None] + column[None, :], mask=mask, other=0.0)
        lse = tl.load(lse_ptr + (batch * heads + head) * checks + check, mask=exists, other=0.0)
        delta = tl.load(delta_ptr + (batch * heads + head) * decoded_rows + decoded, mask=exists, other=0.0)
        visible = (token[:, None] <= position[None, :]) & (token[:, None] >= padding) & exists[None, :]
        key_grad, value_grad = attend_backward_keys(
            query, key, value, visible, lse, delta, upstream, key_grad, value_grad, scale, PRECISION
        )
    base = (batch * tl.num_programs(1) + kv_head) * length
    tl.store(key_grad_ptr + (base + wide) * D + column[None, :], key_grad * softmax_scale, mask=here)
    tl.store(value_grad_ptr + (base + wide) * D + column[None, :], value_grad, mask=here)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    left_padding: Tensor,
    output: Tensor,
    prompt_length: int,
    scaling: float,
) -> Tensor:
    """Writes the rows of full steps after the prompt into `output`; returns all full steps' log-sum-exp.

    query (B, H, T, D); key, value (B, Hkv, T, D); positions (B, C); output (B, R, H, D), the other rows untouched.
    Returns (B, H, C) float32, in units of log 2, undefined where there is no step.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, checks = key.shape[1], positions.shape[1]
    lse = torch.empty(batch, heads, checks, dtype=torch.float32, device=query.device)
    sizes = block_sizes("full_forward", query)
    grid = (triton.cdiv(checks * (heads // kv_heads), sizes["BLOCK_M"]), kv_heads, batch)
    _forward[grid](
        query, key, value, positions, left_padding, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        checks, prompt_length, scaling * LOG2E,
        G=heads // kv_heads, D=head_dim, DP=padded_head(head_dim), PRECISION=precision(query), **sizes,
    )  # fmt: skip
    return lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    left_padding: Tensor,
    lse: Tensor,
    delta: Tensor,
    upstream: Tensor,
    query_grad: Tensor,
    prompt_length: int,
    stride: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Writes the full steps' rows of `query_grad` (B, H, R, D); returns the gradients of keys and values so far.

    upstream (B, R, H, D): gradient of the output; delta (B, H, R) float32: its dot product with the output; the others
    as in `forward`. Returns two (B, Hkv, T, D) float32 sums, to which the partial rows are added.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, checks, decoded = key.shape[1], positions.shape[1], upstream.shape[1]
    group = heads // kv_heads
    shared = {"G": group, "D": head_dim, "DP": padded_head(head_dim), "PRECISION": precision(query)}
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *upstream.stride()[:3])
    sizes = block_sizes("full_backward_query", query)
    _backward_query[triton.cdiv(checks * group, sizes["BLOCK_M"]), kv_heads, batch](
        query, key, value, positions, left_padding, lse, delta, upstream, query_grad,
        *strides, *query_grad.stride()[:3], decoded, checks, prompt_length, scaling * LOG2E, scaling,
        **shared, **sizes,
    )  # fmt: skip
    key_grad = torch.empty(batch, kv_heads, length, head_dim, dtype=torch.float32, device=query.device)
    value_grad = torch.empty_like(key_grad)
    sizes = block_sizes("full_backward_key_value", query)
    _backward_key_value[triton.cdiv(length, sizes["BLOCK_N"]), kv_heads, batch](
        query, key, value, positions, left_padding, lse, delta, upstream, key_grad, value_grad,
        *strides, decoded, checks, length, prompt_length, stride, scaling * LOG2E, scaling,
        **shared, **sizes,
    )  # fmt: skip
    return key_grad, value_grad
