"""Recommends a threshold of the similarity schedule for a model, as in the paper's appendix A.4.

Each threshold's cost and saved full steps are compared with fixed schedules that save as many.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from statistics import fmean, stdev

from refreshkv import RefreshConfig
from refreshkv.config import NEVER
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.strategies import Strategy, full_attention, never_refreshed, refreshing
from refreshkv.settings import SettingsError

THRESHOLDS = [0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]
"""The paper found 0.85 and 0.95 for models of 8 and 7 billion parameters; with 0.8 one of 30 million still refreshed at
nearly every decision step (docs/results/toy-models.md)."""
MULTIPLES = (1, 2, 3, 5)
"""Strides of the fixed schedules to compare with, in strides of the similarity schedule."""


def sweep_strategies(config: RefreshConfig, strides: list[int], thresholds: list[float]) -> list[Strategy]:
    """Full attention, every threshold at every stride, fixed schedules, and a selection that is never refreshed.

    All select as `config` says. Raises `SettingsError` for values that come twice, and for a stride of never.
    """
    if NEVER in strides:
        raise SettingsError("--strides: this model's own schedule is never refreshed; name check strides, such as 10")
    for name, values in (("--strides", strides), ("--thresholds", thresholds)):
        if len(set(values)) != len(values):
            raise SettingsError(f"{name} has a value twice")
    fixed = sorted({stride * multiple for stride in strides for multiple in MULTIPLES})
    found = [full_attention()]
    found += [refreshing(f"fixed S={s}", dataclasses.replace(config, stride=s, threshold=None)) for s in fixed]
    for stride in strides:
        for threshold in sorted(thresholds):
            changed = dataclasses.replace(config, stride=stride, threshold=threshold)
            found.append(refreshing(f"S={stride} threshold {threshold:g}", changed))
    return [*found, never_refreshed(config)]


@dataclass(frozen=True)
class Point:
    """Cost and saving of one schedule."""

    name: str
    stride: int | None
    """Steps between two decision steps; None for never."""
    threshold: float | None
    """None for a fixed schedule."""
    effective_stride: float | None
    """Decoding steps per full step; None if none was full."""
    gap: float
    """Mean loss minus full attention's, in nats."""
    kept: float | None
    """Share that this schedule keeps of the gain of the most frequent refresh; None if that gains nothing."""
    fixed_gap: float | None
    """Gap of a fixed schedule with the same effective stride, interpolated between measured ones; None outside."""
    score: float | None
    """Mean score of tasks, 0 to 1; None if none were evaluated."""


@dataclass(frozen=True)
class Recommendation:
    """The recommended schedule, if any, and the reason."""

    point: Point | None
    text: str
    """One line."""


