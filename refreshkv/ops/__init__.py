"""The operations of the refresh pattern: tensors and numbers in, tensors out.

`naive` is the readable truth on any device. On CUDA, 16- and 32-bit tensors go to the Triton kernels of `fused`;
REFRESHKV_OPS=naive in the environment keeps them on the naive form, to compare.
"""

from torch import Tensor

from refreshkv.ops import naive
from refreshkv.ops.state import FullSteps, Plan, SelectionOptions
from refreshkv.ops.step.operators import uses_kernels


def refresh_rows(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
) -> Tensor:
    """Attention of all positions after the prompt; arguments and result as in `naive.refresh_rows`."""
    if uses_kernels(query):
        from refreshkv.ops.rows import after_prompt as fused  # imports Triton, which machines without a GPU may lack

        return fused.refresh_rows(query, key, value, plan, options, scaling)
    return naive.refresh_rows(query, key, value, plan, options, scaling)


def takes_whole_rows(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> bool:
    """Whether `whole_rows` is the faster way for query (B, H, T, D), key and value (B, Hkv, T, D)."""
    if not uses_kernels(query):
        return False
    from refreshkv.ops.rows import short_tail

    return short_tail.usable(query, key, value, plan)


def whole_rows(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
) -> Tensor:
    """Attention of whole rows that `takes_whole_rows` is for; arguments and result as in `naive.whole_rows`."""
    from refreshkv.ops.rows import short_tail

    return short_tail.whole_rows(query, key, value, plan, options, scaling)


def takes_block(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `block` is the faster way for query (B, H, n, D), key and value (B, Hkv, L, D), n <= L."""
    if not uses_kernels(query):
        return False
    from refreshkv.ops.rows import dense_rows

    return dense_rows.takes_block(query, key, value)


def block(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last n positions, without gradient, that `takes_block` is for: (B, H, n, D)."""
    from refreshkv.ops.rows import dense_rows

    return dense_rows.block(query, key, value, scaling)


def select(query: Tensor, key: Tensor, steps: FullSteps, options: SelectionOptions, scaling: float) -> Tensor:
    """The positions that full steps keep; arguments and result as in `naive.select`."""
    if uses_kernels(query):
        from refreshkv.ops.selection import ranking

        return ranking.select(query, key, steps, options, scaling)
    return naive.select(query, key, steps, options, scaling)


def copy_rows(source: Tensor, target: Tensor, source_first: int, target_first: int, count: int) -> None:
    """Tokens from one buffer to another, either of them in host memory; arguments as in `naive.copy_rows`."""
    if uses_kernels(source) or uses_kernels(target):
        from refreshkv.ops.step import transfer as form
    else:
        form = naive
    form.copy_rows(source, target, source_first, target_first, count)


def gather_rows(source: Tensor, index: Tensor, wanted: Tensor, target: Tensor) -> None:
    """Chosen tokens to the front of a buffer on the device; arguments as in `naive.gather_rows`."""
    if uses_kernels(target):
        from refreshkv.ops.step import transfer as form
    else:
        form = naive
    form.gather_rows(source, index, wanted, target)
