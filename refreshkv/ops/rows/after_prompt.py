"""The rows after the prompt by kernels: full steps, selection, partial rows, and their gradients.

torch.compile takes them whole, as two operators of torch, one for each direction; without it they are called as they
are, which costs less time on the host.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.rows import dense_rows, full_rows, partial_rows
from refreshkv.ops.selection import ranking
from refreshkv.ops.tiles import on_its_device, padded_head


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
    uniform: bool,
    scaling: float,
) -> Tensor:
    """`refreshkv.ops.naive.refresh_rows` by kernels, differentiable in query, key and value: (B, R, H, D)."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    run = _forward_operator if torch.compiler.is_compiling() else _Rows.apply
    output, *_ = run(
        query, key, value, full_positions, latest, budgets, left_padding,
        prompt_length, min(stride, key.shape[2]),  # intervals end with the row at the latest
        width, pool_kernel, observation_window, recent_window, sink_tokens, droppable, uniform, scaling,
    )  # fmt: skip
    return output


@on_its_device
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_positions: Tensor,
    latest: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    prompt: int,
    stride: int,
    width: int,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    droppable: int,
    uniform: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output (B, R, H, D), and for the gradients the log-sum-exp of the full steps (B, H, C) and of the
    partial rows (B, H, R), float32, and the selections (B, Hkv, C, W) int32."""
    output = _output_like(query, key, prompt)
    full_lse = known = None
    if full_positions.shape[1] > 1:  # the first check is the prompt's own row
        if uniform and dense_rows.takes_full_steps(query, key, value, prompt, stride):
            full_lse = dense_rows.forward(query, key, value, output, prompt, stride, scaling)
        else:
            full_lse = full_rows.forward(query, key, value, full_positions, left_padding, output, prompt, scaling)
        known = full_lse.unsqueeze(-1) if observation_window == 1 else None
    selected = ranking.select(
        query, key, full_positions, budgets, left_padding,
        width=width, pool_kernel=pool_kernel, observation_window=observation_window, recent_window=recent_window,
        sink_tokens=sink_tokens, droppable=droppable, scaling=scaling, lse=known,
    )  # fmt: skip
    lse = partial_rows.forward(
        query, key, value, full_positions, latest, selected, budgets, left_padding, output, prompt, stride, scaling
    )
    return output, _lse_like(query, full_positions) if full_lse is None else full_lse, lse, selected


def _output_like(query: Tensor, key: Tensor, prompt: int) -> Tensor:
    batch, heads, _, head_dim = query.shape
    return query.new_empty(batch, key.shape[2] - prompt, heads, head_dim)


def _lse_like(query: Tensor, full_positions: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], full_positions.shape[1], dtype=torch.float32)


@on_its_device
def _backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_positions: Tensor,
    latest: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    selected: Tensor,
    output: Tensor,
    full_lse: Tensor,
    lse: Tensor,
    prompt: int,
    stride: int,
    uniform: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query (B, H, Q, D), key and value (B, Hkv, T, D)."""
    upstream = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
    delta = dot_rows(output, upstream)
    query_grad = torch.zeros_like(query)
    decoded_grad = query_grad[:, :, query.shape[2] - output.shape[1] :]  # those before only observe
    if full_positions.shape[1] > 1:
        if uniform and dense_rows.takes_full_steps(query, key, value, prompt, stride):
            key_grad, value_grad = dense_rows.backward(
                query, key, value, full_lse, output, upstream, decoded_grad, prompt, stride, scaling
            )
        else:
            key_grad, value_grad = full_rows.backward(
                query, key, value, full_positions, left_padding, full_lse, delta, upstream, decoded_grad,
                prompt, stride, scaling,
            )  # fmt: skip
    else:
        key_grad, value_grad = (torch.zeros_like(key, dtype=torch.float32) for _ in range(2))
    partial_rows.backward(
        query, key, value, full_positions, latest, selected, budgets, left_padding, lse, delta, upstream, decoded_grad,
        key_grad, value_grad, prompt, stride, scaling,
    )  # fmt: skip
    return query_grad, rounded(key_grad, key), rounded(value_grad, value)


def rounded(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in its tensor's dtype and layout."""
    return torch.empty_like(tensor).copy_(gradient)


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    query, key, value, full_positions, latest, budgets, left_padding, prompt, stride, *_, uniform, scaling = inputs
    rows, full_lse, lse, selected = output
    ctx.mark_non_differentiable(full_lse, lse, selected)
    ctx.save_for_backward(
        query, key, value, full_positions, latest, budgets, left_padding, selected, rows, full_lse, lse
    )
    ctx.numbers = (prompt, stride, uniform, scaling)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(*inputs)

    setup_context = staticmethod(_keep_for_backward)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(upstream, *ctx.saved_tensors, *ctx.numbers), *[None] * 14)


_forward_operator = torch.library.custom_op("refreshkv::rows", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("refreshkv::rows_backward", _backward, mutates_args=())


@_forward_operator.register_fake
def _(query, key, value, full_positions, latest, budgets, left_padding, prompt, stride, width, *settings):
    batch, heads, _, _ = query.shape
    lse = query.new_empty(batch, heads, key.shape[2] - prompt, dtype=torch.float32)
    selected = query.new_empty(batch, key.shape[1], full_positions.shape[1], width, dtype=torch.int32)
    return _output_like(query, key, prompt), _lse_like(query, full_positions), lse, selected


@_backward_operator.register_fake
def _(upstream, query, key, value, *rest):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _operator_gradients(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_operator(upstream, *ctx.saved_tensors, *ctx.numbers), *[None] * 14)


_forward_operator.register_autograd(_operator_gradients, setup_context=_keep_for_backward)


@triton.jit(do_not_specialize=["rows"])
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


def dot_rows(output: Tensor, upstream: Tensor) -> Tensor:
    """Sum of output times upstream over the head: two (B, R, H, D) -> (B, H, R) float32."""
    batch, rows, heads, head_dim = output.shape
    delta = torch.empty(batch, heads, rows, dtype=torch.float32, device=output.device)
    _dot_rows_kernel[triton.cdiv(rows, 32), heads, batch](
        output, upstream, delta, *output.stride()[:3], *upstream.stride()[:3], rows, heads,
        D=head_dim, DP=padded_head(head_dim), BLOCK=32,
    )  # fmt: skip
    return delta
