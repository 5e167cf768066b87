"""Attention of all positions after the prompt by kernels: full steps, selections, selecting and partial steps, and
their gradients.

torch.compile sees two operators of torch, one for each direction; without it the functions are called directly, which
costs less time on the host.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `C` decision steps, `A` full and selecting
steps, `H` query heads, `Hkv` key/value heads, `D` head size, `W` slots of a selection.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.choice import CHOICE
from refreshkv.ops.rows import block_steps, full_steps, full_steps_cudnn, partial_steps
from refreshkv.ops.rows.key_lists import KeyLists, empty_lists, key_lists
from refreshkv.ops.rows.segments import segments_of
from refreshkv.ops.selection import ranking
from refreshkv.ops.state import PLAIN_SOFTMAX, AttentionInputs, Plan, SelectionOptions, SoftmaxTerms
from refreshkv.ops.tiles import LOG2E, on_its_device, padded_head

FIELDS = Plan._fields.index("full_look_ahead")
"""Fields of a plan that the kernels take: those before the look-ahead queries."""

PLAN, OPTIONS = 3, 3 + FIELDS
"""Where the plan and the options begin among the operators' arguments, after query, key and value."""

OTHERS = FIELDS + len(SelectionOptions._fields) + 1
"""How many arguments without gradient follow query, key and value; after them come the sinks and the softcap."""

SINKS = 10
"""Where the sinks stand among the arguments of `_backward` after query, key and value."""


def refresh_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    options: SelectionOptions,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """`refreshkv.ops.naive.refresh_rows` by kernels, differentiable in query, key, value and the terms' sinks:
    (B, R, H, D)."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    run = _forward_operator if torch.compiler.is_compiling() else _Rows.apply
    output, *_ = run(query, key, value, *plan[:FIELDS], *options, scaling, *terms)
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
    prompt_length: int,
    stride: int,
    width: int,
    droppable: int,
    uniform: bool,
    recurring: bool,
    selecting_positions: Tensor | None,
    score_bits: int,
    select_stride: int | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    pool_ahead: bool,
    scaling: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A `Plan`, `SelectionOptions` and `SoftmaxTerms`, flat for torch. Returns the output (B, R, H, D), and for the
    gradients the log-sum-exp of the full steps (B, H, C) and of the others (B, H, R), float32, sinks included, and
    either the two tensors of `KeyLists`, where blocks gather their keys together, or the selections (B, Hkv, A, W)
    int32 and nothing."""
    schedule = (full_positions, latest, budgets, left_padding, prompt_length, stride)
    shape = (width, droppable, uniform, recurring)
    plan = Plan(*schedule, *shape, selecting_positions, score_bits, select_stride)
    options = SelectionOptions(pool_kernel, observation_window, recent_window, sink_tokens, pool_ahead)
    terms = SoftmaxTerms(sinks, softcap)
    inputs = AttentionInputs(query, key, value, scaling, terms)
    output = _output_like(query, key, prompt_length)
    full_lse = known = None
    if full_positions.shape[1] > 1:  # the first decision step is the prompt's own
        by_cudnn = CHOICE.takes_full_steps_by_cudnn(query, key, value, plan, terms)
        full_lse = (full_steps_cudnn if by_cudnn else full_steps).forward(inputs, plan, output)
        known = full_lse.unsqueeze(-1) if observation_window == 1 else None
    selected = ranking.select_all(query, key, plan, options, scaling, lse=known, terms=terms)
    segments = segments_of(plan, key.shape[2])
    if full_lse is None:
        full_lse = _lse_like(query, full_positions)
    if positions := block_steps.block_positions(query, key, plan):
        lists = key_lists(plan, segments, selected, key.shape[2], positions)
        return output, full_lse, block_steps.forward(inputs, plan, positions, lists, output), *lists
    lse = partial_steps.forward(inputs, plan, segments, selected, output)
    return output, full_lse, lse, selected, selected.new_empty(0)


