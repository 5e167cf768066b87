"""Triton kernels for the full steps after a prompt: each attends to all keys up to its position.

The rows of a key/value head are the pairs (decision step, head of the group), decision step first. The rows of a tile
therefore end at almost the same key: the tiles of keys that all of them see whole come first and need no mask, the few
others follow in a second loop. Decision steps that are not full, position -1, are skipped.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `C` decision steps, `H` query heads, `Hkv`
key/value heads, `G = H / Hkv`, `D` head size; a program has BLOCK_M rows and takes BLOCK_N keys at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.state import AttentionInputs, Plan
from refreshkv.ops.tiles import (
    LOG2E,
    add_sinks,
    attend,
    attend_backward,
    attend_backward_keys,
    block_sizes,
    cap_of,
    index_type,
    kernel_terms,
    load_rows,
    padded_head,
    precision,
)


@triton.jit
def _rows(position_ptr, padding_ptr, batch, tile, decisions, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of a tile: each one's decision step, head of the group and position, -1 outside or if not full; and the
    first column that exists."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    decision = row // G
    # [BLOCK_M]
    position = tl.load(position_ptr + batch * decisions + decision, mask=decision < decisions, other=-1).to(tl.int32)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    return decision, row % G, position, padding


@triton.jit
def _extent(position, first, BLOCK_N: tl.constexpr):
    """The last key that any row of a tile sees, and where the tiles of keys end that all rows see whole."""
    lowest = tl.min(tl.where(position >= 0, position, 0x7FFFFFFF), 0)
    return tl.max(position, 0), first + tl.maximum(lowest + 1 - first, 0) // BLOCK_N * BLOCK_N


@triton.jit(do_not_specialize=["prompt", "shift", "decisions"])
def _forward(
    query_ptr, key_ptr, value_ptr, position_ptr, padding_ptr, output_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_t, output_h,
    decisions, prompt, shift, scale, sink_ptr,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The outputs and log-sum-exps of BLOCK_M rows."""
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    decision, head, position, padding = _rows(position_ptr, padding_ptr, batch, tile, decisions, G, BLOCK_M)
    last, whole = _extent(position, padding, BLOCK_N)
    if last < 0:
        return
    heads = tl.num_programs(1) * G
    head = kv_head * G + head
    exists = position >= 0
    column = tl.arange(0, DP)
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (position - shift).to(tl.int64) * query_t
    # [BLOCK_M, DP]
    query = load_rows(query_row, column, exists, D, DP, True)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, DP], tl.float32)
    for start in range(padding, whole, BLOCK_N):
        token = (start + tl.arange(0, BLOCK_N)).to(INDEX)
        # [BLOCK_N, DP] twice
        key = load_rows(keys + token * key_t, column, token >= 0, D, DP, False)
        value = load_rows(values + token * value_t, column, token >= 0, D, DP, False)
        highest, total, result = attend(query, key, value, None, highest, total, result, scale, PRECISION, CAP)
    for start in range(whole, last + 1, BLOCK_N):
        token = (start + tl.arange(0, BLOCK_N)).to(INDEX)
        # [BLOCK_N, DP] twice
        key = load_rows(keys + token * key_t, column, token <= last, D, DP, True)
        value = load_rows(values + token * value_t, column, token <= last, D, DP, True)
        visible = token[None, :] <= position[:, None]
        highest, total, result = attend(query, key, value, visible, highest, total, result, scale, PRECISION, CAP)
    highest, total, result = add_sinks(sink_ptr, head, exists, highest, total, result)
    total = tl.where(exists, total, 1.0)
    result = result / total[:, None]
    tl.store(lse_ptr + (batch * heads + head) * decisions + decision, highest + tl.log2(total), mask=exists)
    decoded = position.to(tl.int64) - prompt
    output_row = output_ptr + batch * output_b + decoded * output_t + head.to(tl.int64) * output_h
    tl.store(
        output_row[:, None] + column[None, :],
        result.to(output_ptr.dtype.element_ty),
        mask=(decoded >= 0)[:, None] & (column < D)[None, :],
    )


