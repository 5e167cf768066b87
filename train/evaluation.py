"""Perplexity of a row's last tokens when they are decoded from the small cache, against full attention.

Teacher-forced: one parallel pass gives the numbers that decoding the same tokens one by one would give.

Shapes: `B` rows of a batch, `T` tokens in a row, `N` last tokens that are scored, `P = T - N` prompt length.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from refreshkv.config import NEVER, RefreshConfig, Simulation
from refreshkv.settings import SettingsError

FULL = "full"
NEVER_REFRESHED = "never (SnapKV)"
LOGITS_AT_ONCE = 1 << 26
"""Logits that are held in float32 at the same time: 256 MiB."""


@dataclass(frozen=True)
class Strategy:
    """One way to decode."""

    name: str
    config: RefreshConfig | None
    """Schedule and selection; None for full attention."""


@dataclass(frozen=True)
class Result:
    """What one strategy gave."""

    name: str
    config: RefreshConfig | None
    budget: int | None
    """Size K of the small cache in tokens; None for full attention."""
    losses: list[float]
    """(N,): mean next-token loss, in nats, of each scored token over the rows."""
    standard_error: float | None
    """Of the mean loss, over rows; None for a single row."""
    effective_strides: dict[int, float | None]
    """Refreshed layer -> decoding steps per full step, over all rows; None for a layer without a full step."""

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
            if result.config is None:
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
            kept = {name: entry[name] for name in names}
            if kept["config"] is not None:
                kept["config"] = RefreshConfig.from_dict(kept["config"])
            kept["effective_strides"] = {int(layer): stride for layer, stride in kept["effective_strides"].items()}
            results.append(Result(**kept))
        return cls(results, *(values[name] for name in ("rows", "row_length", "last_tokens", "warnings")))


def default_strategies(config: RefreshConfig, strides: list[int]) -> list[Strategy]:
    """Full attention, a refresh every S steps for each of `strides`, the similarity schedule of `config` if it has a
    threshold, and a selection after the prompt that is never refreshed; all with the selection of `config`."""
    strategies = [Strategy(FULL, None)]
    for stride in dict.fromkeys(strides):
        strategies.append(Strategy(f"refresh S={stride}", dataclasses.replace(config, stride=stride, threshold=None)))
    if config.threshold is not None and config.stride != NEVER:
        strategies.append(Strategy(f"refresh S={config.stride} threshold {config.threshold:g}", config))
    strategies.append(Strategy(NEVER_REFRESHED, dataclasses.replace(config, stride=NEVER, threshold=None)))
    return strategies


def row_losses(model: nn.Module, ids: Tensor, simulation: Simulation | None = None, last: int | None = None) -> Tensor:
    """Next-token losses of ids (B, T) in nats: (B, n) float32 of the last `n = last` tokens, of all T - 1 if None.

    None for `simulation` is full attention. Only the last n positions' logits are computed, in the model's own dtype,
    and few of them are held in float32 at a time.
    """
    count = ids.shape[1] - 1 if last is None else last
    extra = {} if simulation is None else {"refresh": simulation}
    logits = model(ids, use_cache=False, logits_to_keep=count + 1, **extra).logits[:, :-1]
    chunk = max(1, LOGITS_AT_ONCE // (logits.shape[0] * logits.shape[2]))
    parts = zip(logits.split(chunk, dim=1), ids[:, -count:].split(chunk, dim=1), strict=True)
    return torch.cat(
        [F.cross_entropy(part.float().transpose(1, 2), targets, reduction="none") for part, targets in parts], dim=1
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Dataset,
    strategies: list[Strategy],
    last_tokens: int,
    batch_size: int = 1,
    progress: bool = True,
    rank: int = 0,
    world: int = 1,
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

    Raises `SettingsError` if there are too few rows, if N is not inside the row, or if a loss is not finite.
    """
    _check_rows(len(rows), batch_size, world)
    row_length = len(rows[0]["input_ids"])
    check_last_tokens(last_tokens, row_length)
    own = range(rank, len(rows) // world * world, world)
    batches = [list(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]
    was_training = getattr(model, "module", model).training  # an engine's own flag stays as it was made
    model.eval()
    try:
        with tqdm(total=len(strategies) * len(batches), unit=" batches", disable=not progress or rank != 0) as bar:
            results = [
                _measure(model, rows, batches, item, row_length - last_tokens, world, bar) for item in strategies
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
    earlier = {result.name: before.gap(result) for result in before.results if result.config is not None}
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


def budget_warnings(strategies: list[Strategy], row_length: int, last_tokens: int) -> list[str]:
    """One line for each budget that no scored position's context exceeds, so that it equals full attention."""
    prompt_length, last_scored = row_length - last_tokens, row_length - 2
    budgets = {item.config.largest_budget(prompt_length) for item in strategies if item.config is not None}
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


def _measure(
    model: nn.Module,
    rows: Dataset,
    batches: list[list[int]],
    strategy: Strategy,
    prompt_length: int,
    world: int,
    bar: tqdm,
) -> Result:
    """One strategy on this process's batches of row numbers, summed over all processes."""
    bar.set_description(strategy.name)
    losses, full_steps = [], {}
    for batch in batches:
        ids = rows[batch]["input_ids"].to(model.device)
        simulation = None if strategy.config is None else Simulation(prompt_length, strategy.config, record=True)
        losses.append(row_losses(model, ids, simulation, last=ids.shape[1] - prompt_length).double().cpu())
        if simulation is not None:
            _count_full_steps(simulation, full_steps)
        bar.update()
    return _result(strategy, prompt_length, *_summed(torch.cat(losses), full_steps, world, model.device))


def _count_full_steps(simulation: Simulation, full_steps: dict[int, int]) -> None:
    """Adds each layer's full steps after the prompt to `full_steps`."""
    if not simulation.full_steps:
        raise ValueError("the model took no notice of the simulation: call refreshkv.enable(model) before evaluate()")
    for layer, flags in simulation.full_steps.items():
        full_steps[layer] = full_steps.get(layer, 0) + int(flags[:, simulation.prompt_length :].sum())


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
    strategy: Strategy, prompt_length: int, losses: Tensor, mean: float, square: float, rows: int, steps: dict[int, int]
) -> Result:
    if not losses.isfinite().all():
        raise SettingsError(f"{strategy.name}: the loss is not finite; try float32, and see whether the model is sound")
    variance = max(0.0, square - mean**2 / rows) / (rows - 1) if rows > 1 else None
    return Result(
        name=strategy.name,
        config=strategy.config,
        budget=None if strategy.config is None else strategy.config.largest_budget(prompt_length),
        losses=(losses / rows).tolist(),
        standard_error=None if variance is None else math.sqrt(variance / rows),
        effective_strides={layer: rows * len(losses) / count if count else None for layer, count in steps.items()},
    )
