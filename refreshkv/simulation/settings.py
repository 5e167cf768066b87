"""Settings from which each training step draws what it simulates."""

from dataclasses import dataclass, field
from typing import Any, Literal

from refreshkv.config import NEVER, RefreshConfig
from refreshkv.ranges import COUNT, Range, show, validate_numbers
from refreshkv.settings import SettingsError


@dataclass
class SimulationConfig:
    """What each training step simulates. The draws depend on `training.seed` and the step alone."""

    pattern: Literal["whole", "paper", "off"] = "whole"
    """whole: the refresh pattern over everything after the prompt. paper: the published recipe, the last `stride`
    tokens partial and never refreshed (appendix A.1). off: plain next-token training with full attention."""
    prompt_length: int | list[int] | None = None
    """Prompt length of each row in tokens: a fixed number, or [least, most], between which each step draws uniformly.
    None: between a quarter of the row and the row without the largest stride that fits into it. Not used by paper and
    off."""
    stride: int | list[int] = field(default_factory=lambda: [5, 10, 25, 50])
    """Refresh stride: a fixed number, or a list from which each step draws; "never" for no refresh after the prompt."""
    select_stride: int | None | list[int | None] = None
    """Select stride: a fixed number, or a list from which each step draws independently; null, also in a list, for no
    selecting steps. Not used by paper and off."""
    budget: int | float | None | list[int | float] = None
    """Size K of the small cache: tokens or a share of the prompt, or a list from which each step draws independently,
    so that the model learns several budgets; null for `refresh.budget`. Not used by paper and off."""
    chunks: int | None | list[int] = None
    """Number of chunks into which the prompt is cut, at uniformly drawn places (docs/chunks.md): a fixed number, or a
    list from which each step draws; null, or 1 in a list, for one chunk. Not used by paper and off."""
    threshold: float | None = None
    """Similarity threshold of the simulated steps; None for the fixed schedule."""
    plain_share: float = 0.0
    """Share of the steps that are plain next-token training with full attention. A drawn prompt rarely contains the
    positions at the end of a row; plain steps keep the model good at full attention there. Not used by off."""

    def __post_init__(self) -> None:
        self._validate_strides()
        validate_numbers(self, {"prompt_length": COUNT, "threshold": Range(-1e6, 1e6)}, "simulation.")
        if isinstance(self.prompt_length, list):
            if len(self.prompt_length) != 2 or self.prompt_length[0] > self.prompt_length[1]:
                raise SettingsError(
                    f"simulation.prompt_length must be a number or [least, most], got {self.prompt_length}"
                )
        if self.budget is not None:
            self._validate_budgets(self.budget if isinstance(self.budget, list) else [self.budget])
        if not self.chunk_counts or any(COUNT.problem(count) for count in self.chunk_counts):
            raise SettingsError(
                f"simulation.chunks must be null or one or more whole numbers >= 1, got {show(self.chunks)}"
            )
        for name in ("prompt_length", "select_stride", "budget", "chunks"):
            if self.pattern != "whole" and getattr(self, name) is not None:
                raise SettingsError(
                    f"simulation.{name} is not used by simulation.pattern={self.pattern}: remove it, or use whole"
                )
        if not 0 <= self.plain_share < 1:
            raise SettingsError(
                f"simulation.plain_share must be at least 0 and less than 1, got {self.plain_share}: "
                "simulation.pattern=off trains without the pattern altogether"
            )
        if self.pattern == "off" and self.plain_share:
            raise SettingsError("simulation.plain_share: all steps are plain with simulation.pattern=off; remove one")

    def _validate_strides(self) -> None:
        if not self.strides or any(COUNT.problem(stride) for stride in self.strides):
            raise SettingsError(f"simulation.stride must be one or more whole numbers >= 1, got {show(self.stride)}")
        if not self.select_strides or any(
            stride is not None and COUNT.problem(stride) for stride in self.select_strides
        ):
            raise SettingsError(
                "simulation.select_stride must be null or one or more whole numbers >= 1, got "
                f"{show(self.select_stride)}"
            )

    @staticmethod
    def _validate_budgets(budgets: list[int | float]) -> None:
        if not budgets:
            raise SettingsError("simulation.budget must be null, a budget, or a list of one or more, got []")
        for budget in budgets:
            try:
                RefreshConfig(budget=budget)
            except SettingsError as error:
                raise SettingsError(f"simulation.{error}") from None

    @staticmethod
    def plain_values(values: dict[str, Any]) -> dict[str, Any]:
        """The settings `values`, with a stride "never" replaced by a number and a budget such as "12.5%" by a share,
        also in lists."""
        if (budget := values.get("budget")) is not None:
            budgets = [_budget(item) for item in budget] if isinstance(budget, list) else _budget(budget)
            values = {**values, "budget": budgets}
        stride = values.get("stride")
        if isinstance(stride, list):
            return {**values, "stride": [_stride(item) for item in stride]}
        return {**values, "stride": _stride(stride)} if isinstance(stride, str) else values

    @property
    def budgets(self) -> list[int | float | None]:
        """The budgets a step may draw; None stands for `refresh.budget`."""
        return [*self.budget] if isinstance(self.budget, list) else [self.budget]

    @property
    def strides(self) -> list[int]:
        """The strides a step may draw."""
        return self.stride if isinstance(self.stride, list) else [self.stride]

    @property
    def select_strides(self) -> list[int | None]:
        """The select strides a step may draw; None stands for no selecting steps."""
        return self.select_stride if isinstance(self.select_stride, list) else [self.select_stride]

    @property
    def chunk_counts(self) -> list[int]:
        """The numbers of chunks a step may draw."""
        return self.chunks if isinstance(self.chunks, list) else [1 if self.chunks is None else self.chunks]

    def prompt_range(self, row_length: int) -> tuple[int, int]:
        """Least and most prompt length in tokens, for rows of `row_length`; `SettingsError` if outside the row."""
        if self.prompt_length is None:
            largest = max((stride for stride in self.strides if stride < row_length), default=1)
            most = max(1, row_length - largest)
            return min(max(1, row_length // 4), most), most
        bounds = self.prompt_length if isinstance(self.prompt_length, list) else [self.prompt_length] * 2
        if bounds[0] < 1 or bounds[1] >= row_length:
            raise SettingsError(
                f"simulation.prompt_length={self.prompt_length} must lie between 1 and {row_length - 1}: rows have "
                f"{row_length} tokens (data.row_length)"
            )
        return bounds[0], bounds[1]


def _budget(value: Any) -> Any:
    """A budget of the settings; a text such as "12.5%" becomes a share."""
    return RefreshConfig.plain_values({"budget": value})["budget"]


def _stride(value: Any) -> Any:
    """A stride of the settings; "never" becomes a number."""
    return NEVER if isinstance(value, str) and value.strip().lower() == "never" else value
