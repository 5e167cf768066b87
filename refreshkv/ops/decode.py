"""One decoding step of one layer as an operator: everything it decides and keeps stays in device memory.

`decode_step` is opaque to torch.compile, which therefore sees no break, and `generate` can capture it into a CUDA
graph.
On CUDA, 16- and 32-bit caches go through the Triton kernels of `decode_attention` and `decode_selection`; everything
else, and REFRESHKV_OPS=naive, through `naive.decode_step`.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for, `W`
slots of a selection, `O` observing queries.
"""

import os

import torch
from torch import Tensor

from refreshkv.ops import naive

KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)

STATE = ("keys", "values", "length", "rows", "selected", "ranking", "mean_query", "observers", "full_steps")
"""What a step changes, by argument name."""

TAIL = 16
"""Lowest ranks that the kernels put in order at a time, for they are dropped one by one."""


def uses_kernels(tensor: Tensor) -> bool:
    """Whether this tensor's operations go to the Triton kernels."""
    return tensor.is_cuda and tensor.dtype in KERNEL_TYPES and os.environ.get("REFRESHKV_OPS") != "naive"


@torch.library.custom_op("refreshkv::decode_step", mutates_args=STATE)
def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    observers: Tensor,
    full_steps: Tensor,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    scaling: float,
) -> Tensor:
    """Appends one token and attends with its query (specification, sections 2 to 4): returns (B, 1, H, D).

    query (B, H, 1, D), key and value (B, Hkv, 1, D): the token's; the rest is the layer's state, changed in place:
    keys, values (B, Hkv, L, D); length () int64; rows (B, 4) int64: last full position, budget, padded columns, length
    of the last prompt block; selected (B, Hkv, W) int32: positions by rank, the ranks that may still drop in order;
    ranking (B, Hkv, W) int32: their scores' bits, for the kernels; mean_query (B, D) float32: of the last full step;
    observers (B, H, O, D): the last queries, position `p` in slot `p % O`; full_steps (B, L) bool.
    The caller sees to it that the cache has room; without it the output is not a number.
    """
    state = (keys, values, length, rows, selected, ranking, mean_query, observers, full_steps)
    options = (stride, threshold, pool_kernel, observation_window, recent_window, sink_tokens, scaling)
    if uses_kernels(keys):
        from refreshkv.ops import decode_kernels  # imports Triton, which machines without a GPU may lack

        return decode_kernels.decode_step(query, key, value, *state, *options)
    return naive.decode_step(query, key, value, *state, *options)


@decode_step.register_fake
def _(query: Tensor, *args) -> Tensor:
    batch, heads, _, head_dim = query.shape
    return query.new_empty(batch, 1, heads, head_dim)
