"""Whole sequences of which few positions come after the prompt, as in the paper's recipe: one dense attention, mended.

A causal attention over the whole sequence gives the prompt's positions and the full steps; the partial steps are then
written over its own. Backward it gets an infinite log-sum-exp for those positions, so that their weights vanish, and
the kernels of the partial steps add their gradients. The sequence is computed, and its gradients are laid out, in one
piece: for few decoded positions that costs less than the arithmetic it wastes.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `S` stride, `C` decision steps, `H` query heads,
`Hkv` key/value heads, `D` head size.
"""

from typing import Any

import torch
from torch import Tensor

from refreshkv.ops.rows import cudnn, partial_steps
from refreshkv.ops.rows.after_prompt import dot_rows, rounded
from refreshkv.ops.rows.segments import segments_of
from refreshkv.ops.selection import ranking
from refreshkv.ops.state import AttentionInputs, Plan, SelectionOptions
from refreshkv.ops.tiles import LOG2E, on_its_device


@on_its_device
def whole_sequence(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
) -> Tensor:
    """`refreshkv.ops.naive.whole_sequence` where `Choice.takes_whole_sequence` allows it, differentiable in query, key
    and value: (B, T, H, D)."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    return _WholeSequence.apply(query, key, value, plan, options, scaling)


class _WholeSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
    ) -> Tensor:
        prompt, stride = plan.prompt_length, plan.stride
        output, lse = cudnn.attend(query, key, value, True, scaling)
        late = query[:, :, max(0, prompt - options.observation_window) :]
        known = lse[:, :, prompt - 1 :: stride, None] * LOG2E if options.observation_window == 1 else None
        selected = ranking.select_all(late, key, plan, options, scaling, lse=known)
        rows = output.transpose(1, 2)[:, prompt:]
        segments, inputs = segments_of(plan, key.shape[2]), AttentionInputs(late, key, value, scaling)
        rows_lse = partial_steps.forward(inputs, plan, segments, selected, rows)
        ctx.save_for_backward(query, key, value, output, _hide_partial(lse, prompt, stride), rows_lse, selected)
        ctx.plan, ctx.segments, ctx.scaling = plan, segments, scaling
        return output.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, rows_lse, selected = ctx.saved_tensors
        plan, scaling, prompt = ctx.plan, ctx.scaling, ctx.plan.prompt_length
        upstream = upstream.transpose(1, 2)
        if upstream.stride() != output.stride():  # cuDNN takes the two in one layout
            upstream = torch.empty_like(output).copy_(upstream)
        query_grad, *dense = cudnn.attend_backward(upstream, query, key, value, output, lse, True, scaling)
        # in one layout, and wide enough for the sums
        key_grad, value_grad = (torch.empty_like(key, dtype=torch.float32).copy_(gradient) for gradient in dense)
        rows, rows_upstream = (tensor.transpose(1, 2)[:, prompt:] for tensor in (output, upstream))
        inputs = AttentionInputs(query[:, :, prompt:], key, value, scaling)
        gradients = (query_grad[:, :, prompt:], key_grad, value_grad)
        delta = dot_rows(rows, rows_upstream)
        partial_steps.backward(inputs, plan, ctx.segments, selected, rows_lse, delta, rows_upstream, gradients)
        return query_grad, rounded(key_grad, key), rounded(value_grad, value), None, None, None


def _hide_partial(lse: Tensor, prompt: int, stride: int) -> Tensor:
    """Makes the log-sum-exp (B, H, T) infinite at partial steps, in place, and returns it."""
    after = lse[:, :, prompt:]
    full = after[:, :, stride - 1 :: stride].clone()
    after.fill_(torch.inf)
    after[:, :, stride - 1 :: stride] = full
    return lse