def _output_like(query: Tensor, key: Tensor, prompt_length: int) -> Tensor:
    batch, heads, _, head_dim = query.shape
    return query.new_empty(batch, key.shape[2] - prompt_length, heads, head_dim)


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
    selecting_positions: Tensor | None,
    gathered: Tensor,
    counts: Tensor,
    output: Tensor,
    full_lse: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    prompt_length: int,
    stride: int,
    width: int,
    droppable: int,
    uniform: bool,
    recurring: bool,
    score_bits: int,
    select_stride: int | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query (B, H, Q, D), key and value (B, Hkv, T, D), and of the sinks (H,), empty without
    any."""
    schedule = (full_positions, latest, budgets, left_padding, prompt_length, stride)
    shape = (width, droppable, uniform, recurring)
    plan = Plan(*schedule, *shape, selecting_positions, score_bits, select_stride)
    terms = SoftmaxTerms(sinks, softcap)
    inputs = AttentionInputs(query, key, value, scaling, terms)
    upstream = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
    delta = dot_rows(output, upstream)
    query_grad = torch.zeros_like(query)
    decoded_grad = query_grad[:, :, query.shape[2] - output.shape[1] :]  # those of the prompt only observe
    if full_positions.shape[1] == 1:
        key_grad, value_grad = (torch.zeros_like(key, dtype=torch.float32) for _ in range(2))
    elif CHOICE.takes_full_steps_by_cudnn(query, key, value, plan, terms):
        key_grad, value_grad = full_steps_cudnn.backward(inputs, plan, full_lse, output, upstream, decoded_grad)
    else:
        key_grad, value_grad = full_steps.backward(inputs, plan, full_lse, delta, upstream, decoded_grad)
    gradients = (decoded_grad, key_grad, value_grad)
    if positions := block_steps.block_positions(query, key, plan):
        lists = KeyLists(gathered, counts)
        block_steps.backward(inputs, plan, positions, lists, lse, delta, upstream, gradients)
    else:
        segments = segments_of(plan, key.shape[2])
        partial_steps.backward(inputs, plan, segments, gathered, lse, delta, upstream, gradients)
    sink_grad = delta.new_empty(0) if sinks is None else _sink_gradient(sinks, plan, full_lse, lse, delta)
    return query_grad, rounded(key_grad, key), rounded(value_grad, value), sink_grad


def _sink_gradient(sinks: Tensor, plan: Plan, full_lse: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks (H,). A sink has no value, so that of its logit in a row is -probability * delta.

    full_lse (B, H, C), lse and delta (B, H, R): float32, the first two in units of log 2.
    """
    # column 0 is thrown away: of the prompt's own step, and of decision steps that were not full
    row = (plan.full_positions - (plan.prompt_length - 1)).clamp(min=0)[:, None].expand_as(full_lse)
    whole = torch.cat([lse[..., :1], lse], dim=-1).scatter(2, row, full_lse)[..., 1:]  # [B, H, R]
    probability = torch.exp2(sinks.float()[:, None] * LOG2E - whole)
    return -(probability * delta).sum(dim=(0, 2)).to(sinks.dtype)


def rounded(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in the dtype and layout of its tensor."""
    return torch.empty_like(tensor).copy_(gradient)


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    decoded, full_lse, lse, gathered, counts = output
    ctx.mark_non_differentiable(full_lse, lse, gathered, counts)
    plan = Plan(*inputs[PLAN:OPTIONS])
    tensors = (*plan[:4], plan.selecting_positions)
    scaling, sinks, softcap = inputs[-3:]
    ctx.save_for_backward(*inputs[:PLAN], *tensors, gathered, counts, decoded, full_lse, lse, sinks)
    ctx.numbers = (*plan[4:10], plan.score_bits, plan.select_stride, scaling, softcap)  # the first ones are the plan's


def _in_order(gradients: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient for each argument of `_forward`, from what `_backward` returns."""
    *attended, sinks = gradients
    return (*attended, *[None] * OTHERS, sinks if sinks.numel() else None, None)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _forward(*inputs)

    setup_context = staticmethod(_keep_for_backward)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _in_order(_backward(upstream, *ctx.saved_tensors, *ctx.numbers))


_forward_operator = torch.library.custom_op("refreshkv::rows", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("refreshkv::rows_backward", _backward, mutates_args=())


@_forward_operator.register_fake
def _(query, key, value, *others):
    plan, (batch, heads, _, _) = Plan(*others[:FIELDS]), query.shape
    lse = query.new_empty(batch, heads, key.shape[2] - plan.prompt_length, dtype=torch.float32)
    results = (_output_like(query, key, plan.prompt_length), _lse_like(query, plan.full_positions), lse)
    if positions := block_steps.block_positions(query, key, plan):
        return *results, *empty_lists(plan, key, positions, key.shape[2])
    anchors = plan.full_positions.shape[1] + plan.selecting
    selected = query.new_empty(batch, key.shape[1], anchors, plan.width, dtype=torch.int32)
    return *results, selected, selected.new_empty(0)


@_backward_operator.register_fake
def _(upstream, query, key, value, *rest):
    sinks = rest[SINKS]
    sink_grad = query.new_empty(0, dtype=torch.float32) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), sink_grad


def _operator_gradients(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _in_order(_backward_operator(upstream, *ctx.saved_tensors, *ctx.numbers))


_forward_operator.register_autograd(_operator_gradients, setup_context=_keep_for_backward)


DOT_ROWS = 32
"""Positions of a program of `_dot_rows`."""


@triton.jit(do_not_specialize=["rows"])
def _dot_rows(
    output_ptr, upstream_ptr, delta_ptr, output_b, output_t, output_h, upstream_b, upstream_t, upstream_h, rows, heads,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = tl.arange(0, DP)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    outputs = output_ptr + batch * output_b + row * output_t + head * output_h
    upstreams = upstream_ptr + batch * upstream_b + row * upstream_t + head * upstream_h
    # [BLOCK, DP] twice
    output = tl.load(outputs[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(upstreams[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + (batch * heads + head) * rows + row, tl.sum(output * upstream, 1), mask=row < rows)


def dot_rows(output: Tensor, upstream: Tensor) -> Tensor:
    """Dot product of output and upstream gradient: two (B, R, H, D) -> (B, H, R) float32."""
    batch, rows, heads, head_dim = output.shape
    delta = torch.empty(batch, heads, rows, dtype=torch.float32, device=output.device)
    _dot_rows[triton.cdiv(rows, DOT_ROWS), heads, batch](
        output, upstream, delta, *output.stride()[:3], *upstream.stride()[:3], rows, heads,
        D=head_dim, DP=padded_head(head_dim), BLOCK=DOT_ROWS,
    )  # fmt: skip
    return delta
