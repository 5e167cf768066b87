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
from refreshkv.ops.tiles import LOG2E, on_its_device

SHARE = 64
"""Rows with at most 1/64 of their positions after the prompt: up to there the extra arithmetic, 2 R / T of the dense
attention, is less than what handling the prompt apart costs."""


def usable(query: Tensor, key: Tensor, value: Tensor, prompt_length: int, uniform: bool) -> bool:
    """Whether `whole_rows` can take these, and is the faster way. torch.compile keeps to `fused`."""
    length = query.shape[2]
    few = (length - prompt_length) * SHARE <= length
    return uniform and few and not torch.compiler.is_compiling() and dense_rows.usable(query, key, value)


@on_its_device
def whole_rows(
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
    """`refreshkv.ops.naive.whole_rows` for what `usable` allows, differentiable in query, key and value."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    selection = {
        "width": width,
        "pool_kernel": pool_kernel,
        "observation_window": observation_window,
        "recent_window": recent_window,
        "sink_tokens": sink_tokens,
        "droppable": droppable,
    }
    plan = (full_positions, latest, budgets, left_padding)
    return _WholeRows.apply(query, key, value, *plan, prompt_length, min(stride, key.shape[2]), selection, scaling)


class _WholeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        full_positions: Tensor,
        latest: Tensor,
        budgets: Tensor,
        left_padding: Tensor,
        prompt: int,
        stride: int,
        selection: dict[str, int],
        scaling: float,
    ) -> Tensor:
        output, lse = dense_rows.attend(query, key, value, True, scaling)
        observing = selection["observation_window"]
        late = query[:, :, max(0, prompt - observing) :]
        known = lse[:, :, prompt - 1 :: stride, None] * LOG2E if observing == 1 else None
        selected = ranking.select(
            late, key, full_positions, budgets, left_padding, scaling=scaling, lse=known, **selection
        )
        segments = (full_positions, latest, selected, budgets, left_padding)
        rows = output.transpose(1, 2)[:, prompt:]
        rows_lse = partial_rows.forward(late, key, value, *segments, rows, prompt, stride, scaling)
        ctx.save_for_backward(query, key, value, output, _hide_partial(lse, prompt, stride), rows_lse, *segments)
        ctx.numbers = (prompt, stride, scaling)
        return output.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, rows_lse, *segments = ctx.saved_tensors
        prompt, stride, scaling = ctx.numbers
        upstream = upstream.transpose(1, 2)
        if upstream.stride() != output.stride():  # cuDNN takes the two in one layout
            upstream = torch.empty_like(output).copy_(upstream)
        query_grad, *dense = dense_rows.attend_backward(upstream, query, key, value, output, lse, True, scaling)
        # in one layout, and wide enough for the sums
        key_grad, value_grad = (torch.empty_like(key, dtype=torch.float32).copy_(gradient) for gradient in dense)
        rows, rows_upstream = (tensor.transpose(1, 2)[:, prompt:] for tensor in (output, upstream))
        delta = fused.dot_rows(rows, rows_upstream)
        partial_rows.backward(
            query[:, :, prompt:], key, value, *segments, rows_lse, delta, rows_upstream, query_grad[:, :, prompt:],
            key_grad, value_grad, prompt, stride, scaling,
        )  # fmt: skip
        return query_grad, fused.rounded(key_grad, key), fused.rounded(value_grad, value), *[None] * 8


def _hide_partial(lse: Tensor, prompt: int, stride: int) -> Tensor:
    """The log-sum-exp (B, H, T), infinite for the partial rows; changed in place."""
    after = lse[:, :, prompt:]
    full = after[:, :, stride - 1 :: stride].clone()
    after.fill_(torch.inf)
    after[:, :, stride - 1 :: stride] = full
    return lse
