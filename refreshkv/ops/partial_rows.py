"""Triton kernels for the partial rows: per interval between two checks, the selected keys and the recent ones.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P` decoded rows, `C` checks, `S` stride, `H` query
heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `W` width of a selection. Interval `c` holds the positions
`P-1 + c*S .. P-1 + (c+1)*S - 1`; all its rows after the check decode from the selection of one full step, the latest at
or before the check, and the check's own row does if it was not full. The grid is the same for every schedule.
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

KEY_SPLITS = 8
"""Programs that share the keys of an interval in the backward pass of long intervals."""


@triton.jit
def _interval(
    full_ptr, latest_ptr, budget_ptr, padding_ptr, batch, interval, tile, checks, length, prompt, stride,
    G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of a tile: head of the group and position of each row, which rows are partial, how many ranks each still holds,
    the segment's index and last full position, and the budget."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offset = row // G
    segment = tl.load(latest_ptr + batch * checks + interval).to(tl.int32)
    anchor = tl.load(full_ptr + batch * checks + segment).to(tl.int32)
    budget = tl.load(budget_ptr + batch).to(tl.int32)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    position = prompt - 1 + interval * stride + offset
    partial = (offset < stride) & (position < length) & (position > anchor)
    selected = tl.minimum(budget, anchor + 1 - padding)
    left = selected - tl.maximum(selected + position - anchor - 1 - budget, 0)
    return row % G, position, partial, left, segment, anchor, budget


@triton.jit
def _forward(
    query_ptr, key_ptr, value_ptr, full_ptr, latest_ptr, selected_ptr, budget_ptr, padding_ptr, output_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_t, output_h,
    checks, tiles, width, length, prompt, stride, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    interval, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, position, partial, left, segment, anchor, budget = _interval(
        full_ptr, latest_ptr, budget_ptr, padding_ptr, batch, interval, tile, checks, length, prompt, stride, G, BLOCK_M
    )
    newest = tl.max(tl.where(partial, position, -1), 0)
    if newest < 0:
        return
    oldest = tl.min(tl.where(partial, position, length), 0)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * G
    head = kv_head * G + head
    column = tl.arange(0, DP)
    in_head = column < D
    mask = partial[:, None] & in_head[None, :]
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + position.to(tl.int64) * query_t
    query = tl.load(query_row[:, None] + column[None, :], mask=mask, other=0.0)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, DP], tl.float32)

    chosen = selected_ptr + ((batch * kv_heads + kv_head) * checks + segment) * width
    most = tl.max(tl.where(partial, left, 0), 0)
    for start in range(0, most, BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        token = tl.load(chosen + rank, mask=rank < most, other=0).to(tl.int64)
        here = (rank < most)[:, None] & in_head[None, :]
        key = tl.load(keys + token[:, None] * key_t + column[None, :], mask=here, other=0.0)
        value = tl.load(values + token[:, None] * value_t + column[None, :], mask=here, other=0.0)
        visible = rank[None, :] < left[:, None]
        highest, total, result = attend(query, key, value, visible, highest, total, result, scale, PRECISION)

    first = tl.maximum(anchor + 1, oldest - budget)
    for start in range(first, newest + 1, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        wide = token.to(tl.int64)[:, None]
        here = (token <= newest)[:, None] & in_head[None, :]
        key = tl.load(keys + wide * key_t + column[None, :], mask=here, other=0.0)
        value = tl.load(values + wide * value_t + column[None, :], mask=here, other=0.0)
        visible = (token[None, :] <= position[:, None]) & (token[None, :] >= position[:, None] - budget)
        highest, total, result = attend(query, key, value, visible, highest, total, result, scale, PRECISION)

    total = tl.where(partial, total, 1.0)
    result = result / total[:, None]
    decoded = position.to(tl.int64) - prompt
    rows = length - prompt
    tl.store(lse_ptr + (batch * heads + head) * rows + decoded, highest + tl.log2(total), mask=partial)
    output_row = output_ptr + batch * output_b + decoded * output_t + head.to(tl.int64) * output_h
    tl.store(output_row[:, None] + column[None, :], result.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_backward(
    query, upstream, lse, delta, query_grad, key_row, value_row, key_grad_row, value_grad_row, here, visible,
    scale, softmax_scale, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: adds to the gradients of its keys and values in memory, returns the query gradient's sum."""
    # As `attend_backward_keys`, but the values' gradient leaves its registers before the keys' comes.
    key = tl.load(key_row, mask=here, other=0.0)
    value = tl.load(value_row, mask=here, other=0.0)
    logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
    weight = tl.where(visible, tl.exp2(logits - lse[None, :]), 0.0)
    value_grad = tl.dot(weight.to(upstream.dtype), upstream, input_precision=PRECISION)
    tl.atomic_add(value_grad_row, value_grad, mask=here, sem="relaxed")
    weight_grad = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
    logit_grad = (weight * (weight_grad - delta[None, :])).to(key.dtype)
    key_grad = tl.dot(logit_grad, query, input_precision=PRECISION) * softmax_scale
    tl.atomic_add(key_grad_row, key_grad, mask=here, sem="relaxed")
    return query_grad + tl.dot(tl.trans(logit_grad), key, input_precision=PRECISION)


