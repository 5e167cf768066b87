"""Triton kernels for partial and selecting steps in short segments: a block of positions attends to its key list.

A program computes one block. Its rows are pairs (position, query head of the group). It gathers each key of the block's
list once for all rows; a key's mask has one bit per position, which says whether the position attends to the key. Rows
that attend to no key belong to full steps, or lie beyond the sequence.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `H` query heads, `Hkv` key/value heads,
`G = H / Hkv`, `D` head size, `J` blocks; a program has BLOCK_M rows and takes BLOCK_N keys at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.rows.key_lists import LARGEST_BLOCK, KeyLists
from refreshkv.ops.rows.partial_steps import MANY_SPLITS, tile_backward
from refreshkv.ops.rows.segments import longest_interval
from refreshkv.ops.state import AttentionInputs, Plan
from refreshkv.ops.tiles import (
    LOG2E,
    MANY_PROGRAMS,
    add_sinks,
    attend,
    block_sizes,
    cap_of,
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
def _rows(block, positions, prompt, length, kv_head, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of a block, [BLOCK_M] each: bit in the masks, query head, position after the prompt, and whether it
    exists."""
    row = tl.arange(0, BLOCK_M)
    bit = row // G
    decoded = block * positions + bit - 1
    exists = (bit < positions) & (decoded >= 0) & (decoded < length - prompt)
    return bit, kv_head * G + row % G, decoded.to(tl.int64), exists


@triton.jit
def _listed(tokens, room, start, count, bit, BLOCK_N: tl.constexpr):
    """Entries `start .. start + BLOCK_N - 1` of a list of tokens: the tokens [BLOCK_N], of which the last is repeated
    past the end, and which of them each row attends to, [BLOCK_M, BLOCK_N]."""
    number = start + tl.arange(0, BLOCK_N)
    # [BLOCK_N] twice
    token = tl.load(tokens + tl.minimum(number, count - 1))
    mask = tl.load(tokens + room + number, mask=number < count, other=0)
    return token, ((mask[None, :] >> bit[:, None]) & 1) != 0


