"""One decoding step of one layer as an operator: everything it decides and keeps stays in device memory.

`decode_step` is opaque to torch.compile, which therefore sees no break, and `generate` can capture it into a CUDA
graph.
On CUDA, 16- and 32-bit caches go through the Triton kernels of `decode_attention` and `decode_selection`; everything
else, and REFRESHKV_OPS=naive, through `naive.decode_step`.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for, `W`
slots of a selection, `O` observing queries.
"""

import os
from typing import NamedTuple

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
    keys and values may be pinned host memory, which the kernels read and write over the bus. The caller sees to it that
    the cache has room; without it the output is not a number.
    """
    state = (keys, values, length, rows, selected, ranking, mean_query, observers, full_steps)
    options = (stride, threshold, pool_kernel, observation_window, recent_window, sink_tokens, scaling)
    if uses_kernels(query):
        from refreshkv.ops.step import (
            launches as decode_kernels,  # imports Triton, which machines without a GPU may lack
        )

        with torch.cuda.device_of(query):
            return decode_kernels.decode_step(query, key, value, *state, *options)
    return naive.decode_step(query, key, value, *state, *options)


class Check(NamedTuple):
    """What a step leaves for the selection, of rows of one layer, (B, ...), or of several, (N, B, ...)."""

    full: Tensor
    """(B,) int32: the position if the step was full, or -1."""
    arrived: Tensor
    """(B, Hkv) int32: zeros, to count programs with."""
    rankings: Tensor
    """(B, Hkv, L) int32: the higher the better; of full rows."""
    now: Tensor
    """(B, D) float32: the mean query of full rows, where a similarity is asked for."""

    @classmethod
    def empty(cls, rows: tuple[int, ...], kv_heads: int, capacity: int, head_dim: int, device: torch.device) -> "Check":
        """rows: (B,) or (N, B)."""
        return cls(
            torch.empty(rows, dtype=torch.int32, device=device),
            torch.empty(*rows, kv_heads, dtype=torch.int32, device=device),
            torch.empty(*rows, kv_heads, capacity, dtype=torch.int32, device=device),
            torch.empty(*rows, head_dim, dtype=torch.float32, device=device),
        )

    def of(self, number: int) -> "Check":
        """One layer's part of several layers'."""
        return Check(*(part[number] for part in self))


@torch.library.custom_op("refreshkv::attend_step", mutates_args=("keys", "values", "length", "observers"))
def attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    observers: Tensor,
    rows: Tensor,
    selected: Tensor,
    mean_query: Tensor,
    check: list[Tensor],
    number: int,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    scaling: float,
) -> Tensor:
    """`decode_step` of the layer `number` of a stack, by kernels and without the selection, which `select_step` makes.

    rows, selected and mean_query are those of all N layers, (N, ...); check: a `Check` of all of them, into
    whose part of this layer goes what the selection needs. That they are written is not said to torch, for it
    would copy them: nobody but `select_step` reads them, and that comes last, for it takes `length`.
    """
    from refreshkv.ops.step import launches as decode_kernels

    with torch.cuda.device_of(query):
        return decode_kernels.attend_and_rank(
            query, key, value, keys, values, length, rows[number], selected[number], mean_query[number], observers,
            Check(*check).of(number), stride, threshold, pool_kernel,
            observation_window, recent_window, sink_tokens, scaling,
        )  # fmt: skip


@torch.library.custom_op(
    "refreshkv::select_step", mutates_args=("rows", "selected", "ranking", "mean_query", "full_steps")
)
def select_step(
    check: list[Tensor],
    length: Tensor,
    rows: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    full_steps: Tensor,
    stride: int,
    threshold: float | None,
) -> None:
    """Ends a step of N layers: the selections of all that were full, in one launch. The state as of `decode_step`, of
    all layers, (N, ...); length (): the last layer's."""
    from refreshkv.ops.step import launches as decode_kernels

    state = (tensor.flatten(0, 1) for tensor in (rows, selected, ranking, mean_query, full_steps))
    with torch.cuda.device_of(selected):
        whole = Check(*(part.flatten(0, 1) for part in check))
        decode_kernels.select(whole, length, *state, stride=stride, threshold=threshold)


@select_step.register_fake
def _(*args) -> None:
    return None


@torch.library.custom_op("refreshkv::full_step", mutates_args=("keys", "values", "length"))
def full_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    scaling: float,
) -> Tensor:
    """Appends one token and attends to all; arguments and result as in `decode_step`."""
    if uses_kernels(keys):
        from refreshkv.ops.step import launches as decode_kernels

        with torch.cuda.device_of(keys):
            return decode_kernels.full_step(query, key, value, keys, values, length, rows, scaling)
    return naive.full_step(query, key, value, keys, values, length, rows, scaling)


COMPACT_STATE = ("keys", "values", "length", "rows", "slots", "scores", "positions")


@torch.library.custom_op("refreshkv::compact_step", mutates_args=COMPACT_STATE)
def compact_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    slots: Tensor,
    scores: Tensor,
    positions: Tensor,
    sink_tokens: int,
    heavy: bool,
    scaling: float,
) -> Tensor:
    """One token attends to what a compact cache kept and to itself, joins it, and one entry goes if there are more than
    the budget: returns (B, 1, H, D).

    The cache has one entry more than its budget, C = K + 1, and in a full cache one of them, `slots` (B, Hkv) int64,
    is free for the token. keys, values (B, Hkv, C, D); rows (B, 4) int64: entries ever used, the row's K, 0, unused.
    The oldest entry after the first `sink_tokens` goes; or, if `heavy`, the one with the lowest accumulated
    probability, `scores` (B, Hkv, C) float32, that is not among the last K // 2 tokens by `positions` (B, Hkv, C)
    int64.
    """
    token = length.clone()
    if uses_kernels(keys):
        from refreshkv.ops.step import launches as form
    else:
        form = naive
    with torch.cuda.device_of(keys):
        output, probabilities = form.compact_step(query, key, value, keys, values, length, rows, slots, heavy, scaling)
    used, budgets = rows[:, 0], rows[:, 1]
    used.copy_(torch.minimum(used + 1, budgets + 1))
    following = torch.where(slots < budgets[:, None], slots + 1, sink_tokens)
    if heavy:
        scores.scatter_(2, slots.unsqueeze(-1), 0.0)
        scores += probabilities
        positions.scatter_(2, slots.unsqueeze(-1), token.expand_as(slots).unsqueeze(-1))
        recent = positions > (token - budgets // 2)[:, None, None]
        entry = torch.arange(keys.shape[2], device=keys.device)
        lasting = recent | (entry > budgets[:, None, None])
        lightest = scores.masked_fill(lasting, torch.inf).argmin(dim=-1)
        is_full = (used > budgets)[:, None]
        following = torch.where(is_full, lightest, following)
    slots.copy_(following)
    return output


@decode_step.register_fake
@attend_step.register_fake
@full_step.register_fake
@compact_step.register_fake
def _token_output(query: Tensor, *args) -> Tensor:
    """What a step returns, as far as torch.compile has to know: (B, 1, H, D)."""
    batch, heads, _, head_dim = query.shape
    return query.new_empty(batch, 1, heads, head_dim)
