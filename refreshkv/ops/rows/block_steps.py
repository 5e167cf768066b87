"""Triton kernels for partial and selecting steps in short segments: a block of positions attends to its key list.

A program computes the rows of one block, pairs (position, head of the group): every key of its list is gathered once
for all of them, and a bit of the key's mask says whether a row sees it. Rows that see nothing are full steps, or lie
beyond the sequence.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `H` query heads, `Hkv` key/value heads,
`G = H / Hkv`, `D` head size, `J` blocks; a program has BLOCK_M rows and takes BLOCK_N keys at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.rows.key_lists import LARGEST_BLOCK, key_lists
from refreshkv.ops.rows.partial_steps import MANY_SPLITS
from refreshkv.ops.rows.segments import Segments
from refreshkv.ops.state import AttentionInputs, Plan
from refreshkv.ops.tiles import (
    LOG2E,
    MANY_PROGRAMS,
    add_parts,
    attend,
    block_sizes,
    dot_parts,
    index_type,
    load_parts,
    load_rows,
    padded_head,
    precision,
)


@triton.jit
def _rows(block, positions, prompt, length, kv_head, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of a block: each one's bit in the masks, query head and position after the prompt, and if it exists."""
    row = tl.arange(0, BLOCK_M)
    bit = row // G
    decoded = block * positions + bit - 1
    exists = (bit < positions) & (decoded >= 0) & (decoded < length - prompt)
    return bit, kv_head * G + row % G, decoded.to(tl.int64), exists


@triton.jit
def _listed(tokens, masks, start, count, BLOCK_N: tl.constexpr):
    """The tokens at some numbers of a list, whose last is repeated past the end, and their masks: twice [BLOCK_N]."""
    number = start + tl.arange(0, BLOCK_N)
    # [BLOCK_N] twice
    token = tl.load(tokens + tl.minimum(number, count - 1))
    mask = tl.load(masks + number, mask=number < count, other=0)
    return token, mask


