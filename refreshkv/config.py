"""The schedule and the selection, as one small dataclass saved under "refreshkv" in a model's config.json."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from refreshkv.ops import schedule
from refreshkv.ops.state import Plan, SelectionOptions, StepOptions
from refreshkv.settings import SettingsError, settings_from_dict

NEVER = 2**31 - 1
"""A stride that no row reaches: the small cache is selected once, after the prompt, and never refreshed."""
LARGEST_BUDGET = 2**31 - 1
"""Kernels count tokens in 32 bits."""


@dataclass(frozen=True)
class RefreshConfig:
    """When the small cache is refreshed, and what it keeps. The defaults are the paper's (section 2.2, appendix A.3).

    Raises `ValueError` for values outside the ranges below.
    """

    budget: int | float = 0.125
    """Size K of the small cache: an `int` counts tokens (>= 1), a `float` is a share of the prompt (0 < f <= 1)"""
    stride: int = 10
    """Every `stride`-th decoding step is a check (>= 1); without a threshold each check is a full step. `NEVER` turns
    refreshing off."""
    threshold: float | None = None
    """Similarity schedule: a check is full if the cosine between the layer's mean query now and at its last full step
    is at most this. None: fixed schedule."""
    pool_kernel: int = 7
    """Width of the max-pooling over neighbouring positions' scores (odd, >= 1)."""
    observation_window: int = 1
    """Number of last queries whose scores are averaged for the selection (>= 1)."""
    recent_window: int = 0
    """Number of last positions that are selected before all others (>= 0)."""
    sink_tokens: int = 0
    """Number of first positions that are selected before all others (>= 0)."""

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)) or not self.budget > 0:
            raise SettingsError(
                f"budget must be a number of tokens >= 1 or a fraction of the prompt, got {self.budget!r}"
            )
        if isinstance(self.budget, int) and self.budget > LARGEST_BUDGET:
            raise SettingsError(f"budget={self.budget} must be <= {LARGEST_BUDGET}; for all of a prompt write 1.0")
        if isinstance(self.budget, float) and not self.budget <= 1:
            raise SettingsError(
                f"budget={self.budget!r} is a fraction of the prompt and must be <= 1; write a whole number for tokens"
            )
        check_whole("stride", self.stride, 1)
        check_whole("pool_kernel", self.pool_kernel, 1)
        check_whole("observation_window", self.observation_window, 1)
        check_whole("recent_window", self.recent_window, 0)
        check_whole("sink_tokens", self.sink_tokens, 0)
        if self.pool_kernel % 2 == 0:
            raise SettingsError(f"pool_kernel must be odd so that it is centred, got {self.pool_kernel}")
        if not (self.threshold is None or _is_finite(self.threshold)):
            raise SettingsError(f"threshold must be a cosine or null for the fixed schedule, got {self.threshold!r}")

    def budgets(self, prompt_lengths: Tensor) -> Tensor:
        """The budget K of each row, (B,) int64, from the rows' numbers of real prompt tokens, (B,) int64."""
        if isinstance(self.budget, float):
            return (prompt_lengths.double() * self.budget).ceil().long()
        return prompt_lengths.new_full(prompt_lengths.shape, self.budget)

    def largest_budget(self, prompt_length: int) -> int:
        """The budget K of a row without padding: `budgets` for one length, without a tensor."""
        return math.ceil(self.budget * prompt_length) if isinstance(self.budget, float) else self.budget

    def selection_options(self) -> SelectionOptions:
        """The settings of the selection, as the operations take them."""
        return SelectionOptions(self.pool_kernel, self.observation_window, self.recent_window, self.sink_tokens)

    def step_options(self) -> StepOptions:
        """The settings of a decoding step, as the operations take them."""
        return StepOptions(self.stride, self.threshold, self.selection_options())

    def plan(
        self,
        query: Tensor,
        prompt_length: int,
        left_padding: Tensor | None = None,
        *,
        recurring: bool = False,
        average_heads: Callable[[Tensor], Tensor] | None = None,
    ) -> Plan:
        """The refresh pattern of T known tokens after a prompt of `prompt_length`, from a layer's queries (B, H, T, D).

        left_padding (B,) int64, None without any; recurring: whether later passes have the same prompt length and
        stride; average_heads: as in `refreshkv.ops.schedule.plan`.
        """
        length = query.shape[2]
        full_positions, latest = schedule.plan(
            query.detach(), prompt_length, self.stride, self.threshold, average_heads
        )
        padding = full_positions.new_zeros(len(query)) if left_padding is None else left_padding
        return Plan(
            full_positions,
            latest,
            self.budgets(prompt_length - padding),
            padding,
            prompt_length,
            stride=min(self.stride, length),
            width=min(self.largest_budget(prompt_length), length),
            droppable=min(self.stride if self.threshold is None else length, length - prompt_length),
            uniform=self.threshold is None and left_padding is None,
            recurring=recurring,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RefreshConfig":
        """Reads what `to_dict` wrote; unknown keys and wrong types are refused by name."""
        return settings_from_dict(cls, values, prefix="refreshkv.")


@dataclass(frozen=True)
class Simulation:
    """One teacher-forced pass with the refresh pattern: `model(ids, refresh=Simulation(prompt_length, config))`.

    The logits at every position equal those of decoding the same tokens one by one through `RefreshCache` after a
    prompt of `prompt_length` columns (left padding included).

    With `record=True` each layer leaves its full steps in `full_steps`: layer -> (B, T) bool.
    """

    prompt_length: int
    config: RefreshConfig = field(default_factory=RefreshConfig)
    record: bool = False
    full_steps: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    familiar: dict[tuple, bool] = field(default_factory=dict, init=False, compare=False, repr=False)
    """The attention's own: what it has decided for the shapes of this pass."""

    def __post_init__(self) -> None:
        check_whole("prompt_length", self.prompt_length, 1)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{name} must be a whole number >= {least}, got {value!r}")
