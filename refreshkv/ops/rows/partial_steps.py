"""Triton kernels for the partial steps: each attends to its segment's selected keys and to the recent ones.

All positions of an interval (`segments.py`) decode from the selection of one anchor, but the anchor itself if it is a
full step. A program computes rows of one interval, pairs (position, head of the group). The grid is the same for every
schedule.

The keys of a tile of rows are one list: the selected ones by rank, then the recent ones by position. The tiles of keys
that every row sees whole come first and need no mask; the rest follows in a second loop.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `A` anchors, `H` query heads, `Hkv` key/value
heads, `G = H / Hkv`, `D` head size, `W` slots of a selection; a program has BLOCK_M rows and takes BLOCK_N keys at a
time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.rows.segments import Segments
from refreshkv.ops.state import AttentionInputs, Plan
from refreshkv.ops.tiles import (
    LOG2E,
    MANY_PROGRAMS,
    add_parts,
    add_sinks,
    attend,
    block_sizes,
    cap_of,
    cap_slope,
    capped,
    dot_parts,
    fits,
    index_type,
    kernel_terms,
    load_parts,
    load_rows,
    padded_head,
    precision,
    register_limit,
    zero_parts,
)


@triton.jit
def _interval(
    anchor_ptr, start_ptr, latest_ptr, budget_ptr, padding_ptr, batch, interval, tile, anchors, intervals, full,
    G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The rows of a tile: each one's head of the group and position, whether it decodes from a selection, and how many
    ranks its queue still holds; then the number and the position of the anchor; the budget."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    number = tl.load(latest_ptr + batch * intervals + interval).to(tl.int32)
    anchor = tl.load(anchor_ptr + batch * anchors + number).to(tl.int32)
    budget = tl.load(budget_ptr + batch).to(tl.int32)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    position = tl.load(start_ptr + interval).to(tl.int32) + row // G
    end = tl.load(start_ptr + interval + 1).to(tl.int32)
    partial = (position < end) & (position >= tl.where(number >= full, anchor, anchor + 1))
    selected = tl.minimum(budget, anchor + 1 - padding)
    left = selected - tl.maximum(selected + position - anchor - 1 - budget, 0)
    return row % G, position, partial, left, number, anchor, budget


@triton.jit
def _key_list(partial, position, left, anchor, budget, length):
    """The list of keys of a tile: how many selected ones it has, how many of them all rows see, its first recent
    position, and its end."""
    newest = tl.max(tl.where(partial, position, -1), 0)
    oldest = tl.min(tl.where(partial, position, length), 0)
    most = tl.maximum(tl.max(tl.where(partial, left, 0), 0), 0)
    seen_by_all = tl.maximum(tl.min(tl.where(partial, left, most), 0), 0)
    first = tl.maximum(anchor + 1, oldest - budget)
    return most, seen_by_all, first, most + newest + 1 - first


@triton.jit
def _listed(chosen, number, most, first):
    """The tokens [BLOCK_N] at some numbers of the list; what `_visible` compares, the rank of a selected one, the
    position of a recent one; and which are selected."""
    is_chosen = number < most
    recent = first + number - most
    # [BLOCK_N]
    token = tl.load(chosen + number, mask=is_chosen, other=0).to(tl.int32)
    return tl.where(is_chosen, token, recent), tl.where(is_chosen, number, recent), is_chosen


@triton.jit
def _visible(bounded, is_chosen, position, left, budget):
    """Which of the listed keys each row sees: [BLOCK_M, BLOCK_N]."""
    lowest = tl.where(is_chosen[None, :], 0, (position - budget)[:, None])
    beyond = tl.where(is_chosen[None, :], left[:, None], (position + 1)[:, None])
    return (bounded[None, :] >= lowest) & (bounded[None, :] < beyond)


@triton.jit(do_not_specialize=["prompt", "shift", "anchors", "intervals", "full", "tiles"])
def _forward(
    query_ptr, key_ptr, value_ptr, anchor_ptr, start_ptr, latest_ptr, selected_ptr, budget_ptr, padding_ptr,
    output_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_t, output_h,
    anchors, intervals, full, tiles, width, length, prompt, shift, scale, sink_ptr,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The outputs and log-sum-exps of BLOCK_M rows."""
    interval, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, position, partial, left, which, anchor, budget = _interval(
        anchor_ptr, start_ptr, latest_ptr, budget_ptr, padding_ptr, batch, interval, tile, anchors, intervals, full,
        G, BLOCK_M,
    )  # fmt: skip
    most, seen_by_all, first, end = _key_list(partial, position, left, anchor, budget, length)
    if end <= 0:
        return
    kv_heads = tl.num_programs(1)
    heads = kv_heads * G
    head = kv_head * G + head
    column = tl.arange(0, DP)
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (position - shift).to(tl.int64) * query_t
    # [BLOCK_M, DP]
    query = load_rows(query_row, column, partial, D, DP, True)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    chosen = selected_ptr + ((batch * kv_heads + kv_head) * anchors + which) * width
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, DP], tl.float32)
    whole = seen_by_all // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        # [BLOCK_N], then [BLOCK_N, DP] twice
        token = tl.load(chosen + start + tl.arange(0, BLOCK_N)).to(INDEX)
        key = load_rows(keys + token * key_t, column, token >= 0, D, DP, False)
        value = load_rows(values + token * value_t, column, token >= 0, D, DP, False)
        highest, total, result = attend(query, key, value, None, highest, total, result, scale, PRECISION, CAP)
    for start in range(whole, end, BLOCK_N):
        number = start + tl.arange(0, BLOCK_N)
        token, bounded, is_chosen = _listed(chosen, number, most, first)
        # [BLOCK_N, DP] twice
        key = load_rows(keys + token.to(INDEX) * key_t, column, number < end, D, DP, True)
        value = load_rows(values + token.to(INDEX) * value_t, column, number < end, D, DP, True)
        visible = _visible(bounded, is_chosen, position, left, budget)
        highest, total, result = attend(query, key, value, visible, highest, total, result, scale, PRECISION, CAP)

    highest, total, result = add_sinks(sink_ptr, head, partial, highest, total, result)
    total = tl.where(partial, total, 1.0)
    result = result / total[:, None]
    decoded = position.to(tl.int64) - prompt
    rows = length - prompt
    tl.store(lse_ptr + (batch * heads + head) * rows + decoded, highest + tl.log2(total), mask=partial)
    output_row = output_ptr + batch * output_b + decoded * output_t + head.to(tl.int64) * output_h
    mask = partial[:, None] & (column < D)[None, :]
    tl.store(output_row[:, None] + column[None, :], result.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_backward(
    query, upstream, lse, delta, query_grad, key_row, value_row, key_grad_row, value_grad_row, column, exists, visible,
    scale, softmax_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Adds one tile's part to the gradients of its keys and values in memory; returns the query gradient's sum.

    CAP: as in `tiles.capped`.
    """
    # PARTS times [BLOCK_N, WIDTH], twice
    key = load_parts(key_row, column, exists, D, WIDTH, PARTS, MASKED)
    value = load_parts(value_row, column, exists, D, WIDTH, PARTS, MASKED)
    # [BLOCK_M, BLOCK_N]
    logits = capped(dot_parts(query, key, PARTS, PRECISION) * scale, CAP)
    weight = tl.exp2(logits - lse[:, None])
    if visible is not None:
        weight = tl.where(visible, weight, 0.0)
    weight_grad = dot_parts(upstream, value, PARTS, PRECISION)
    rounded = tl.trans(weight.to(upstream[0].dtype))
    add_parts(value_grad_row, column, exists, rounded, upstream, D, WIDTH, PARTS, MASKED, PRECISION)
    logit_grad = weight * (weight_grad - delta[:, None]) * softmax_scale
    if CAP is not None:
        logit_grad = logit_grad * cap_slope(logits, CAP)
    logit_grad = logit_grad.to(key[0].dtype)
    sums = ()
    for part in tl.static_range(PARTS):
        sums = sums + (tl.dot(logit_grad, key[part], query_grad[part], input_precision=PRECISION),)
    add_parts(key_grad_row, column, exists, tl.trans(logit_grad), query, D, WIDTH, PARTS, MASKED, PRECISION)
    return sums


@triton.jit(do_not_specialize=["prompt", "shift", "anchors", "intervals", "full", "tiles"])
def _backward(
    query_ptr, key_ptr, value_ptr, anchor_ptr, start_ptr, latest_ptr, selected_ptr, budget_ptr, padding_ptr,
    lse_ptr, delta_ptr, upstream_ptr, query_grad_ptr, key_grad_ptr, value_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, grad_b, grad_h, grad_t, sums_b, sums_h, sums_t,
    anchors, intervals, full, tiles, width, length, prompt, shift, scale, softmax_scale,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Query gradients stay in registers; those of keys and values are added to memory in float32, tile by tile.

    A head is taken in PARTS of WIDTH columns, so that a tile's work fits the registers. With SPLITS, several programs
    share the keys of a tile of rows, and the query gradients are added to memory as well.
    """
    split = tl.program_id(0) % SPLITS
    interval, tile = tl.program_id(0) // SPLITS // tiles, tl.program_id(0) // SPLITS % tiles
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, position, partial, left, which, anchor, budget = _interval(
        anchor_ptr, start_ptr, latest_ptr, budget_ptr, padding_ptr, batch, interval, tile, anchors, intervals, full,
        G, BLOCK_M,
    )  # fmt: skip
    most, seen_by_all, first, end = _key_list(partial, position, left, anchor, budget, length)
    if end <= 0:
        return
    kv_heads = tl.num_programs(1)
    heads = kv_heads * G
    head = kv_head * G + head
    column = tl.arange(0, WIDTH)
    decoded = position.to(tl.int64) - prompt
    rows = length - prompt
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (position - shift).to(tl.int64) * query_t
    # PARTS times [BLOCK_M, WIDTH], twice; then [BLOCK_M] twice
    query = load_parts(query_row, column, partial, D, WIDTH, PARTS, True)
    upstream_row = upstream_ptr + batch * upstream_b + decoded * upstream_t + head.to(tl.int64) * upstream_h
    upstream = load_parts(upstream_row, column, partial, D, WIDTH, PARTS, True)
    # an infinite log-sum-exp makes every weight of a row that is not partial zero
    lse = tl.load(lse_ptr + (batch * heads + head) * rows + decoded, mask=partial, other=float("inf"))
    delta = tl.load(delta_ptr + (batch * heads + head) * rows + decoded, mask=partial, other=0.0)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    sums = batch * sums_b + kv_head.to(tl.int64) * sums_h
    key_grads, value_grads = key_grad_ptr + sums, value_grad_ptr + sums
    chosen = selected_ptr + ((batch * kv_heads + kv_head) * anchors + which) * width
    query_grad = zero_parts(BLOCK_M, WIDTH, PARTS)
    whole = seen_by_all // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(end, BLOCK_N), SPLITS) * BLOCK_N
    begin, end = split * share, tl.minimum(end, (split + 1) * share)
    for start in range(begin, tl.minimum(whole, end), BLOCK_N):
        # [BLOCK_N]
        token = tl.load(chosen + start + tl.arange(0, BLOCK_N)).to(INDEX)
        query_grad = tile_backward(
            query, upstream, lse, delta, query_grad,
            keys + token * key_t, values + token * value_t, key_grads + token * sums_t, value_grads + token * sums_t,
            column, token >= 0, None, scale, softmax_scale, D, WIDTH, PARTS, False, PRECISION, CAP,
        )  # fmt: skip
    for start in range(tl.maximum(whole, begin), end, BLOCK_N):
        number = start + tl.arange(0, BLOCK_N)
        token, bounded, is_chosen = _listed(chosen, number, most, first)
        token = token.to(INDEX)
        visible = _visible(bounded, is_chosen, position, left, budget)
        query_grad = tile_backward(
            query, upstream, lse, delta, query_grad,
            keys + token * key_t, values + token * value_t, key_grads + token * sums_t, value_grads + token * sums_t,
            column, number < end, visible, scale, softmax_scale, D, WIDTH, PARTS, True, PRECISION, CAP,
        )  # fmt: skip
    grad_row = query_grad_ptr + batch * grad_b + head.to(tl.int64) * grad_h + decoded * grad_t
    for part in tl.static_range(PARTS):
        columns = part * WIDTH + column
        mask = partial[:, None] & (columns < D)[None, :]
        result = query_grad[part].to(query_grad_ptr.dtype.element_ty)
        if SPLITS > 1:
            tl.atomic_add(grad_row[:, None] + columns[None, :], result, mask=mask, sem="relaxed")
        else:
            tl.store(grad_row[:, None] + columns[None, :], result, mask=mask)


MANY_SPLITS = 8
"""Most programs that share the keys of a tile of rows, where there are few such tiles."""


def _backward_kernel(rows: int, intervals: int, device: torch.device) -> str:
    """The tiles of the backward pass. Larger ones add to memory less often, and are taken if they fit and are enough of
    them to fill the GPU."""
    for block in (256, 128):
        programs = intervals * triton.cdiv(rows, block)
        if rows > block // 2 and programs >= MANY_PROGRAMS // 4 and fits(f"partial_backward_{block}", device):
            return f"partial_backward_{block}"
    return "partial_backward_64"


def forward(inputs: AttentionInputs, plan: Plan, segments: Segments, selected: Tensor, output: Tensor) -> Tensor:
    """Writes the partial steps' positions into `output` (B, R, H, D); the full steps' positions stay untouched.

    selected (B, Hkv, A, W) int32. Returns the positions' log-sum-exp (B, H, R) float32, in units of log 2.
    """
    query, key, value, scaling, terms = inputs
    batch, heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    lse = torch.empty(batch, heads, length - plan.prompt_length, dtype=torch.float32, device=query.device)
    sizes = block_sizes("partial_forward", query) | register_limit(query.dtype, head_dim, query.device)
    tiles = triton.cdiv(segments.longest * (heads // kv_heads), sizes["BLOCK_M"])
    _forward[segments.count * tiles, kv_heads, batch](
        query, key, value, *segments[:3], selected, plan.budgets, plan.left_padding, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        segments.anchors.shape[1], segments.count, segments.full, tiles, selected.shape[-1], length,
        plan.prompt_length, length - query.shape[2],
        scaling * LOG2E, G=heads // kv_heads, D=head_dim, DP=padded_head(head_dim), INDEX=index_type(key, value),
        PRECISION=precision(query), **kernel_terms(terms), **sizes,
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
    """Adds what the partial steps give to the gradients of query, key and value.

    lse: what `forward` returned; upstream (B, R, H, D): gradient of the output; delta (B, H, R) float32: its dot
    product with the output. gradients: of the queries after the prompt (B, H, R, D), zero at partial steps, and of keys
    and values (B, Hkv, T, D), float32 and in one layout.
    """
    query, key, value, scaling, terms = inputs
    query_grad, key_grad, value_grad = gradients
    batch, heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows, intervals = segments.longest * group, segments.count * kv_heads * batch
    sizes = block_sizes(_backward_kernel(rows, intervals, query.device), query)
    tiles = triton.cdiv(rows, sizes["BLOCK_M"])
    splits = max(1, min(MANY_SPLITS, MANY_PROGRAMS // (4 * intervals * tiles)))
    # several programs add to one row: in float32, joined with the full steps' rows afterwards
    sums = query_grad if splits == 1 else torch.zeros(query_grad.shape, dtype=torch.float32, device=query.device)
    _backward[segments.count * tiles * splits, kv_heads, batch](
        query, key, value, *segments[:3], selected, plan.budgets, plan.left_padding, lse, delta,
        upstream, sums, key_grad, value_grad,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *upstream.stride()[:3], *sums.stride()[:3],
        *key_grad.stride()[:3],
        segments.anchors.shape[1], segments.count, segments.full, tiles, selected.shape[-1], length,
        plan.prompt_length, length - query.shape[2],
        scaling * LOG2E, scaling,
        G=group, D=head_dim, INDEX=index_type(key, value, key_grad), PRECISION=precision(query),
        PARTS=padded_head(head_dim) // sizes["WIDTH"], SPLITS=splits, CAP=cap_of(terms), **sizes,
    )  # fmt: skip
    if splits > 1:
        query_grad += sums
