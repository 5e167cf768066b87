"""Perplexity of a row's last tokens when they are decoded from a small cache, against full attention.

Teacher-forced. For full attention and RefreshKV one parallel pass gives the numbers that decoding the same tokens one
by one would give; under caches that evict they are decoded one by one.

Shapes: `B` rows of a batch, `T` tokens in a row, `N` last tokens that are scored, `P = T - N` prompt length.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from refreshkv.config import NEVER, RefreshConfig
from refreshkv.evaluation.sequence_losses import RowMeasurement, RowRecord, RowRecords
from refreshkv.evaluation.strategies import NEVER_REFRESHED, Decoding, full_attention, refreshing
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class Result:
    """What one strategy gave."""

    name: str
    config: RefreshConfig | None
    """RefreshKV's schedule and selection; None for every other way to decode."""
    budget: int | None
    """Size K of the small cache in tokens; None for full attention."""
    losses: list[float]
    """(N,): mean next-token loss, in nats, of each scored token over the rows."""
    standard_error: float | None
    """Of the mean loss, over rows; None for a single row."""
    effective_strides: dict[int, float | None]
    """Refreshed layer -> decoding steps per full step, over all rows; None for a layer without a full step."""
    prompt_seconds: float | None = None
    """Of one row's prompt; None if nothing was decoded token by token."""
    seconds: float | None = None
    """Of one row's N decoding steps; None likewise."""
    cache_bytes: float | None = None
    """Of one row's cache at the end; None likewise."""
    peak_memory: int | None = None
    """Most bytes that the GPU held during a batch, weights included; None likewise, and on a CPU."""
    row_losses: list[float] = field(default_factory=list)
    """Mean loss of each row's scored tokens, in nats; empty if several processes shared the rows."""

    @property
    def is_full(self) -> bool:
        """Whether it is of full attention."""
        return self.budget is None

    @property
    def loss(self) -> float:
        """Mean next-token loss of the last N tokens, in nats."""
        return fmean(self.losses)

    @property
    def perplexity(self) -> float:
        """Of the last N tokens: exp of their mean loss."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    @property
    def effective_stride(self) -> float | None:
        """Decoding steps per full step over all layers; None for full attention and if no step was full."""
        rates = [1 / stride if stride else 0.0 for stride in self.effective_strides.values()]
        return len(rates) / sum(rates) if any(rates) else None


@dataclass(frozen=True)
class Evaluation:
    """The results of several strategies on the same rows."""

    results: list[Result]
    rows: int
    row_length: int
    last_tokens: int
    warnings: list[str] = field(default_factory=list)
    """What makes the figures mean less than they seem to."""

    @property
    def full(self) -> Result:
        """Full attention's result. Raises `ValueError` if it was not among the strategies."""
        for result in self.results:
            if result.is_full:
                return result
        raise ValueError("full attention was not evaluated: there is nothing to compare with")

    def ratio(self, result: Result) -> float:
        """The strategy's perplexity over full attention's."""
        return result.perplexity / self.full.perplexity

    def gap(self, result: Result) -> float:
        """The strategy's perplexity less full attention's."""
        return result.perplexity - self.full.perplexity

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; those that follow from others (perplexity, ...) are added for readers."""
        values = dataclasses.asdict(self)
        for result, entry in zip(self.results, values["results"], strict=True):
            for name in ("loss", "perplexity", "effective_stride"):
                entry[name] = getattr(result, name)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """Reads what `to_dict` wrote, also after JSON has made text of the layers' numbers."""
        names = [item.name for item in dataclasses.fields(Result)]
        results = []
        for entry in values["results"]:
            kept = {name: entry[name] for name in names if name in entry}
            if kept["config"] is not None:
                kept["config"] = RefreshConfig.from_dict(kept["config"])
            kept["effective_strides"] = {int(layer): stride for layer, stride in kept["effective_strides"].items()}
            results.append(Result(**kept))
        return cls(results, *(values[name] for name in ("rows", "row_length", "last_tokens", "warnings")))


