"""Whole rows of which few positions come after the prompt, such as the paper's recipe: one dense attention, mended.

A causal attention over the whole row gives the prompt's rows and the full steps'; the partial rows are then written
over its own. Backward it is told that those had an infinite log-sum-exp, so that their weights vanish, and the kernels
of the partial rows add what these give. The row is computed, and its gradients are laid out, in one piece: for few
decoded rows that costs less than the arithmetic it wastes.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `C` checks, `H` query heads, `Hkv` key/value
heads, `D` head size.
"""

from typing import Any

import torch
from torch import Tensor

from refreshkv.ops.rows import after_prompt as fused
from refreshkv.ops.rows import dense_rows, partial_rows
from refreshkv.ops.selection import ranking
from refreshkv.ops.state import AttentionInputs, Plan, SelectionOptions
from refreshkv.ops.tiles import LOG2E, on_its_device

SHARE = 64
"""Rows with at most 1/64 of their positions after the prompt: up to there the extra arithmetic, 2 R / T of the dense
attention, is less than what handling the prompt apart costs."""


def usable(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> bool:
    """Whether `whole_rows` can take these, and is the faster way. torch.compile keeps to `fused`."""
    length = query.shape[2]
    few = (length - plan.prompt_length) * SHARE <= length
    return plan.uniform and few and not torch.compiler.is_compiling() and dense_rows.usable(query, key, value)


@on_its_device
def whole_rows(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
) -> Tensor:
    """`refreshkv.ops.naive.whole_rows` for what `usable` allows, differentiable in query, key and value."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    return _WholeRows.apply(query, key, value, plan, options, scaling)


class _WholeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
    ) -> Tensor:
        prompt, stride = plan.prompt_length, plan.stride
        output, lse = dense_rows.attend(query, key, value, True, scaling)
        late = query[:, :, max(0, prompt - options.observation_window) :]
        known = lse[:, :, prompt - 1 :: stride, None] * LOG2E if options.observation_window == 1 else None
        selected = ranking.select(late, key, plan.steps, options, scaling, lse=known)
        rows = output.transpose(1, 2)[:, prompt:]
        rows_lse = partial_rows.forward(AttentionInputs(late, key, value, scaling), plan, selected, rows)
        ctx.save_for_backward(query, key, value, output, _hide_partial(lse, prompt, stride), rows_lse, selected)
        ctx.plan, ctx.scaling = plan, scaling
        return output.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, rows_lse, selected = ctx.saved_tensors
        plan, scaling, prompt = ctx.plan, ctx.scaling, ctx.plan.prompt_length
        upstream = upstream.transpose(1, 2)
        if upstream.stride() != output.stride():  # cuDNN takes the two in one layout
            upstream = torch.empty_like(output).copy_(upstream)
        query_grad, *dense = dense_rows.attend_backward(upstream, query, key, value, output, lse, True, scaling)
        # in one layout, and wide enough for the sums
        key_grad, value_grad = (torch.empty_like(key, dtype=torch.float32).copy_(gradient) for gradient in dense)
        rows, rows_upstream = (tensor.transpose(1, 2)[:, prompt:] for tensor in (output, upstream))
        inputs = AttentionInputs(query[:, :, prompt:], key, value, scaling)
        gradients = (query_grad[:, :, prompt:], key_grad, value_grad)
        delta = fused.dot_rows(rows, rows_upstream)
        partial_rows.backward(inputs, plan, selected, rows_lse, delta, rows_upstream, gradients)
        return query_grad, fused.rounded(key_grad, key), fused.rounded(value_grad, value), None, None, None


def _hide_partial(lse: Tensor, prompt: int, stride: int) -> Tensor:
    """The log-sum-exp (B, H, T), infinite for the partial rows; changed in place."""
    after = lse[:, :, prompt:]
    full = after[:, :, stride - 1 :: stride].clone()
    after.fill_(torch.inf)
    after[:, :, stride - 1 :: stride] = full
    return lse
