"""Perplexities of several strategies on the same sequences."""

import dataclasses
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from refreshkv.config import RefreshConfig
from refreshkv.evaluation.costs import effective_stride
from refreshkv.settings import settings_from_dict

DERIVED = ("loss", "perplexity", "effective_stride", "selecting_stride")
"""Properties of a `Result` that reports hold beside its fields."""


@dataclass(frozen=True)
class Result:
    """Losses and costs of one strategy."""

    name: str
    config: RefreshConfig | None
    """RefreshKV's schedule and selection; None for other strategies."""
    budget: int | None
    """Size K of the small cache in tokens; None for full attention."""
    losses: list[float]
    """(N,): next-token loss, in nats, of each scored position; mean over the sequences."""
    standard_error: float | None
    """Standard error of the mean loss over sequences; None for a single one."""
    effective_strides: dict[int, float | None]
    """Refreshed layer -> decoding steps per full step, over all sequences; None for a layer without a full step."""
    prompt_seconds: float | None = None
    """Time for one sequence's prompt. This and the next three are None if nothing was decoded token by token."""
    seconds: float | None = None
    """Time for one sequence's N decoding steps."""
    cache_bytes: float | None = None
    """Bytes of one sequence's cache at the end."""
    peak_memory: int | None = None
    """Most bytes that the GPU held during a batch, weights included; None also on a CPU."""
    row_losses: list[float] = field(default_factory=list)
    """Each sequence's mean loss over its scored tokens, in nats; empty if several processes shared the sequences."""
    selecting_strides: dict[int, float | None] = field(default_factory=dict)
    """Refreshed layer -> decoding steps per selecting step, over all sequences; empty without selecting steps."""
    share_read: float | None = None
    """Bytes of keys and values that a decoding step reads, as a share of those that full attention reads
    (`refreshkv.evaluation.costs.share_read`). This and the next two are None in reports of earlier versions."""
    share_computed: float | None = None
    """Operations of a decoding step's attention and scoring, as a share of full attention's
    (`refreshkv.evaluation.costs.share_computed`); None also for caches that evict."""
    agreement: float | None = None
    """Share of the scored positions where the most likely token is full attention's; None also without full
    attention."""

    @property
    def is_full(self) -> bool:
        """Whether the strategy is full attention."""
        return self.budget is None

    @property
    def loss(self) -> float:
        """Mean next-token loss of the last N tokens, in nats."""
        return fmean(self.losses)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of the last N tokens."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    @property
    def effective_stride(self) -> float | None:
        """Decoding steps per full step over all layers; None for full attention, or if no step was full."""
        return effective_stride(list(self.effective_strides.values()))

    @property
    def selecting_stride(self) -> float | None:
        """Decoding steps per selecting step over all layers; None if there was none."""
        return effective_stride(list(self.selecting_strides.values()))


@dataclass(frozen=True)
class Evaluation:
    """The results of several strategies on the same sequences."""

    results: list[Result]
    rows: int
    """How many sequences."""
    row_length: int
    """T, tokens of each sequence."""
    last_tokens: int
    """N, scored tokens of each sequence."""
    warnings: list[str] = field(default_factory=list)
    """Settings under which the figures mean less than they seem to."""
    hardware: list[str] = field(default_factory=list)
    """Where the sequences were computed; a resumed evaluation may have several places."""

    @property
    def full(self) -> Result:
        """Full attention's result; `ValueError` if it was not among the strategies."""
        for result in self.results:
            if result.is_full:
                return result
        raise ValueError("full attention was not evaluated: there is nothing to compare with")

    def ratio(self, result: Result) -> float:
        """The strategy's perplexity divided by full attention's."""
        return result.perplexity / self.full.perplexity

    def gap(self, result: Result) -> float:
        """The strategy's perplexity minus full attention's."""
        return result.perplexity - self.full.perplexity

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the properties that readers look for (perplexity, ...)."""
        values = dataclasses.asdict(self)
        for result, entry in zip(self.results, values["results"], strict=True):
            for name in DERIVED:
                entry[name] = getattr(result, name)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """Reads what `to_dict` wrote, also from JSON, where layer numbers are text.

        Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for anything else.
        """
        results = [{key: item for key, item in entry.items() if key not in DERIVED} for entry in values["results"]]
        return settings_from_dict(cls, {**values, "results": results})


def gap_closed(before: Evaluation, after: Evaluation) -> dict[str, float | None]:
    """Share of each strategy's gap that training closed: `1 - gap(after) / gap(before)`; negative if the gap grew.

    The gap is the strategy's perplexity minus full attention's with the same model. None where `before` had no gap.
    Strategies that only one of the two evaluations has are left out.
    """
    earlier = {result.name: before.gap(result) for result in before.results if not result.is_full}
    return {
        result.name: 1 - after.gap(result) / earlier[result.name] if earlier[result.name] > 0 else None
        for result in after.results
        if result.name in earlier
    }
