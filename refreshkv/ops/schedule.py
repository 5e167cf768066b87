"""Which steps are full and which are selecting: step by step (decoding) and all at once (simulation), by one rule.

Every `S`-th step after the prompt is a *decision step*: the schedule decides there whether the step is full.

Shapes: `B` batch rows, `H` query heads, `T` positions, `D` head size, `P` prompt length, `S` stride, `C` decision
steps, the prompt's end included, `E` steps at multiples of the select stride.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_COSINES = 2**24
"""Cosines between decision steps that are held at once for a batch row, 8 bytes each."""


class Schedule(NamedTuple):
    """The full steps of known tokens in one layer; decision step `c` is at position `P - 1 + c * S`."""

    full_positions: Tensor
    """(B, C) int64: the decision step's position where it was full, else -1. The first, the prompt's end, is full."""
    latest: Tensor
    """(B, C) int64: the last full decision step at or before each."""


def mean_query(query: Tensor) -> Tensor:
    """Mean over the query heads in float32: (B, H, N, D) -> (B, N, D)."""
    return query.float().mean(dim=1)


def is_refresh(mean_query_now: Tensor, mean_query_then: Tensor, threshold: float | None) -> Tensor:
    """Whether a decision step is full (paper, section 2.2): mean queries (B, D) now and at the last full step -> (B,)
    bool. threshold None: always."""
    if threshold is None:
        return torch.ones(mean_query_now.shape[0], dtype=torch.bool, device=mean_query_now.device)
    return F.cosine_similarity(mean_query_now, mean_query_then, dim=-1) <= threshold


def plan(
    query: Tensor,
    prompt_length: int,
    stride: int,
    threshold: float | None,
    average_heads: Callable[[Tensor], Tensor] | None = None,
) -> Schedule:
    """The schedule of T known tokens of one layer.

    Args:
        query: (B, H, T, D), the layer's queries.
        prompt_length: P, tokens before the first decoding step.
        stride: S, decoding steps from one decision step to the next.
        threshold: the similarity schedule's cosine, None for the fixed schedule.
        average_heads: maps the mean query of these heads, (B, C, D), to the mean over all heads, where other processes
            have the rest; None if these are all.
    """
    batch, _, length, _ = query.shape
    if threshold is None:
        return _uniform_plan(batch, length, prompt_length, stride, query.device)
    decisions = torch.arange(prompt_length - 1, length, stride, device=query.device)
    mean_queries = mean_query(query[:, :, decisions])
    full = _walk(mean_queries if average_heads is None else average_heads(mean_queries), threshold)
    latest = torch.arange(len(decisions), device=query.device).masked_fill(~full, 0).cummax(dim=1).values
    return Schedule(decisions.masked_fill(~full, -1), latest)


def selecting_positions(full_positions: Tensor, prompt_length: int, length: int, select_stride: int) -> Tensor:
    """The positions of the selecting steps (specification, section 10): (B, E) int64, -1 where such a step is full.

    Args:
        full_positions: (B, C) int64, as in `Schedule`.
        prompt_length: P.
        length: T.
        select_stride: decoding steps from one selecting step to the next.
    """
    first = prompt_length - 1 + select_stride
    positions = torch.arange(first, max(first, length), select_stride, device=full_positions.device)
    is_full = position_flags(full_positions, length)[:, positions]
    return positions.repeat(len(full_positions), 1).masked_fill(is_full, -1)


def position_flags(positions: Tensor, length: int) -> Tensor:
    """The positions (B, N), -1 where there is none, as flags (B, length) bool."""
    flags = torch.zeros(positions.shape[0], length + 1, dtype=torch.bool, device=positions.device)
    return flags.scatter(1, positions.masked_fill(positions < 0, length), True)[:, :length]


@lru_cache(maxsize=8)
def _uniform_plan(batch: int, length: int, prompt_length: int, stride: int, device: torch.device) -> Schedule:
    """The fixed schedule. All layers share it, so it is made once."""
    with torch.inference_mode(False):  # a cached tensor may be used in training next
        decisions = torch.arange(prompt_length - 1, length, stride, device=device)
        every = torch.arange(len(decisions), device=device)
        return Schedule(decisions.repeat(batch, 1), every.repeat(batch, 1))


def _walk(mean_queries: Tensor, threshold: float) -> Tensor:
    """Decides the decision steps in order, each against the last full one: mean queries (B, C, D) -> (B, C) bool.

    For each decision step, the next one that would be full after it is known at once; those that the first leads to are
    found by doubling.
    """
    batch, steps, _ = mean_queries.shape
    normed = F.normalize(mean_queries.double(), dim=-1)  # a decision should not hang on how a product is rounded
    number = torch.arange(steps, device=mean_queries.device)
    parts = []
    for some in number.split(max(1, MAX_COSINES // steps)):
        follows = (normed[:, some] @ normed.transpose(1, 2) <= threshold) & (number > some[:, None])
        parts.append(torch.where(follows.any(-1), follows.int().argmax(-1), steps))
    following = torch.cat(parts, dim=1)
    end = following.new_full((batch, 1), steps)
    following = torch.cat([following, end], dim=1)  # the end leads to itself
    full = torch.zeros(batch, steps + 1, dtype=torch.bool, device=mean_queries.device)
    full[:, 0] = True
    for _ in range(steps.bit_length()):
        reached = torch.where(full, following, steps)
        full = full.scatter(1, reached, True)
        full[:, steps] = False
        following = following.gather(1, following)
    return full[:, :steps]
