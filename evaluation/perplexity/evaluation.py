"""Perplexity of a sequence's last tokens when they are decoded from a small cache, against full attention.

The tokens are known (teacher forcing). For full attention and RefreshKV one parallel pass gives the losses that
decoding token by token would give; caches that evict have no such pass and decode.

Shapes: `B` sequences of a batch, `T` tokens of each, `N` last tokens that are scored, `P = T - N` prompt length.
"""

import math
from statistics import fmean
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from refreshkv.evaluation.costs import share_computed, share_read, step_rate
from refreshkv.evaluation.perplexity.losses import Measurement, SequenceRecord, SequenceRecords
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.strategies import Strategy
from refreshkv.settings import SettingsError

FULL_STEPS, SELECTING_STEPS, AGREEING = "full steps", "selecting steps", "agreeing"
CountKey = tuple[str, int]
"""What is counted, one of the three above, and in which layer (0 for what has no layer)."""


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
    stepwise: bool = False,
    records: SequenceRecords | None = None,
) -> Evaluation:
    """Computes the perplexity of the last N tokens of each sequence, after a prompt of P tokens, for each strategy.

    The scored tokens have positions `P .. T-1` and are predicted at `P-1 .. T-2`. The first is predicted at the
    prompt's end, where every strategy attends to all tokens. Effective strides count the decoding steps `P .. T-1`.

    Args:
        model: a transformers decoder after `refreshkv.enable`, or a DeepSpeed engine around one. This function sets
            evaluation mode, and afterwards restores the mode.
        rows: torch-format dataset of sequences, whose `input_ids` all have the same length T.
        batch_size: sequences of one forward pass.
        rank, world: this process takes sequences rank, rank + world, ...; a rest of fewer than `world` sequences is
            left out, so that all processes make the same number of forward passes (ZeRO-3 needs that). All processes
            get the same result.
        stepwise: decode token by token for every strategy: slow, but then all have times and memory.
        records: sequences that it has are not computed again, the others are added. Its processes divide these, and all
            of them get the result of all sequences; `rank` and `world` then stay as they are.

    Raises `SettingsError` if there are too few sequences, if N is not between 1 and T - 1, or if a loss is not finite.
    """
    _check_rows(len(rows), batch_size, world)
    assert records is None or world == 1
    row_length = len(rows[0]["input_ids"])
    check_last_tokens(last_tokens, row_length)
    own = list(range(rank, len(rows) // world * world, world))
    was_training = getattr(model, "module", model).training  # an engine's own flag stays as it was made
    model.eval()
    try:
        decoder = cast(PreTrainedModel, model)  # an engine passes its attributes on
        measurement = Measurement(decoder, rows, row_length - last_tokens, batch_size, stepwise, records)
        is_shown = progress and rank == 0 and (records is None or records.processes.is_first)
        with tqdm(total=len(strategies) * len(own), unit=" rows", disable=not is_shown) as bar:
            records_of = {item.name: measurement.records_of(item, own, bar) for item in strategies}
    finally:
        model.train(was_training)
    reference = next((records_of[item.name] for item in strategies if item.is_full), None)
    context = Context(row_length - last_tokens, last_tokens)
    results = [_result(item, context, records_of[item.name], reference, world, decoder.device) for item in strategies]
    warnings = budget_warnings(strategies, row_length, last_tokens)
    used = {record.hardware for own_records in records_of.values() for record in own_records if record.hardware}
    return Evaluation(results, len(own) * world, row_length, last_tokens, warnings, sorted(used))


def check_last_tokens(last_tokens: int, row_length: int) -> None:
    """Raises `SettingsError` if the last tokens leave no prompt, or are none."""
    if not 1 <= last_tokens < row_length:
        raise SettingsError(
            f"last tokens must lie between 1 and {row_length - 1}, got {last_tokens}: rows have {row_length} tokens, "
            "and those before are the prompt"
        )


def budget_warnings(strategies: list[Strategy], row_length: int, last_tokens: int) -> list[str]:
    """One line for each budget K that holds the context of every scored position, which then equals full attention."""
    prompt_length, last_scored = row_length - last_tokens, row_length - 2
    budgets = {budget for item in strategies if (budget := item.largest_budget(prompt_length)) is not None}
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


class Context(NamedTuple):
    """The lengths that all sequences share."""

    prompt_length: int
    last_tokens: int
    """Scored tokens, N."""

    @property
    def mean(self) -> float:
        """Tokens that full attention reads in a decoding step, the step's own included; mean over the N steps."""
        return self.prompt_length + (self.last_tokens + 1) / 2


def _summed(
    losses: Tensor, counts: dict[CountKey, int], world: int, device: torch.device
) -> tuple[Tensor, float, float, int, dict[CountKey, int]]:
    """Sums over the sequences of all processes, from this one's losses (sequences, N) and counts.

    All processes have the same counts. Returns the sums of: the losses (N,), each sequence's mean loss, its square, the
    sequences, the counts.
    """
    means, names = losses.mean(dim=1), sorted(counts)
    own = [means.sum(), means.square().sum(), len(means), *(counts[name] for name in names)]
    sums = torch.cat([losses.sum(dim=0), torch.tensor(own, dtype=torch.float64)])
    if world > 1:
        sums = sums.to(device)  # NCCL reduces nothing that lies in main memory
        dist.all_reduce(sums)
        sums = sums.cpu()
    length = losses.shape[1]
    mean, square, count, *totals = sums[length:].tolist()
    return sums[:length], mean, square, int(count), dict(zip(names, map(int, totals), strict=True))


def _count(records: list[SequenceRecord], reference: list[SequenceRecord] | None) -> dict[CountKey, int]:
    """Sums over the sequences: full and selecting steps of each layer, and positions with the reference's greedy token,
    if all records have greedy tokens."""
    counts: dict[CountKey, int] = {}
    for record in records:
        for kind, steps in ((FULL_STEPS, record.full_steps), (SELECTING_STEPS, record.selecting_steps)):
            for layer, count in (steps or {}).items():
                counts[kind, layer] = counts.get((kind, layer), 0) + count
    pairs = [(own.greedy, other.greedy) for own, other in zip(records, reference or records, strict=True)]
    if reference is not None and all(own is not None and other is not None for own, other in pairs):
        counts[AGREEING, 0] = sum(a == b for own, other in pairs for a, b in zip(own or [], other or [], strict=True))
    return counts


def _result(
    strategy: Strategy,
    context: Context,
    records: list[SequenceRecord],
    reference: list[SequenceRecord] | None,
    world: int,
    device: torch.device,
) -> Result:
    """One strategy's result, from the records of this process's sequences, summed over all processes.

    reference: full attention's records of the same sequences; None if it was not evaluated.
    """
    own = torch.tensor([record.losses for record in records], dtype=torch.float64)
    losses, mean, square, sequences, counts = _summed(own, _count(records, reference), world, device)
    if not losses.isfinite().all():
        raise SettingsError(f"{strategy.name}: the loss is not finite; try float32, and see whether the model is sound")
    variance = max(0.0, square - mean**2 / sequences) / (sequences - 1) if sequences > 1 else None
    strides: dict[str, dict[int, float | None]] = {FULL_STEPS: {}, SELECTING_STEPS: {}}
    for (kind, layer), count in counts.items():
        if kind in strides:
            strides[kind][layer] = sequences * len(losses) / count if count else None
    budget, agreeing = strategy.largest_budget(context.prompt_length), counts.get((AGREEING, 0))
    full, selecting = (step_rate(strides[kind].values()) for kind in (FULL_STEPS, SELECTING_STEPS))
    costs = _costs(strategy, context.mean, budget, full, selecting)
    return Result(
        name=strategy.name,
        config=strategy.config,
        budget=budget,
        losses=(losses / sequences).tolist(),
        standard_error=None if variance is None else math.sqrt(variance / sequences),
        effective_strides=strides[FULL_STEPS],
        prompt_seconds=_mean([record.prompt_seconds for record in records]),
        seconds=_mean([record.seconds for record in records]),
        cache_bytes=_mean([record.cache_bytes for record in records]),
        peak_memory=max((r.peak_memory for r in records if r.peak_memory is not None), default=None),
        row_losses=own.mean(dim=1).tolist() if world == 1 else [],
        selecting_strides=strides[SELECTING_STEPS],
        share_read=costs[0],
        share_computed=costs[1],
        agreement=None if agreeing is None else agreeing / (sequences * len(losses)),
    )


def _costs(
    strategy: Strategy, context: float, budget: int | None, full: float, selecting: float
) -> tuple[float, float | None]:
    """`costs.share_read` and `costs.share_computed` of the decoding steps; no second for caches that evict, whose
    scoring is not counted."""
    if budget is None:
        return 1.0, 1.0
    config = strategy.config
    if config is None:
        return share_read(context, budget), None
    read = share_read(context, budget, full, selecting, config.score_bits)
    return read, share_computed(context, budget, full, selecting, config.observation_window)


def is_finished(
    model: nn.Module, rows: Dataset, strategy: Strategy, last_tokens: int, records: SequenceRecords
) -> bool:
    """Whether the records have all these sequences under this strategy, so that `evaluate` computes nothing."""
    prompt_length = len(rows[0]["input_ids"]) - last_tokens
    measurement = Measurement(cast(PreTrainedModel, model), rows, prompt_length, 1, False, records)
    return not measurement.missing(strategy, list(range(len(rows))))


def _mean(values: list[float | None]) -> float | None:
    """The mean; None if the records have no such values."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
