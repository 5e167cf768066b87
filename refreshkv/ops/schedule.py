"""Which steps are full: step by step (decoding) and all at once (simulation), by one rule.

Shapes: `B` batch rows, `H` query heads, `T` positions, `D` head size, `P` prompt length, `S` stride, `C` checks, the
prompt's end included.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_COSINES = 2**24
"""Cosines between checks that a row holds at once, 8 bytes each."""


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
    if threshold is None:
        return _uniform_plan(batch, length, prompt_length, stride, query.device)
    checks = torch.arange(prompt_length - 1, length, stride, device=query.device)
    mean_queries = mean_query(query[:, :, checks])
    full = _walk(mean_queries if average_heads is None else average_heads(mean_queries), threshold)
    latest = torch.arange(len(checks), device=query.device).masked_fill(~full, 0).cummax(dim=1).values
    return Schedule(checks.masked_fill(~full, -1), latest)


@lru_cache(maxsize=8)
def _uniform_plan(batch: int, length: int, prompt_length: int, stride: int, device: torch.device) -> Schedule:
    """Every check full. All layers share it, so it is made once."""
    with torch.inference_mode(False):  # a cached tensor may be wanted in training next
        checks = torch.arange(prompt_length - 1, length, stride, device=device)
        every = torch.arange(len(checks), device=device)
        return Schedule(checks.repeat(batch, 1), every.repeat(batch, 1))


def _walk(mean_queries: Tensor, threshold: float) -> Tensor:
    """Decides the checks in order, each against the last full one: mean queries (B, C, D) -> (B, C) bool.

    Which check would be the next full one after each is known at once; what the first leads to is found by doubling.
    """
    batch, checks, _ = mean_queries.shape
    normed = F.normalize(mean_queries.double(), dim=-1)  # a decision should not hang on how a product is rounded
    number = torch.arange(checks, device=mean_queries.device)
    parts = []
    for some in number.split(max(1, MAX_COSINES // checks)):
        follows = (normed[:, some] @ normed.transpose(1, 2) <= threshold) & (number > some[:, None])
        parts.append(torch.where(follows.any(-1), follows.int().argmax(-1), checks))
    following = torch.cat(parts, dim=1)
    end = following.new_full((batch, 1), checks)
    following = torch.cat([following, end], dim=1)  # the end leads to itself
    full = torch.zeros(batch, checks + 1, dtype=torch.bool, device=mean_queries.device)
    full[:, 0] = True
    for _ in range(checks.bit_length()):
        reached = torch.where(full, following, checks)
        full = full.scatter(1, reached, True)
        full[:, checks] = False
        following = following.gather(1, following)
    return full[:, :checks]