@triton.jit(do_not_specialize=["prompt", "shift", "first", "blocks"])
def _forward(
    query_ptr, key_ptr, value_ptr, token_ptr, mask_ptr, count_ptr, output_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_t, output_h,
    length, prompt, shift, first, positions, blocks, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs and log-sum-exps of one block; the latter are infinite where a row sees nothing."""
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_heads, rows = tl.num_programs(1), length - prompt
    bit, head, decoded, exists = _rows(first + block, positions, prompt, length, kv_head, G, BLOCK_M)
    column = tl.arange(0, DP)
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (decoded + prompt - shift) * query_t
    # [BLOCK_M, DP]
    query = load_rows(query_row, column, exists, D, DP, True)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    row = (batch * kv_heads + kv_head) * blocks + block
    tokens, masks, count = token_ptr + row * length, mask_ptr + row * length, tl.load(count_ptr + row)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, DP], tl.float32)
    for start in range(0, count, BLOCK_N):
        token, mask = _listed(tokens, masks, start, count, BLOCK_N)
        token = token.to(INDEX)
        visible = ((mask[None, :] >> bit[:, None]) & 1) != 0
        # [BLOCK_N, DP] twice
        key = load_rows(keys + token * key_t, column, token >= 0, D, DP, False)
        value = load_rows(values + token * value_t, column, token >= 0, D, DP, False)
        highest, total, result = attend(query, key, value, visible, highest, total, result, scale, PRECISION)

    seen = exists & (total > 0)
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, highest + tl.log2(total), float("inf"))
    tl.store(lse_ptr + (batch * kv_heads * G + head) * rows + decoded, lse, mask=exists)
    result = result / total[:, None]
    output_row = output_ptr + batch * output_b + decoded * output_t + head.to(tl.int64) * output_h
    mask = seen[:, None] & (column < D)[None, :]
    tl.store(output_row[:, None] + column[None, :], result.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_backward(
    query, upstream, lse, delta, query_grad, key_row, value_row, key_grad_row, value_grad_row, column, exists, visible,
    scale, softmax_scale, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile's part to the gradients of its keys and values in memory; returns the sum of the transposed query
    gradient, PARTS times [WIDTH, BLOCK_M]."""
    # PARTS times [BLOCK_N, WIDTH], twice
    key = load_parts(key_row, column, exists, D, WIDTH, PARTS, False)
    value = load_parts(value_row, column, exists, D, WIDTH, PARTS, False)
    # [BLOCK_N, BLOCK_M]
    weight = tl.exp2(dot_parts(key, query, PARTS, PRECISION) * scale - lse[None, :])
    weight = tl.where(visible, weight, 0.0)
    weight_grad = dot_parts(value, upstream, PARTS, PRECISION)
    rounded = weight.to(upstream[0].dtype)
    add_parts(value_grad_row, column, exists, rounded, upstream, D, WIDTH, PARTS, False, PRECISION)
    logit_grad = (weight * (weight_grad - delta[None, :]) * softmax_scale).to(key[0].dtype)
    sums = ()
    for part in tl.static_range(PARTS):
        sums = sums + (tl.dot(tl.trans(key[part]), logit_grad, query_grad[part], input_precision=PRECISION),)
    add_parts(key_grad_row, column, exists, logit_grad, query, D, WIDTH, PARTS, False, PRECISION)
    return sums


@triton.jit(do_not_specialize=["prompt", "shift", "first", "blocks"])
def _backward(
    query_ptr, key_ptr, value_ptr, token_ptr, mask_ptr, count_ptr, lse_ptr, delta_ptr, upstream_ptr,
    query_grad_ptr, key_grad_ptr, value_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, grad_b, grad_h, grad_t, sums_b, sums_h, sums_t,
    length, prompt, shift, first, positions, blocks, scale, softmax_scale,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `partial_steps._backward`, for the rows of one block. Products are keys by rows, [BLOCK_N, BLOCK_M], so that a
    tensor core's tile is filled by keys where a block has few rows."""
    split, block = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_heads, rows = tl.num_programs(1), length - prompt
    bit, head, decoded, exists = _rows(first + block, positions, prompt, length, kv_head, G, BLOCK_M)
    column = tl.arange(0, WIDTH)
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (decoded + prompt - shift) * query_t
    # PARTS times [BLOCK_M, WIDTH], twice; then [BLOCK_M] twice
    query = load_parts(query_row, column, exists, D, WIDTH, PARTS, True)
    upstream_row = upstream_ptr + batch * upstream_b + decoded * upstream_t + head.to(tl.int64) * upstream_h
    upstream = load_parts(upstream_row, column, exists, D, WIDTH, PARTS, True)
    place = (batch * kv_heads * G + head) * rows + decoded
    lse = tl.load(lse_ptr + place, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + place, mask=exists, other=0.0)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    sums = batch * sums_b + kv_head.to(tl.int64) * sums_h
    key_grads, value_grads = key_grad_ptr + sums, value_grad_ptr + sums
    row = (batch * kv_heads + kv_head) * blocks + block
    tokens, masks, count = token_ptr + row * length, mask_ptr + row * length, tl.load(count_ptr + row)
    query_grad = ()
    for _ in tl.static_range(PARTS):
        query_grad = query_grad + (tl.zeros([WIDTH, BLOCK_M], tl.float32),)
    share = tl.cdiv(tl.cdiv(count, BLOCK_N), SPLITS) * BLOCK_N
    for start in range(split * share, tl.minimum(count, (split + 1) * share), BLOCK_N):
        token, mask = _listed(tokens, masks, start, count, BLOCK_N)
        token = token.to(INDEX)
        visible = ((mask[:, None] >> bit[None, :]) & 1) != 0
        query_grad = _tile_backward(
            query, upstream, lse, delta, query_grad,
            keys + token * key_t, values + token * value_t, key_grads + token * sums_t, value_grads + token * sums_t,
            column, token >= 0, visible, scale, softmax_scale, D, WIDTH, PARTS, PRECISION,
        )  # fmt: skip
    seen = exists & (lse < float("inf"))
    grad_row = query_grad_ptr + batch * grad_b + head.to(tl.int64) * grad_h + decoded * grad_t
    for part in tl.static_range(PARTS):
        columns = part * WIDTH + column
        mask = seen[None, :] & (columns < D)[:, None]
        result = query_grad[part].to(query_grad_ptr.dtype.element_ty)
        if SPLITS > 1:
            tl.atomic_add(grad_row[None, :] + columns[:, None], result, mask=mask, sem="relaxed")
        else:
            tl.store(grad_row[None, :] + columns[:, None], result, mask=mask)


def block_positions(query: Tensor, key: Tensor, segments: Segments) -> int:
    """Positions of a block: as many whole segments as fill a tile of rows; 0 if not even one does."""
    most = block_sizes("block_forward", query)["BLOCK_M"] // (query.shape[1] // key.shape[1])
    return min(LARGEST_BLOCK, most) // segments.longest * segments.longest


def takes(query: Tensor, key: Tensor, segments: Segments) -> bool:
    """True if segments are so short that these kernels are the faster ones."""
    has_partial = segments.longest > 1 or segments.anchors.shape[1] > segments.full
    return has_partial and 2 * segments.longest <= block_positions(query, key, segments)


def forward(inputs: AttentionInputs, plan: Plan, segments: Segments, selected: Tensor, output: Tensor) -> Tensor:
    """As `partial_steps.forward`; the log-sum-exp is infinite at full steps."""
    query, key, value, scaling = inputs
    batch, heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    lse = torch.empty(batch, heads, length - plan.prompt_length, dtype=torch.float32, device=query.device)
    sizes, positions = block_sizes("block_forward", query), block_positions(query, key, segments)
    sizes["BLOCK_M"] = rows_of(positions * (heads // kv_heads))
    for lists in key_lists(plan, segments, selected, length, positions):
        blocks = lists.counts.shape[2]
        _forward[blocks, kv_heads, batch](
            query, key, value, *lists[:3], output, lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
            length, plan.prompt_length, length - query.shape[2], lists.first, positions, blocks, scaling * LOG2E,
            G=heads // kv_heads, D=head_dim, DP=padded_head(head_dim), INDEX=index_type(key, value),
            PRECISION=precision(query), **sizes,
        )  # fmt: skip
    return lse


def backward(
    inputs: AttentionInputs,
    plan: Plan,
    segments: Segments,
    selected: Tensor,
    lse: Tensor,
    delta: Tensor,
    upstream: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """As `partial_steps.backward`; lse: what `forward` returned."""
    query, key, value, scaling = inputs
    query_grad, key_grad, value_grad = gradients
    batch, heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group, positions = heads // kv_heads, block_positions(query, key, segments)
    sizes = block_sizes("block_backward", query)
    sizes["BLOCK_M"] = rows_of(positions * group)
    programs = triton.cdiv(length - plan.prompt_length + 1, positions) * kv_heads * batch
    splits = max(1, min(MANY_SPLITS, MANY_PROGRAMS // (4 * programs)))
    # several programs add to one row: in float32, joined with the full steps' rows afterwards
    sums = query_grad if splits == 1 else torch.zeros(query_grad.shape, dtype=torch.float32, device=query.device)
    for lists in key_lists(plan, segments, selected, length, positions):
        blocks = lists.counts.shape[2]
        _backward[blocks * splits, kv_heads, batch](
            query, key, value, *lists[:3], lse, delta, upstream, sums, key_grad, value_grad,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *upstream.stride()[:3], *sums.stride()[:3],
            *key_grad.stride()[:3],
            length, plan.prompt_length, length - query.shape[2], lists.first, positions, blocks, scaling * LOG2E,
            scaling,
            G=group, D=head_dim, INDEX=index_type(key, value, key_grad), PRECISION=precision(query),
            PARTS=padded_head(head_dim) // sizes["WIDTH"], SPLITS=splits, **sizes,
        )  # fmt: skip
    if splits > 1:
        query_grad += sums


def rows_of(rows: int) -> int:
    """The tile of a block's rows: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rows))