@triton.jit
def _backward(
    query_ptr, key_ptr, value_ptr, full_ptr, latest_ptr, selected_ptr, budget_ptr, padding_ptr, lse_ptr, delta_ptr,
    upstream_ptr, query_grad_ptr, key_grad_ptr, value_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, grad_b, grad_h, grad_t,
    checks, tiles, width, length, prompt, stride, scale, softmax_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    interval, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, position, partial, left, segment, anchor, budget = _interval(
        full_ptr, latest_ptr, budget_ptr, padding_ptr, batch, interval, tile, checks, length, prompt, stride, G, BLOCK_M
    )
    newest = tl.max(tl.where(partial, position, -1), 0)
    if newest < 0:
        return
    oldest = tl.min(tl.where(partial, position, length), 0)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * G
    head = kv_head * G + head
    column = tl.arange(0, DP)
    in_head = column < D
    mask = partial[:, None] & in_head[None, :]
    decoded = position.to(tl.int64) - prompt
    rows = length - prompt
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + position.to(tl.int64) * query_t
    query = tl.load(query_row[:, None] + column[None, :], mask=mask, other=0.0)
    upstream_row = upstream_ptr + batch * upstream_b + decoded * upstream_t + head.to(tl.int64) * upstream_h
    upstream = tl.load(upstream_row[:, None] + column[None, :], mask=mask, other=0.0)
    lse = tl.load(lse_ptr + (batch * heads + head) * rows + decoded, mask=partial, other=0.0)
    delta = tl.load(delta_ptr + (batch * heads + head) * rows + decoded, mask=partial, other=0.0)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    base = (batch * kv_heads + kv_head) * length
    query_grad = tl.zeros([BLOCK_M, DP], tl.float32)

    chosen = selected_ptr + ((batch * kv_heads + kv_head) * checks + segment) * width
    most = tl.max(tl.where(partial, left, 0), 0)
    for start in range(0, most, BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        token = tl.load(chosen + rank, mask=rank < most, other=0).to(tl.int64)[:, None]
        here = (rank < most)[:, None] & in_head[None, :]
        visible = (rank[:, None] < left[None, :]) & partial[None, :]
        query_grad = _tile_backward(
            query, upstream, lse, delta, query_grad,
            keys + token * key_t + column[None, :], values + token * value_t + column[None, :],
            key_grad_ptr + (base + token) * D + column[None, :], value_grad_ptr + (base + token) * D + column[None, :],
            here, visible, scale, softmax_scale, PRECISION,
        )  # fmt: skip
    first = tl.maximum(anchor + 1, oldest - budget)
    for start in range(first, newest + 1, BLOCK_N):
        near = start + tl.arange(0, BLOCK_N)
        token = near.to(tl.int64)[:, None]
        here = (near <= newest)[:, None] & in_head[None, :]
        visible = (near[:, None] <= position[None, :]) & (near[:, None] >= position[None, :] - budget)
        query_grad = _tile_backward(
            query, upstream, lse, delta, query_grad,
            keys + token * key_t + column[None, :], values + token * value_t + column[None, :],
            key_grad_ptr + (base + token) * D + column[None, :], value_grad_ptr + (base + token) * D + column[None, :],
            here, visible & partial[None, :], scale, softmax_scale, PRECISION,
        )  # fmt: skip
    grad_row = query_grad_ptr + batch * grad_b + head.to(tl.int64) * grad_h + decoded * grad_t
    result = (query_grad * softmax_scale).to(query_grad_ptr.dtype.element_ty)
    tl.store(grad_row[:, None] + column[None, :], result, mask=mask)


@triton.jit
def _backward_query(
    query_ptr, key_ptr, value_ptr, full_ptr, latest_ptr, selected_ptr, budget_ptr, padding_ptr, lse_ptr, delta_ptr,
    upstream_ptr, query_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, grad_b, grad_h, grad_t,
    checks, tiles, width, length, prompt, stride, scale, softmax_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The query gradients of a tile of rows, for intervals of several tiles."""
    interval, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, position, partial, left, segment, anchor, budget = _interval(
        full_ptr, latest_ptr, budget_ptr, padding_ptr, batch, interval, tile, checks, length, prompt, stride, G, BLOCK_M
    )
    newest = tl.max(tl.where(partial, position, -1), 0)
    if newest < 0:
        return
    oldest = tl.min(tl.where(partial, position, length), 0)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * G
    head = kv_head * G + head
    column = tl.arange(0, DP)
    in_head = column < D
    mask = partial[:, None] & in_head[None, :]
    decoded = position.to(tl.int64) - prompt
    rows = length - prompt
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + position.to(tl.int64) * query_t
    query = tl.load(query_row[:, None] + column[None, :], mask=mask, other=0.0)
    upstream_row = upstream_ptr + batch * upstream_b + decoded * upstream_t + head.to(tl.int64) * upstream_h
    upstream = tl.load(upstream_row[:, None] + column[None, :], mask=mask, other=0.0)
    lse = tl.load(lse_ptr + (batch * heads + head) * rows + decoded, mask=partial, other=0.0)
    delta = tl.load(delta_ptr + (batch * heads + head) * rows + decoded, mask=partial, other=0.0)
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    chosen = selected_ptr + ((batch * kv_heads + kv_head) * checks + segment) * width
    most = tl.max(tl.where(partial, left, 0), 0)
    first = tl.maximum(anchor + 1, oldest - budget)
    query_grad = tl.zeros([BLOCK_M, DP], tl.float32)
    for start in range(0, most, BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        token = tl.load(chosen + rank, mask=rank < most, other=0).to(tl.int64)
        here = (rank < most)[:, None] & in_head[None, :]
        key = tl.load(keys + token[:, None] * key_t + column[None, :], mask=here, other=0.0)
        value = tl.load(values + token[:, None] * value_t + column[None, :], mask=here, other=0.0)
        visible = (rank[None, :] < left[:, None]) & partial[:, None]
        query_grad = attend_backward(query, key, value, visible, lse, delta, upstream, query_grad, scale, PRECISION)
    for start in range(first, newest + 1, BLOCK_N):
        near = start + tl.arange(0, BLOCK_N)
        token = near.to(tl.int64)
        here = (near <= newest)[:, None] & in_head[None, :]
        key = tl.load(keys + token[:, None] * key_t + column[None, :], mask=here, other=0.0)
        value = tl.load(values + token[:, None] * value_t + column[None, :], mask=here, other=0.0)
        visible = (near[None, :] <= position[:, None]) & (near[None, :] >= position[:, None] - budget)
        visible = visible & partial[:, None]
        query_grad = attend_backward(query, key, value, visible, lse, delta, upstream, query_grad, scale, PRECISION)
    grad_row = query_grad_ptr + batch * grad_b + head.to(tl.int64) * grad_h + decoded * grad_t
    result = (query_grad * softmax_scale).to(query_grad_ptr.dtype.element_ty)
    tl.store(grad_row[:, None] + column[None, :], result, mask=mask)


@triton.jit
def _backward_key_value(
    query_ptr, key_ptr, value_ptr, full_ptr, latest_ptr, selected_ptr, budget_ptr, padding_ptr, lse_ptr, delta_ptr,
    upstream_ptr, key_grad_ptr, value_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h,
    checks, tiles, splits, width, length, prompt, stride, scale, softmax_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Key and value gradients for intervals of several tiles of rows: summed over the tiles before they go to memory,
    whose float32 additions are what limits this pass. A program takes every `splits`-th tile of an interval's keys."""
    interval, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    segment = tl.load(latest_ptr + batch * checks + interval).to(tl.int32)
    anchor = tl.load(full_ptr + batch * checks + segment).to(tl.int32)
    budget = tl.load(budget_ptr + batch).to(tl.int32)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    check = prompt - 1 + interval * stride
    oldest = tl.maximum(check, anchor + 1)
    newest = tl.minimum(check + stride, length) - 1
    if newest < oldest:
        return
    kept = tl.minimum(budget, anchor + 1 - padding)
    most = tl.maximum(kept - tl.maximum(kept + oldest - anchor - 1 - budget, 0), 0)
    first = tl.maximum(anchor + 1, oldest - budget)
    chosen_tiles = tl.cdiv(most, BLOCK_N)
    near_tiles = tl.cdiv(newest + 1 - first, BLOCK_N)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * G
    rows = length - prompt
    column = tl.arange(0, DP)
    in_head = column < D
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    chosen = selected_ptr + ((batch * kv_heads + kv_head) * checks + segment) * width
    base = (batch * kv_heads + kv_head) * length

    for key_tile in range(split, chosen_tiles + near_tiles, splits):
        is_chosen = key_tile < chosen_tiles
        rank = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        near = first + rank - chosen_tiles * BLOCK_N
        token = tl.load(chosen + rank, mask=rank < tl.where(is_chosen, most, 0), other=0).to(tl.int32)
        token = tl.where(is_chosen, token, near)
        number = tl.where(is_chosen, rank, near)  # what a row's bounds are about: ranks, or positions
        exists = number < tl.where(is_chosen, most, newest + 1)
        wide = token.to(tl.int64)[:, None]
        here = exists[:, None] & in_head[None, :]
        key = tl.load(keys + wide * key_t + column[None, :], mask=here, other=0.0)
        value = tl.load(values + wide * value_t + column[None, :], mask=here, other=0.0)
        key_grad = tl.zeros([BLOCK_N, DP], tl.float32)
        value_grad = tl.zeros([BLOCK_N, DP], tl.float32)
        for tile in range(tiles):
            head, position, partial, left, _, _, _ = _interval(
                full_ptr, latest_ptr, budget_ptr, padding_ptr, batch, interval, tile, checks, length, prompt, stride,
                G, BLOCK_M,
            )  # fmt: skip
            head = kv_head * G + head
            mask = partial[:, None] & in_head[None, :]
            decoded = position.to(tl.int64) - prompt
            query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + position.to(tl.int64) * query_t
            query = tl.load(query_row[:, None] + column[None, :], mask=mask, other=0.0)
            upstream_row = upstream_ptr + batch * upstream_b + decoded * upstream_t + head.to(tl.int64) * upstream_h
            upstream = tl.load(upstream_row[:, None] + column[None, :], mask=mask, other=0.0)
            lse = tl.load(lse_ptr + (batch * heads + head) * rows + decoded, mask=partial, other=0.0)
            delta = tl.load(delta_ptr + (batch * heads + head) * rows + decoded, mask=partial, other=0.0)
            lowest = tl.where(is_chosen, 0, position - budget)
            beyond = tl.where(is_chosen, left, position + 1)
            visible = (number[:, None] >= lowest[None, :]) & (number[:, None] < beyond[None, :]) & partial[None, :]
            key_grad, value_grad = attend_backward_keys(
                query, key, value, visible, lse, delta, upstream, key_grad, value_grad, scale, PRECISION
            )
        place = (base + wide) * D + column[None, :]
        tl.atomic_add(value_grad_ptr + place, value_grad, mask=here, sem="relaxed")
        tl.atomic_add(key_grad_ptr + place, key_grad * softmax_scale, mask=here, sem="relaxed")


def _grid(query: Tensor, kv_heads: int, checks: int, prompt_length: int, stride: int, block: int) -> tuple[tuple, int]:
    """The launch grid, and how many tiles an interval has."""
    batch, heads, length, _ = query.shape
    longest = min(stride, length - prompt_length + 1)
    tiles = triton.cdiv(longest * (heads // kv_heads), block)
    return (checks * tiles, kv_heads, batch), tiles


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_positions: Tensor,
    latest: Tensor,
    selected: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    output: Tensor,
    prompt_length: int,
    stride: int,
    scaling: float,
) -> Tensor:
    """Writes the partial rows of `output` (B, R, H, D); the full steps' rows stay untouched.

    query (B, H, T, D); key, value (B, Hkv, T, D); full_positions, latest (B, C) int64; selected (B, Hkv, C, W) int32;
    budgets, left_padding (B,) int64. Returns the rows' log-sum-exp (B, H, R) float32, in units of log 2.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, checks = key.shape[1], full_positions.shape[1]
    lse = torch.empty(batch, heads, length - prompt_length, dtype=torch.float32, device=query.device)
    sizes = block_sizes("partial_forward", query)
    grid, tiles = _grid(query, kv_heads, checks, prompt_length, stride, sizes["BLOCK_M"])
    _forward[grid](
        query, key, value, full_positions, latest, selected, budgets, left_padding, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        checks, tiles, selected.shape[-1], length, prompt_length, stride, scaling * LOG2E,
        G=heads // kv_heads, D=head_dim, DP=padded_head(head_dim), PRECISION=precision(query), **sizes,
    )  # fmt: skip
    return lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_positions: Tensor,
    latest: Tensor,
    selected: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    lse: Tensor,
    delta: Tensor,
    upstream: Tensor,
    query_grad: Tensor,
    key_grad: Tensor,
    value_grad: Tensor,
    prompt_length: int,
    stride: int,
    scaling: float,
) -> None:
    """Writes the partial rows of `query_grad` (B, H, R, D), and adds to the float32 `key_grad`, `value_grad`.

    upstream (B, R, H, D): gradient of the output; delta (B, H, R) float32: its dot product with the output; the others
    as in `forward`. key_grad, value_grad (B, Hkv, T, D) hold what the full steps' rows gave.
    """
    _, heads, length, head_dim = query.shape
    kv_heads, checks = key.shape[1], full_positions.shape[1]
    group = heads // kv_heads
    rows = (query, key, value, full_positions, latest, selected, budgets, left_padding, lse, delta, upstream)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *upstream.stride()[:3])
    numbers = (selected.shape[-1], length, prompt_length, stride, scaling * LOG2E, scaling)
    shape = {"G": group, "D": head_dim, "DP": padded_head(head_dim), "PRECISION": precision(query)}
    sizes = block_sizes("partial_backward", query)
    grid, tiles = _grid(query, kv_heads, checks, prompt_length, stride, sizes["BLOCK_M"])
    if tiles == 1:
        _backward[grid](
            *rows, query_grad, key_grad, value_grad, *strides, *query_grad.stride()[:3], checks, tiles, *numbers,
            **shape, **sizes,
        )  # fmt: skip
        return
    sizes = block_sizes("partial_backward_query", query)
    grid, tiles = _grid(query, kv_heads, checks, prompt_length, stride, sizes["BLOCK_M"])
    _backward_query[grid](
        *rows, query_grad, *strides, *query_grad.stride()[:3], checks, tiles, *numbers, **shape, **sizes
    )  # fmt: skip
    sizes = block_sizes("partial_backward_key_value", query)
    (_, heads_axis, batch_axis), tiles = _grid(query, kv_heads, checks, prompt_length, stride, sizes["BLOCK_M"])
    splits = min(KEY_SPLITS, triton.cdiv(selected.shape[-1], sizes["BLOCK_N"]) + 1)
    _backward_key_value[checks * splits, heads_axis, batch_axis](
        *rows, key_grad, value_grad, *strides, checks, tiles, splits, *numbers, **shape, **sizes
    )  # fmt: skip