@dataclass(frozen=True)
class Sweep:
    """The measured schedules of one model, and what follows from them."""

    evaluation: Evaluation
    keep: float
    """Share of the gain of refreshing that a recommended threshold must keep."""
    scores: dict[str, float] = field(default_factory=dict)
    """Schedule -> mean score of tasks, 0 to 1, if any; the recommendation does not depend on it."""

    @property
    def points(self) -> list[Point]:
        """One point for each schedule; full attention has none."""
        return [self._point(result) for result in self.evaluation.results if not result.is_full]

    @property
    def least_gap(self) -> float:
        """Gap of the fixed schedule with the shortest stride: the best that refreshing reaches."""
        return self._shortest.loss - self.evaluation.full.loss

    @property
    def _shortest(self) -> Result:
        fixed = [r for r in self.evaluation.results if _kind(r) == "fixed"]
        return min(fixed, key=lambda result: _schedule(result).stride)

    @property
    def largest_gap(self) -> float:
        """Gap of the selection that is never refreshed."""
        (never,) = [r for r in self.evaluation.results if _kind(r) == "never"]
        return never.loss - self.evaluation.full.loss

    @property
    def gain(self) -> tuple[float, float]:
        """Gain of the shortest fixed stride over never refreshing, in nats, and its standard error over sequences.

        All schedules have the same sequences, so differences are taken sequence by sequence. The error is infinite for
        a single one.
        """
        (never,) = [r for r in self.evaluation.results if _kind(r) == "never"]
        pairs = zip(never.row_losses, self._shortest.row_losses, strict=True)
        gains = [without - refreshed for without, refreshed in pairs]
        return fmean(gains), stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.inf

    @property
    def allowed_gap(self) -> float:
        """The largest gap of a schedule that keeps the share `keep` of the gain."""
        return self.largest_gap - self.keep * (self.largest_gap - self.least_gap)

    def recommend(self) -> Recommendation:
        """Recommends the threshold with the highest effective stride among those that keep enough of the gain.

        The limit is a share of the gain, not a perplexity: what refreshing reaches differs by model and budget.
        """
        gain, error = self.gain
        if gain < 2 * error:
            text = (
                f"no recommendation: what refreshing gains over never refreshing here ({gain:.4f} nats, standard error "
                f"{error:.4f} over rows) is within the noise; use more --rows, a smaller --budget or longer rows"
            )
            return Recommendation(None, text)
        good = [p for p in self.points if p.threshold is not None and p.gap <= self.allowed_gap and p.effective_stride]
        if not good:
            return Recommendation(
                None, f"no recommendation: no threshold keeps {self.keep:.0%} of what refreshing gains; try higher ones"
            )
        best = max(good, key=lambda point: (point.effective_stride, -point.gap))
        text = (
            f"recommended: stride {best.stride}, threshold {best.threshold:g}: the highest effective stride "
            f"({best.effective_stride:.1f}) that keeps at least {self.keep:.0%} of what refreshing gains (it keeps "
            f"{best.kept:.0%}; perplexity {math.expm1(best.gap):+.2%} against full attention)"
        )
        shortest = self._shortest.effective_stride
        # a threshold's full steps are among those of the shortest fixed stride
        assert best.effective_stride is not None and shortest is not None
        if best.effective_stride <= shortest:
            text += f"; it saves nothing over a full step at every {best.stride}th: try lower thresholds"
        elif best.threshold == min(point.threshold for point in self.points if point.threshold is not None):
            text += "; of those that were tried it is the lowest: lower ones may save more"
        return Recommendation(best, text)

    def _point(self, result: Result) -> Point:
        gap, span = result.loss - self.evaluation.full.loss, self.largest_gap - self.least_gap
        never, similarity = _kind(result) == "never", _kind(result) == "similarity"
        schedule = _schedule(result)
        return Point(
            name=result.name,
            stride=None if never else schedule.stride,
            threshold=schedule.threshold,
            effective_stride=result.effective_stride,
            gap=gap,
            kept=(self.largest_gap - gap) / span if span > 0 else None,
            fixed_gap=self._fixed_gap(result.effective_stride) if similarity else None,
            score=self.scores.get(result.name),
        )

    def _fixed_gap(self, stride: float | None) -> float | None:
        """`Point.fixed_gap`, interpolated over the logarithm of the stride."""
        fixed = sorted(
            (result.effective_stride, result.loss - self.evaluation.full.loss)
            for result in self.evaluation.results
            if _kind(result) == "fixed" and result.effective_stride
        )
        for (low, low_gap), (high, high_gap) in zip(fixed, fixed[1:], strict=False):
            if stride is not None and low <= stride <= high:
                share = math.log(stride / low) / math.log(high / low) if high > low else 0.0
                return low_gap + share * (high_gap - low_gap)
        return None


def _kind(result: Result) -> str:
    if result.is_full:
        return "full"
    schedule = _schedule(result)
    if schedule.stride == NEVER:
        return "never"
    return "fixed" if schedule.threshold is None else "similarity"


def _schedule(result: Result) -> RefreshConfig:
    """The schedule of a result other than full attention's."""
    assert result.config is not None
    return result.config
