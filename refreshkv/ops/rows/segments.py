"""Intervals of the positions after the prompt: which selection each position decodes from, as the kernels look it up.

An interval begins at each decision step and at each multiple of the select stride, and ends where the next one begins.
All its positions decode from the selection of one *anchor*, the latest full or selecting step at or before its first
position; where that position is the anchor and a selecting step, it decodes from its own selection.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `C` decision steps, the prompt's end included, `E` steps at
multiples of the select stride, `A = C + E` anchors, `N` intervals.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from refreshkv.ops.state import Plan


class Segments(NamedTuple):
    """The intervals of a plan."""

    anchors: Tensor
    """(B, A) int64: the positions of the full steps, then those of the selecting steps, -1 where there is none."""
    starts: Tensor
    """(N + 1,) int64: the first position of each interval, from the prompt's end on, and at last T."""
    latest: Tensor
    """(B, N) int64: the number of each interval's anchor."""
    full: int
    """C: how many of the anchors are full steps."""
    longest: int
    """Positions of the longest interval."""

    @property
    def count(self) -> int:
        """N."""
        return self.latest.shape[1]


def segments_of(plan: Plan, length: int) -> Segments:
    """The intervals of a plan for `length` positions."""
    device, full = plan.full_positions.device, plan.full_positions.shape[1]
    strides = (plan.stride, plan.select_stride if plan.selecting else None)
    starts, order = _starts(length, plan.prompt_length, *strides, device)
    longest = longest_interval(plan, length)
    if plan.selecting_positions is None or plan.selecting == 0:
        return Segments(plan.full_positions, starts, plan.latest, full, longest)
    anchors = torch.cat([plan.full_positions, plan.selecting_positions], dim=1)
    number = torch.arange(anchors.shape[1], device=device)
    latest = number.masked_fill(anchors[:, order] < 0, 0).cummax(dim=1).values
    return Segments(anchors, starts, order[latest], full, longest)


def longest_interval(plan: Plan, length: int) -> int:
    """Positions of the longest interval of a plan for `length` positions."""
    select_stride = plan.select_stride if plan.selecting else None
    return min(plan.stride, select_stride or length, length - plan.prompt_length + 1)


def most_anchors(plan: Plan, length: int, positions: int) -> int:
    """Most anchors that so many positions decode from, a multiple of `longest_interval`, if they begin where an
    interval does."""
    anchors = positions // longest_interval(plan, length)
    if plan.selecting and plan.select_stride and plan.full_positions.shape[1] > 1:  # both strides begin intervals
        anchors += positions // max(plan.stride, plan.select_stride) + 1
    return anchors


@lru_cache(maxsize=8)
def _starts(
    length: int, prompt_length: int, stride: int, select_stride: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`Segments.starts`, and which anchor would be at each: (N,). A decision step at a multiple of the select stride
    begins two intervals, of which the first is empty.

    All layers share them, so they are made once.
    """
    with torch.inference_mode(False):  # a cached tensor may be used in training next
        first = prompt_length - 1
        starts = torch.arange(first, length, stride, device=device)
        if select_stride is not None:
            others = torch.arange(first + select_stride, length, select_stride, device=device)
            starts = torch.cat([starts, others])
        starts, order = starts.sort(stable=True)
        return torch.cat([starts, starts.new_tensor([length])]), order