@triton.jit(do_not_specialize=["prompt", "shift", "blocks"])
def _forward(
    query_ptr, key_ptr, value_ptr, entry_ptr, count_ptr, output_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_t, output_h,
    length, prompt, shift, positions, blocks, room, scale, sink_ptr,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Writes the outputs and log-sum-exps of one block; the latter are infinite where a row attends to no key."""
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_heads, rows = tl.num_programs(1), length - prompt
    bit, head, decoded, exists = _rows(block, positions, prompt, length, kv_head, G, BLOCK_M)
    column = tl.arange(0, DP)
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (decoded + prompt - shift) * query_t
    # [BLOCK_M, DP]
    query = load_rows(query_row, column, exists, D, DP, True)

    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    values = value_ptr + batch * value_b + kv_head.to(tl.int64) * value_h
    row = (batch * kv_heads + kv_head) * blocks + block
    tokens, count = entry_ptr + row * 2 * room, tl.load(count_ptr + row)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, DP], tl.float32)
    for start in range(0, count, BLOCK_N):
        token, visible = _listed(tokens, room, start, count, bit, BLOCK_N)
        token = token.to(INDEX)
        # [BLOCK_N, DP] twice
        key = load_rows(keys + token * key_t, column, token >= 0, D, DP, False)
        value = load_rows(values + token * value_t, column, token >= 0, D, DP, False)
        highest, total, result = attend(query, key, value, visible, highest, total, result, scale, PRECISION, CAP)

    seen = exists & (total > 0)
    highest, total, result = add_sinks(sink_ptr, head, exists, highest, total, result)
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, highest + tl.log2(total), float("inf"))
    tl.store(lse_ptr + (batch * kv_heads * G + head) * rows + decoded, lse, mask=exists)
    result = result / total[:, None]
    output_row = output_ptr + batch * output_b + decoded * output_t + head.to(tl.int64) * output_h
    mask = seen[:, None] & (column < D)[None, :]
    tl.store(output_row[:, None] + column[None, :], result.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["prompt", "shift", "blocks"])
def _backward(
    query_ptr, key_ptr, value_ptr, entry_ptr, count_ptr, lse_ptr, delta_ptr, upstream_ptr,
    query_grad_ptr, key_grad_ptr, value_grad_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    upstream_b, upstream_t, upstream_h, grad_b, grad_h, grad_t, sums_b, sums_h, sums_t,
    length, prompt, shift, positions, blocks, room, scale, softmax_scale,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """As `partial_steps._backward`, for the rows of one block."""
    split, block = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_heads, rows = tl.num_programs(1), length - prompt
    bit, head, decoded, exists = _rows(block, positions, prompt, length, kv_head, G, BLOCK_M)
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
    tokens, count = entry_ptr + row * 2 * room, tl.load(count_ptr + row)
    query_grad = zero_parts(BLOCK_M, WIDTH, PARTS)
    share = tl.cdiv(tl.cdiv(count, BLOCK_N), SPLITS) * BLOCK_N
    for start in range(split * share, tl.minimum(count, (split + 1) * share), BLOCK_N):
        token, visible = _listed(tokens, room, start, count, bit, BLOCK_N)
        token = token.to(INDEX)
        query_grad = tile_backward(
            query, upstream, lse, delta, query_grad,
            keys + token * key_t, values + token * value_t, key_grads + token * sums_t, value_grads + token * sums_t,
            column, token >= 0, visible, scale, softmax_scale, D, WIDTH, PARTS, False, PRECISION, CAP,
        )  # fmt: skip
    seen = exists & (lse < float("inf"))
    grad_row = query_grad_ptr + batch * grad_b + head.to(tl.int64) * grad_h + decoded * grad_t
    for part in tl.static_range(PARTS):
        columns = part * WIDTH + column
        mask = seen[:, None] & (columns < D)[None, :]
        result = query_grad[part].to(query_grad_ptr.dtype.element_ty)
        if SPLITS > 1:
            tl.atomic_add(grad_row[:, None] + columns[None, :], result, mask=mask, sem="relaxed")
        else:
            tl.store(grad_row[:, None] + columns[None, :], result, mask=mask)


FEWEST_SEGMENTS = 3
"""Least number of segments in a tile of rows for which blocks are faster than `partial_steps`: fewer segments seldom
share enough keys to make up for building the lists."""


def block_positions(query: Tensor, key: Tensor, plan: Plan) -> int | None:
    """Number of positions in a block: those of as many whole segments as fill a tile of rows. None if `partial_steps`
    is faster for query (B, H, Q, D) and key (B, Hkv, T, D)."""
    most = block_sizes("partial_forward", query)["BLOCK_M"] // (query.shape[1] // key.shape[1])
    longest = longest_interval(plan, key.shape[2])
    whole = min(LARGEST_BLOCK, most) // longest
    has_partial = longest > 1 or plan.selecting > 0
    return whole * longest if has_partial and whole >= FEWEST_SEGMENTS else None


def forward(inputs: AttentionInputs, plan: Plan, positions: int, lists: KeyLists, output: Tensor) -> Tensor:
    """Writes the outputs of partial and selecting steps into `output` (B, R, H, D).

    positions: number of positions in a block. Returns the base-2 log-sum-exp (B, H, R) float32, infinite at full steps.
    """
    query, key, value, scaling, terms = inputs
    batch, heads, _, head_dim = query.shape
    kv_heads, length, blocks = key.shape[1], key.shape[2], lists.counts.shape[2]
    group = heads // kv_heads
    lse = torch.empty(batch, heads, length - plan.prompt_length, dtype=torch.float32, device=query.device)
    sizes = block_sizes("partial_forward", query) | {"BLOCK_M": tile_of(positions * group)}
    sizes |= register_limit(query.dtype, head_dim, query.device)
    _forward[blocks, kv_heads, batch](
        query, key, value, *lists, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        length, plan.prompt_length, length - query.shape[2], positions, blocks, lists.entries.shape[-1],
        scaling * LOG2E, G=group, D=head_dim, DP=padded_head(head_dim), INDEX=index_type(key, value),
        PRECISION=precision(query), **kernel_terms(terms), **sizes,
    )  # fmt: skip
    return lse


def backward(
    inputs: AttentionInputs,
    plan: Plan,
    positions: int,
    lists: KeyLists,
    lse: Tensor,
    delta: Tensor,
    upstream: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """As `partial_steps.backward`; lse: what `forward` returned."""
    query, key, value, scaling, terms = inputs
    query_grad, key_grad, value_grad = gradients
    batch, heads, _, head_dim = query.shape
    kv_heads, length, blocks = key.shape[1], key.shape[2], lists.counts.shape[2]
    group = heads // kv_heads
    sizes = block_sizes("partial_backward_64", query) | {"BLOCK_M": tile_of(positions * group)}
    splits = max(1, min(MANY_SPLITS, MANY_PROGRAMS // (4 * blocks * kv_heads * batch)))
    # several programs add to one row: they add in float32, and the sums join the full steps' gradients afterwards
    sums = query_grad if splits == 1 else torch.zeros(query_grad.shape, dtype=torch.float32, device=query.device)
    _backward[blocks * splits, kv_heads, batch](
        query, key, value, *lists, lse, delta, upstream, sums, key_grad, value_grad,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *upstream.stride()[:3], *sums.stride()[:3],
        *key_grad.stride()[:3],
        length, plan.prompt_length, length - query.shape[2], positions, blocks, lists.entries.shape[-1],
        scaling * LOG2E, scaling,
        G=group, D=head_dim, INDEX=index_type(key, value, key_grad), PRECISION=precision(query),
        PARTS=padded_head(head_dim) // sizes["WIDTH"], SPLITS=splits, CAP=cap_of(terms), **sizes,
    )  # fmt: skip
    if splits > 1:
        query_grad += sums


def tile_of(rows: int) -> int:
    """BLOCK_M for a block of this many rows: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rows))