@triton.jit
def _backward_rows(
    query_ptr, lse_ptr, delta_ptr, upstream_ptr, query_b, query_h, query_t, upstream_b, upstream_t, upstream_h,
    batch, head, heads, decision, decisions, position, prompt, shift, decoded_rows, column,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The rows of a tile: each one's index after the prompt, whether there is one, query, upstream gradient,
    log-sum-exp and delta."""
    decoded = position.to(tl.int64) - prompt
    exists = decoded >= 0
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (position - shift).to(tl.int64) * query_t
    upstream_row = upstream_ptr + batch * upstream_b + decoded * upstream_t + head.to(tl.int64) * upstream_h
    # [BLOCK_M, DP] twice, then [BLOCK_M] twice
    query = load_rows(query_row, column, exists, D, DP, True)
    upstream = load_rows(upstream_row, column, exists, D, DP, True)
    # an infinite log-sum-exp makes every weight of a row that does not exist zero
    lse = tl.load(lse_ptr + (batch * heads + head) * decisions + decision, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + (batch * heads + head) * decoded_rows + decoded, mask=exists, other=0.0)
    return decoded, exists, query, upstream, lse, delta


@triton.jit(do_not_specialize=["prompt", "shift", "decisions", "decoded_rows"])
def _backward_query(
    query_ptr, key_ptr, value_ptr, position_ptr, padding_ptr, lse_ptr, delta_ptr, upstream_ptr, query_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, grad_b, grad_h, grad_t, decoded_rows, decisions, prompt, shift, scale,
    softmax_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The query gradients of BLOCK_M rows."""
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    decision, head, position, padding = _rows(position_ptr, padding_ptr, batch, tile, decisions, G, BLOCK_M)
    position = tl.where(position >= prompt, position, -1)
    last, whole = _extent(position, padding, BLOCK_N)
    if last < prompt:
        return
    heads = tl.num_programs(1) * G
    head = kv_head * G + head
    column = tl.arange(0, DP)
    decoded, exists, query, upstream, lse, delta = _backward_rows(
        query_ptr, lse_ptr, delta_ptr, upstream_ptr, query_b, query_h, query_t, upstream_b, upstream_t, upstream_h,
        batch, head, heads, decision, decisions, position, prompt, shift, decoded_rows, column, D, DP,
    )  # fmt: skip
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    query_grad = tl.zeros([BLOCK_M, DP], tl.float32)
    for start in range(padding, whole, BLOCK_N):
        token = (start + tl.arange(0, BLOCK_N)).to(INDEX)
        # [BLOCK_N, DP] twice
        key = load_rows(keys + token * key_t, column, token >= 0, D, DP, False)
        value = load_rows(values + token * value_t, column, token >= 0, D, DP, False)
        query_grad = attend_backward(query, key, value, None, lse, delta, upstream, query_grad, scale, PRECISION, CAP)
    for start in range(whole, last + 1, BLOCK_N):
        token = (start + tl.arange(0, BLOCK_N)).to(INDEX)
        # [BLOCK_N, DP] twice
        key = load_rows(keys + token * key_t, column, token <= last, D, DP, True)
        value = load_rows(values + token * value_t, column, token <= last, D, DP, True)
        visible = token[None, :] <= position[:, None]
        query_grad = attend_backward(
            query, key, value, visible, lse, delta, upstream, query_grad, scale, PRECISION, CAP
        )
    grad_row = query_grad_ptr + batch * grad_b + head.to(tl.int64) * grad_h + decoded * grad_t
    mask = exists[:, None] & (column < D)[None, :]
    result = (query_grad * softmax_scale).to(query_grad_ptr.dtype.element_ty)
    tl.store(grad_row[:, None] + column[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["prompt", "shift", "stride", "decisions", "decoded_rows"])
def _backward_key_value(
    query_ptr, key_ptr, value_ptr, position_ptr, padding_ptr, lse_ptr, delta_ptr, upstream_ptr,
    key_grad_ptr, value_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, sums_b, sums_h, sums_t,
    decoded_rows, decisions, length, prompt, shift, stride, scale,
    softmax_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of BLOCK_N keys and values, to which the partial steps are added: (B, Hkv, T, D) float32."""
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * G
    start = block * BLOCK_N
    token = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, DP)
    wide = token.to(tl.int64)
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    # [BLOCK_N, DP] twice
    key = load_rows(keys + wide * key_t, column, token < length, D, DP, True)
    value = load_rows(values + wide * value_t, column, token < length, D, DP, True)
    key_grad = tl.zeros([BLOCK_N, DP], tl.float32)
    value_grad = tl.zeros([BLOCK_N, DP], tl.float32)
    # decision steps after the prompt: the first not before this tile's first key, the first not before its last
    some = tl.maximum(1, (start - prompt + stride) // stride)
    every = tl.maximum(1, (start + BLOCK_N - 1 - prompt + stride) // stride)
    tiles = tl.cdiv(decisions * G, BLOCK_M)
    whole = tl.minimum(tl.cdiv(every * G, BLOCK_M), tiles)
    for tile in range(some * G // BLOCK_M, whole):
        decision, head, position, padding = _rows(position_ptr, padding_ptr, batch, tile, decisions, G, BLOCK_M)
        decoded, exists, query, upstream, lse, delta = _backward_rows(
            query_ptr, lse_ptr, delta_ptr, upstream_ptr, query_b, query_h, query_t, upstream_b, upstream_t, upstream_h,
            batch, kv_head * G + head, heads, decision, decisions, position, prompt, shift, decoded_rows, column, D, DP,
        )  # fmt: skip
        visible = token[:, None] <= position[None, :]
        key_grad, value_grad = attend_backward_keys(
            query, key, value, visible, lse, delta, upstream, key_grad, value_grad, scale, PRECISION, CAP
        )
    for tile in range(whole, tiles):
        decision, head, position, padding = _rows(position_ptr, padding_ptr, batch, tile, decisions, G, BLOCK_M)
        decoded, exists, query, upstream, lse, delta = _backward_rows(
            query_ptr, lse_ptr, delta_ptr, upstream_ptr, query_b, query_h, query_t, upstream_b, upstream_t, upstream_h,
            batch, kv_head * G + head, heads, decision, decisions, position, prompt, shift, decoded_rows, column, D, DP,
        )  # fmt: skip
        key_grad, value_grad = attend_backward_keys(
            query, key, value, None, lse, delta, upstream, key_grad, value_grad, scale, PRECISION, CAP
        )
    present = (token >= tl.load(padding_ptr + batch).to(tl.int32))[:, None]  # no row sees padding
    place = (batch * sums_b + kv_head.to(tl.int64) * sums_h + wide * sums_t)[:, None] + column[None, :]
    here = (token < length)[:, None] & (column < D)[None, :]
    tl.store(key_grad_ptr + place, tl.where(present, key_grad * softmax_scale, 0.0), mask=here)
    tl.store(value_grad_ptr + place, tl.where(present, value_grad, 0.0), mask=here)


def forward(inputs: AttentionInputs, plan: Plan, output: Tensor) -> Tensor:
    """Writes the full steps' positions after the prompt into `output`; returns all full steps' log-sum-exp.

    output (B, R, H, D): the other positions stay untouched. Returns (B, H, C) float32, in units of log 2, undefined
    where there is no step.
    """
    query, key, value, scaling, terms = inputs
    batch, heads, _, head_dim = query.shape
    kv_heads, decisions = key.shape[1], plan.full_positions.shape[1]
    lse = torch.empty(batch, heads, decisions, dtype=torch.float32, device=query.device)
    sizes = block_sizes("full_forward", query)
    grid = (triton.cdiv(decisions * (heads // kv_heads), sizes["BLOCK_M"]), kv_heads, batch)
    _forward[grid](
        query, key, value, plan.full_positions, plan.left_padding, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        decisions, plan.prompt_length, key.shape[2] - query.shape[2], scaling * LOG2E,
        G=heads // kv_heads, D=head_dim, DP=padded_head(head_dim), INDEX=index_type(key, value),
        PRECISION=precision(query), **kernel_terms(terms), **sizes,
    )  # fmt: skip
    return lse


def backward(
    inputs: AttentionInputs, plan: Plan, lse: Tensor, delta: Tensor, upstream: Tensor, query_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the full steps' positions of `query_grad` (B, H, R, D); returns the gradients of keys and values so far.

    lse: what `forward` returned; upstream (B, R, H, D): gradient of the output; delta (B, H, R) float32: its dot
    product with the output. Returns two (B, Hkv, T, D) float32 sums, to which the partial rows are added.
    """
    query, key, value, scaling, terms = inputs
    batch, heads, queries, head_dim = query.shape
    kv_heads, length, decisions, decoded = key.shape[1], key.shape[2], plan.full_positions.shape[1], upstream.shape[1]
    group = heads // kv_heads
    shared = {"G": group, "D": head_dim, "DP": padded_head(head_dim), "PRECISION": precision(query)}
    shared["CAP"] = cap_of(terms)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *upstream.stride()[:3])
    rows = (query, key, value, plan.full_positions, plan.left_padding, lse, delta, upstream)
    key_grad = torch.empty_like(key, dtype=torch.float32)
    value_grad = torch.empty_like(key_grad)
    sizes = block_sizes("full_backward_query", query)
    _backward_query[triton.cdiv(decisions * group, sizes["BLOCK_M"]), kv_heads, batch](
        *rows, query_grad, *strides, *query_grad.stride()[:3], decoded, decisions, plan.prompt_length,
        length - queries, scaling * LOG2E, scaling, INDEX=index_type(key, value), **shared, **sizes,
    )  # fmt: skip
    sizes = block_sizes("full_backward_key_value", query)
    _backward_key_value[triton.cdiv(length, sizes["BLOCK_N"]), kv_heads, batch](
        *rows, key_grad, value_grad, *strides, *key_grad.stride()[:3], decoded, decisions, length, plan.prompt_length,
        length - queries, plan.stride, scaling * LOG2E, scaling, **shared, **sizes,
    )  # fmt: skip
    return key_grad, value_grad
