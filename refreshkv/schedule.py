"""Which steps are full: step by step (decoding) and all at once (simulation), by one rule.

Shapes: `B` batch rows, `H` query heads, `T` positions, `D` head size, `P` prompt length, `S` stride, `C` checks, the
prompt's end included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Schedule(NamedTuple):
    """The full steps of known tokens, one layer; check `c` is at position `P - 1 + c * S`."""

    full_positions: Tensor
    """(B, C) int64: the check's position where it was full, else -1. The first is the prompt's end, always full."""
    latest: Tensor
    """(B, C) int64: the last full check at or before each."""


def mean_query(query: Tensor) -> Tensor:
    """Mean over the query heads in float32: (B, H, N, D) -> (B, N, D)."""
    return query.float().mean(dim=1)


def is_refresh(mean_query_now: Tensor, mean_query_then: Tensor, threshold: float | None) -> Tensor:
    """Whether a check is full: (B,) bool from mean queries (B, D) now and at the last full step (paper 2.2)."""
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
    """The schedule of T known tokens after a prompt of `prompt_length`, from a layer's queries (B, H, T, D).

    average_heads: from the mean queries (B, C, D) of these heads to those of all, where they are not all of them.
    """
    batch, _, length, _ = query.shape
    last = prompt_length - 1
    checks = torch.arange(last, length, stride, device=query.device)
    full = torch.ones(batch, len(checks), dtype=torch.bool, device=query.device)
    if threshold is not None:
        mean_queries = mean_query(query[:, :, checks])
        full = _walk(mean_queries if average_heads is None else average_heads(mean_queries), threshold)
    latest = torch.arange(len(checks), device=query.device).masked_fill(~full, 0).cummax(dim=1).values
    return Schedule(checks.masked_fill(~full, -1), latest)


def _walk(mean_queries: Tensor, threshold: float) -> Tensor:
    """Decides the checks in order, each against the last full one: mean queries (B, C, D) -> (B, C) bool."""
    then = mean_queries[:, 0]
    full = torch.zeros(mean_queries.shape[:2], dtype=torch.bool, device=mean_queries.device)
    full[:, 0] = True
    for check in range(1, mean_queries.shape[1]):
        now = mean_queries[:, check]
        full[:, check] = is_refresh(now, then, threshold)
        then = torch.where(full[:, check, None], now, then)
    return full
