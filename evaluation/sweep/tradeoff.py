"""What each strategy of a grid loses and reads, on one text or several, and the one recommended for a model."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import stdev

from datasets import Dataset
from transformers import PreTrainedModel

from refreshkv.config import NEVER, RefreshConfig
from refreshkv.evaluation.perplexity.evaluation import evaluate, is_finished
from refreshkv.evaluation.perplexity.losses import SequenceRecords
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.strategies import Strategy


@dataclass(frozen=True)
class TradeoffPoint:
    """One strategy, on all texts."""

    name: str
    config: RefreshConfig | None
    """RefreshKV's schedule and selection; None for a cache that evicts."""
    budget: int
    """Size K of the small cache in tokens."""
    losses: dict[str, float]
    """Text -> perplexity over full attention's, less one."""
    errors: dict[str, float | None]
    """Text -> standard error of the loss over the sequences, each beside full attention's of the same one; None for a
    single sequence."""
    read: float
    """Bytes of keys and values that a decoding step reads, as a share of full attention's; mean over the texts."""
    computed: float | None
    """Operations of attention and scoring, likewise; None for a cache that evicts."""
    agreements: dict[str, float | None]
    """Text -> share of positions where the most likely token is full attention's."""
    effective_stride: float | None
    """Decoding steps per full step, on the first text."""
    selecting_stride: float | None
    """Decoding steps per selecting step, on the first text."""

    @property
    def loss(self) -> float:
        """The largest loss of any text."""
        return max(self.losses.values())


@dataclass(frozen=True)
class Tradeoff:
    """The measured strategies of one model."""

    evaluations: dict[str, Evaluation]
    """Text -> the results, of the same strategies on each, full attention among them."""
    within: float
    """Largest loss that a recommended strategy may have on any text, such as 0.01."""
    left_out: list[str] = dataclasses.field(default_factory=list)
    """Strategies that were not measured, for the sweep was stopped before."""

    @property
    def points(self) -> list[TradeoffPoint]:
        """One point for each strategy but full attention, in the grid's order."""
        first = next(iter(self.evaluations.values()))
        return [self._point(result.name) for result in first.results if not result.is_full]

    def recommend(self) -> tuple[TradeoffPoint | None, str]:
        """The strategy that reads the fewest bytes of those within the loss on every text, and the reason in one line.

        Only RefreshKV's strategies are recommended. Of equal bytes it takes the smaller loss.
        """
        own = [point for point in self.points if point.config is not None]
        good = [point for point in own if point.loss <= self.within]
        if not good:
            best = min(own, key=lambda point: point.loss, default=None)
            nearest = "" if best is None else f"; the nearest, {best.name}, loses {best.loss:.2%}"
            return None, (
                f"no recommendation: no strategy loses at most {self.within:.2%} on every text{nearest}; allow more "
                "with --within, or add larger budgets and shorter select strides to the grid"
            )
        best = min(good, key=lambda point: (point.read, point.loss))
        return best, f"recommended: {describe(best)}: the fewest bytes within {self.within:.2%} on every text"

    def _point(self, name: str) -> TradeoffPoint:
        results = {text: self._result(evaluation, name) for text, evaluation in self.evaluations.items()}
        first = next(iter(results.values()))
        assert first.budget is not None and all(result.share_read is not None for result in results.values())
        return TradeoffPoint(
            name=name,
            config=first.config,
            budget=first.budget,
            losses={text: self.evaluations[text].ratio(result) - 1 for text, result in results.items()},
            errors={text: _paired_error(self.evaluations[text], result) for text, result in results.items()},
            read=sum(result.share_read or 0.0 for result in results.values()) / len(results),
            computed=first.share_computed,
            agreements={text: result.agreement for text, result in results.items()},
            effective_stride=first.effective_stride,
            selecting_stride=first.selecting_stride,
        )

    @staticmethod
    def _result(evaluation: Evaluation, name: str) -> Result:
        return next(result for result in evaluation.results if result.name == name)


def _paired_error(evaluation: Evaluation, result: Result) -> float | None:
    """Standard error of the perplexity over full attention's, from the sequences' differences of their mean losses."""
    pairs = zip(result.row_losses, evaluation.full.row_losses, strict=True)
    differences = [own - full for own, full in pairs]
    if len(differences) < 2:
        return None
    return evaluation.ratio(result) * stdev(differences) / len(differences) ** 0.5


def describe(point: TradeoffPoint) -> str:
    """The recommended settings and what they cost, in words."""
    assert point.config is not None
    config = point.config
    parts = ["stride " + ("never" if config.stride == NEVER else str(config.stride))]
    parts += [] if config.threshold is None else [f"threshold {config.threshold:g}"]
    if config.select_stride is not None:
        parts += [f"select_stride {config.select_stride}", f"score_bits {config.score_bits}"]
    losses = ", ".join(f"{text} {loss:+.2%}" for text, loss in point.losses.items())
    return f"{', '.join(parts)}, K {point.budget} ({point.name}; reads {point.read:.1%} of full attention's; {losses})"


def measure_tradeoff(
    model: PreTrainedModel,
    texts: dict[str, Dataset],
    strategies: list[Strategy],
    last_tokens: int,
    within: float,
    records: SequenceRecords,
    batch_size: int = 1,
    stop_after: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tradeoff:
    """Measures the strategies in order, each on all texts.

    Args:
        texts: name -> sequences, all of the same length.
        strategies: full attention first.
        stop_after: seconds after which no further strategy is begun; those whose sequences are all in the records count
            as measured. None: no limit.
    """
    begun, done, left_out = clock(), [], []
    for strategy in strategies:
        is_late = stop_after is not None and records.processes.from_first(lambda: clock() - begun > stop_after)
        if is_late and not strategy.is_full:
            if not all(is_finished(model, rows, strategy, last_tokens, records) for rows in texts.values()):
                left_out.append(strategy.name)
                continue
        for rows in texts.values():
            evaluate(model, rows, [strategy], last_tokens, batch_size, records=records)
        done.append(strategy)
    evaluations = {name: evaluate(model, rows, done, last_tokens, records=records) for name, rows in texts.items()}
    return Tradeoff(evaluations, within, left_out)