def default_strategies(config: RefreshConfig, strides: list[int]) -> list[Decoding]:
    """Full attention, a refresh every S steps for each of `strides`, the similarity schedule of `config` if it has a
    threshold, and a selection after the prompt that is never refreshed; all with the selection of `config`."""
    strategies = [full_attention()]
    for stride in dict.fromkeys(strides):
        strategies.append(refreshing(f"refresh S={stride}", dataclasses.replace(config, stride=stride, threshold=None)))
    if config.threshold is not None and config.stride != NEVER:
        strategies.append(refreshing(f"refresh S={config.stride} threshold {config.threshold:g}", config))
    strategies.append(refreshing(NEVER_REFRESHED, dataclasses.replace(config, stride=NEVER, threshold=None)))
    return strategies


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Dataset,
    strategies: list[Decoding],
    last_tokens: int,
    batch_size: int = 1,
    progress: bool = True,
    rank: int = 0,
    world: int = 1,
    stepwise: bool = False,
    records: RowRecords | None = None,
) -> Evaluation:
    """Perplexity of the last N tokens of each row, after a prompt of `P = T - N`, under each strategy.

    The scored tokens stand at positions `P .. T-1` and are predicted from `P-1 .. T-2`: the first of them from the
    prompt's end, which is full in every strategy. Effective strides count the decoding steps `P .. T-1`.

    Args:
        model: a transformers decoder after `refreshkv.enable`, or a DeepSpeed engine around one. It is put in
            evaluation mode, and back into its own afterwards.
        rows: torch-format dataset whose `input_ids` all have the same length T.
        batch_size: rows of one forward pass.
        rank, world: this process takes rows rank, rank + world, ...; a rest of fewer than `world` rows is left out, so
            that all processes make the same number of forward passes (ZeRO-3 needs that). All get the same result.
        stepwise: decode token by token under every strategy, not only where nothing else gives the numbers: slow, and
            then all have times and memory.
        records: rows in there are not computed again, and the others are added; one process only.

    Raises `SettingsError` if there are too few rows, if N is not inside the row, or if a loss is not finite.
    """
    _check_rows(len(rows), batch_size, world)
    assert records is None or world == 1
    row_length = len(rows[0]["input_ids"])
    check_last_tokens(last_tokens, row_length)
    own = list(range(rank, len(rows) // world * world, world))
    was_training = getattr(model, "module", model).training  # an engine's own flag stays as it was made
    model.eval()
    try:
        measurement = RowMeasurement(model, rows, row_length - last_tokens, batch_size, stepwise, records)
        with tqdm(total=len(strategies) * len(own), unit=" rows", disable=not progress or rank != 0) as bar:
            results = [
                _result(item, measurement.prompt_length, measurement.records_of(item, own, bar), world, model.device)
                for item in strategies
            ]
    finally:
        model.train(was_training)
    warnings = budget_warnings(strategies, row_length, last_tokens)
    return Evaluation(results, len(own) * world, row_length, last_tokens, warnings)


def gap_closed(before: Evaluation, after: Evaluation) -> dict[str, float | None]:
    """Share of each strategy's gap that is gone: `1 - gap(after) / gap(before)`, 1 for all of it, negative if it grew.

    A gap is the perplexity less full attention's of the same model. None where there was no gap before. Strategies
    that only one of the two has are left out.
    """
    earlier = {result.name: before.gap(result) for result in before.results if not result.is_full}
    return {
        result.name: 1 - after.gap(result) / earlier[result.name] if earlier[result.name] > 0 else None
        for result in after.results
        if result.name in earlier
    }


def check_last_tokens(last_tokens: int, row_length: int) -> None:
    """Raises `SettingsError` if the last tokens leave no prompt, or are none."""
    if not 1 <= last_tokens < row_length:
        raise SettingsError(
            f"last tokens must lie between 1 and {row_length - 1}, got {last_tokens}: rows have {row_length} tokens, "
            "and those before are the prompt"
        )


def budget_warnings(strategies: list[Decoding], row_length: int, last_tokens: int) -> list[str]:
    """One line for each budget that no scored position's context exceeds, so that it equals full attention."""
    prompt_length, last_scored = row_length - last_tokens, row_length - 2
    budgets = {item.largest_budget(prompt_length) for item in strategies if not item.is_full}
    return [
        f"the small cache (K = {budget:,}) holds all of a row of {row_length:,} tokens and never constrains anything: "
        "all strategies are full attention; lower the budget, or use longer rows"
        for budget in sorted(budgets)
        if budget >= last_scored  # a partial step sees K earlier positions and its own
    ]


def _check_rows(count: int, batch_size: int, world: int) -> None:
    if count < world:
        raise SettingsError(f"there are {count} rows to evaluate on {world} processes; each needs at least one")
    if batch_size < 1:
        raise SettingsError(f"batch size must be at least 1, got {batch_size}")


def _summed(
    losses: Tensor, full_steps: dict[int, int], world: int, device: torch.device
) -> tuple[Tensor, float, float, int, dict[int, int]]:
    """Sums over the rows of all processes, from this one's losses (rows, N) and full steps: the losses (N,), each row's
    mean, its square, the number of rows, the full steps per layer."""
    means, layers = losses.mean(dim=1), sorted(full_steps)
    counts = [means.sum(), means.square().sum(), len(means), *(full_steps[layer] for layer in layers)]
    sums = torch.cat([losses.sum(dim=0), torch.tensor(counts, dtype=torch.float64)])
    if world > 1:
        sums = sums.to(device)  # NCCL reduces nothing that lies in main memory
        dist.all_reduce(sums)
        sums = sums.cpu()
    length = losses.shape[1]
    mean, square, rows, *steps = sums[length:].tolist()
    return sums[:length], mean, square, int(rows), dict(zip(layers, map(int, steps), strict=True))


def _result(
    strategy: Decoding, prompt_length: int, records: list[RowRecord], world: int, device: torch.device
) -> Result:
    """Of this process's rows, summed over all processes."""
    own = torch.tensor([record.losses for record in records], dtype=torch.float64)
    steps: dict[int, int] = {}
    for record in records:
        for layer, count in (record.full_steps or {}).items():
            steps[layer] = steps.get(layer, 0) + count
    losses, mean, square, rows, steps = _summed(own, steps, world, device)
    if not losses.isfinite().all():
        raise SettingsError(f"{strategy.name}: the loss is not finite; try float32, and see whether the model is sound")
    variance = max(0.0, square - mean**2 / rows) / (rows - 1) if rows > 1 else None
    return Result(
        name=strategy.name,
        config=strategy.config,
        budget=strategy.largest_budget(prompt_length),
        losses=(losses / rows).tolist(),
        standard_error=None if variance is None else math.sqrt(variance / rows),
        effective_strides={layer: rows * len(losses) / count if count else None for layer, count in steps.items()},
        prompt_seconds=_mean([record.prompt_seconds for record in records]),
        seconds=_mean([record.seconds for record in records]),
        cache_bytes=_mean([record.cache_bytes for record in records]),
        peak_memory=max((r.peak_memory for r in records if r.peak_memory is not None), default=None),
        row_losses=own.mean(dim=1).tolist() if world == 1 else [],
    )


def _mean(values: list[float | None]) -> float | None:
    """Of values that all rows have, or none has."""
    return None if None in values else fmean(values)
