"""The rows after the prompt by Triton kernels: full steps, selection, partial rows, and their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops import full_rows, partial_rows, ranking
from refreshkv.ops.tiles import padded_head


def refresh_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_positions: Tensor,
    latest: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    *,
    prompt_length: int,
    stride: int,
    width: int,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    droppable: int,
    scaling: float,
) -> Tensor:
    """`refreshkv.ops.naive.refresh_rows` by kernels, differentiable in query, key and value: (B, R, H, D)."""
    selection = {
        "width": width,
        "pool_kernel": pool_kernel,
        "observation_window": observation_window,
        "recent_window": recent_window,
        "sink_tokens": sink_tokens,
        "droppable": droppable,
    }
    stride = min(stride, query.shape[2])  # intervals end with the row at the latest
    return _RefreshRows.apply(
        query, key, value, full_positions, latest, budgets, left_padding, prompt_length, stride, selection, scaling
    )


class _RefreshRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, full_positions, latest, budgets, left_padding, prompt, stride, selection, scaling
    ):
        batch, heads, length, head_dim = query.shape
        query, key, value = (
            tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
        )
        output = query.new_empty(batch, length - prompt, heads, head_dim)
        full_lse = full_rows.forward(query, key, value, full_positions, left_padding, output, prompt, scaling)
        known = full_lse.unsqueeze(-1) if selection["observation_window"] == 1 else None
        selected = ranking.select(
            query, key, full_positions, budgets, left_padding, scaling=scaling, lse=known, **selection
        )
        segments = (full_positions, latest, selected, budgets, left_padding)
        lse = partial_rows.forward(query, key, value, *segments, output, prompt, stride, scaling)
        ctx.save_for_backward(query, key, value, *segments, output, full_lse, lse)
        ctx.numbers = (prompt, stride, scaling)
        return output

    @staticmethod
    def backward(ctx, upstream):
        query, key, value, *segments, output, full_lse, lse = ctx.saved_tensors
        full_positions, left_padding = segments[0], segments[-1]
        prompt, stride, scaling = ctx.numbers
        upstream = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
        delta = _dot_rows(output, upstream)
        query_grad = torch.zeros_like(query)
        decoded_grad = query_grad[:, :, prompt:]
        key_grad, value_grad = full_rows.backward(
            query, key, value, full_positions, left_padding, full_lse, delta, upstream, decoded_grad,
            prompt, stride, scaling,
        )  # fmt: skip
        partial_rows.backward(
            query, key, value, *segments, lse, delta, upstream, decoded_grad, key_grad, value_grad,
            prompt, stride, scaling,
        )  # fmt: skip
        return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype), *[None] * 8


@triton.jit
def _dot_rows_kernel(
    output_ptr, upstream_ptr, delta_ptr, output_b, output_t, output_h, upstream_b, upstream_t, upstream_h, rows, heads,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = tl.arange(0, DP)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    outputs = output_ptr + batch * output_b + row * output_t + head * output_h
    upstreams = upstream_ptr + batch * upstream_b + row * upstream_t + head * upstream_h
    output = tl.load(outputs[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(upstreams[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + (batch * heads + head) * rows + row, tl.sum(output * upstream, 1), mask=row < rows)


def _dot_rows(output: Tensor, upstream: Tensor) -> Tensor:
    """Sum of output times upstream over the head: two (B, R, H, D) -> (B, H, R) float32."""
    batch, rows, heads, head_dim = output.shape
    delta = torch.empty(batch, heads, rows, dtype=torch.float32, device=output.device)
    _dot_rows_kernel[triton.cdiv(rows, 32), heads, batch](
        output, upstream, delta, *output.stride()[:3], *upstream.stride()[:3], rows, heads,
        D=head_dim, DP=padded_head(head_dim), BLOCK=32,
    )  # fmt: skip
    return delta
