"""Perplexity of a sequence's last tokens when they are decoded from a small cache, against full attention.

The tokens are known (teacher forcing). For full attention and RefreshKV one parallel pass gives the losses that
decoding token by token would give; caches that evict have no such pass and decode.

Shapes: `B` sequences of a batch, `T` tokens of each, `N` last tokens that are scored, `P = T - N` prompt length.
"""

import math
from statistics import fmean
from typing import cast

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from refreshkv.evaluation.perplexity.losses import Measurement, SequenceRecord, SequenceRecords
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.strategies import Strategy
from refreshkv.settings import SettingsError


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
        records: sequences that it has are not computed again, the others are added; one process only.

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
        with tqdm(total=len(strategies) * len(own), unit=" rows", disable=not progress or rank != 0) as bar:
            results = [
                _result(item, measurement.prompt_length, measurement.records_of(item, own, bar), world, decoder.device)
                for item in strategies
            ]
    finally:
        model.train(was_training)
    warnings = budget_warnings(strategies, row_length, last_tokens)
    return Evaluation(results, len(own) * world, row_length, last_tokens, warnings)


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


def _summed(
    losses: Tensor, full_steps: dict[int, int], world: int, device: torch.device
) -> tuple[Tensor, float, float, int, dict[int, int]]:
    """Sums over the sequences of all processes, from this one's losses (sequences, N) and full steps per layer.

    Returns the sums of: the losses (N,), each sequence's mean loss, its square, the sequences, the full steps.
    """
    means, layers = losses.mean(dim=1), sorted(full_steps)
    counts = [means.sum(), means.square().sum(), len(means), *(full_steps[layer] for layer in layers)]
    sums = torch.cat([losses.sum(dim=0), torch.tensor(counts, dtype=torch.float64)])
    if world > 1:
        sums = sums.to(device)  # NCCL reduces nothing that lies in main memory
        dist.all_reduce(sums)
        sums = sums.cpu()
    length = losses.shape[1]
    mean, square, count, *steps = sums[length:].tolist()
    return sums[:length], mean, square, int(count), dict(zip(layers, map(int, steps), strict=True))


def _result(
    strategy: Strategy, prompt_length: int, records: list[SequenceRecord], world: int, device: torch.device
) -> Result:
    """One strategy's result, from the records of this process's sequences, summed over all processes."""
    own = torch.tensor([record.losses for record in records], dtype=torch.float64)
    steps: dict[int, int] = {}
    for record in records:
        for layer, count in (record.full_steps or {}).items():
            steps[layer] = steps.get(layer, 0) + count
    losses, mean, square, sequences, steps = _summed(own, steps, world, device)
    if not losses.isfinite().all():
        raise SettingsError(f"{strategy.name}: the loss is not finite; try float32, and see whether the model is sound")
    variance = max(0.0, square - mean**2 / sequences) / (sequences - 1) if sequences > 1 else None
    return Result(
        name=strategy.name,
        config=strategy.config,
        budget=strategy.largest_budget(prompt_length),
        losses=(losses / sequences).tolist(),
        standard_error=None if variance is None else math.sqrt(variance / sequences),
        effective_strides={layer: sequences * len(losses) / count if count else None for layer, count in steps.items()},
        prompt_seconds=_mean([record.prompt_seconds for record in records]),
        seconds=_mean([record.seconds for record in records]),
        cache_bytes=_mean([record.cache_bytes for record in records]),
        peak_memory=max((r.peak_memory for r in records if r.peak_memory is not None), default=None),
        row_losses=own.mean(dim=1).tolist() if world == 1 else [],
    )


def _mean(values: list[float | None]) -> float | None:
    """The mean; None if the records have no such values."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
