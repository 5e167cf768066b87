"""Losses of sequences under one strategy: from one parallel pass where that is possible, else token by token.

Shapes: `B` sequences of a batch, `T` tokens of each, `N` last tokens that are scored, `P = T - N` prompt length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from refreshkv.config import Simulation, Trace
from refreshkv.evaluation.caches import Caches
from refreshkv.evaluation.inputs import vocabulary_size
from refreshkv.evaluation.perplexity.stepwise import Decoded, decode_known
from refreshkv.evaluation.records import RecordFile, record_key
from refreshkv.evaluation.reports import hardware
from refreshkv.evaluation.strategies import Strategy
from refreshkv.identity import fingerprint
from refreshkv.settings import SettingsError, settings_from_dict

LOGITS_AT_ONCE = 1 << 26
"""Most logits held in float32 at the same time: 256 MiB."""


@dataclass(frozen=True)
class SequenceRecord:
    """Losses and costs of one sequence under one strategy."""

    key: str
    """Hash of everything that the record depends on; empty if no file keeps it."""
    strategy: str
    losses: list[float]
    """(N,): next-token losses of the scored tokens, in nats."""
    full_steps: dict[int, int] | None
    """Refreshed layer -> full steps among the N decoding steps; None if nothing is refreshed."""
    prompt_seconds: float | None = None
    """The batch's prompt time divided by its sequences. This and the next three are None without decoding."""
    seconds: float | None = None
    """The batch's time for the N decoding steps, divided by its sequences."""
    cache_bytes: float | None = None
    """Bytes of the batch's cache at the end, divided by its sequences."""
    peak_memory: int | None = None
    """Most bytes that the GPU held during the batch, weights included; None on a CPU."""
    selecting_steps: dict[int, int] | None = None
    """Refreshed layer -> selecting steps among the N decoding steps; None if there are none."""
    greedy: list[int] | None = None
    """(N,): the most likely token in the place of each scored token; None in records of earlier versions."""
    hardware: str | None = None
    """Where it was computed; None in records of earlier versions."""


class SequenceRecords(RecordFile[SequenceRecord]):
    """The finished sequences of an evaluation, in a file."""

    kind = "an evaluation of rows"

    def parse(self, values: dict[str, Any]) -> SequenceRecord:
        return settings_from_dict(SequenceRecord, values)


def sequence_losses(
    model: nn.Module,
    ids: Tensor,
    simulation: Simulation | None = None,
    last: int | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Next-token losses in nats, (B, n) float32, of the last n = `last` tokens of ids (B, T); of T - 1 tokens if None.

    simulation: None is full attention. trace: receives the simulation's full steps. The model computes the logits of
    the last n positions only, in its own dtype; at most `LOGITS_AT_ONCE` of them are converted to float32 at a time.
    """
    return _losses(_last_logits(model, ids, simulation, last, trace), ids)


def losses_and_likeliest(model: nn.Module, ids: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Under full attention, for the last n = `last` tokens of ids (B, T): their losses (B, n) float32, and the most
    likely token in the place of each, (B, n) int64."""
    logits = _last_logits(model, ids, None, last, None)
    return _losses(logits, ids), logits.argmax(-1)


def _last_logits(
    model: nn.Module, ids: Tensor, simulation: Simulation | None, last: int | None, trace: Trace | None
) -> Tensor:
    """Logits (B, n, vocabulary) that predict the last n tokens; arguments as in `sequence_losses`."""
    count = ids.shape[1] - 1 if last is None else last
    extra = {} if simulation is None else {"simulation": simulation, "trace": trace}
    return model(ids, use_cache=False, logits_to_keep=count + 1, **extra).logits[:, :-1]


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Losses (B, n) float32 of the last n tokens of ids (B, T), from their logits (B, n, vocabulary)."""
    chunk = max(1, LOGITS_AT_ONCE // (logits.shape[0] * logits.shape[2]))
    parts = zip(logits.split(chunk, dim=1), ids[:, -logits.shape[1] :].split(chunk, dim=1), strict=True)
    return torch.cat([_cross_entropy(part, targets) for part, targets in parts], dim=1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)


class Measurement:
    """Measures the same sequences with one model, under one strategy after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Dataset,
        prompt_length: int,
        batch_size: int,
        stepwise: bool,
        records: SequenceRecords | None,
    ) -> None:
        """Arguments: as those of `refreshkv.evaluation.perplexity.evaluate`."""
        self.model, self.rows, self.prompt_length, self.batch_size = model, rows, prompt_length, batch_size
        self.stepwise, self.records = stepwise, records
        self.weights = "" if records is None else fingerprint(model)
        self.caches = Caches(model)

    def records_of(self, strategy: Strategy, numbers: list[int], bar: tqdm) -> list[SequenceRecord]:
        """The records of the sequences with these numbers, in this order; computes those that no file has."""
        bar.set_description(strategy.name)
        missing = self.missing(strategy, numbers)
        kept, records = set(numbers) - set(missing), self.records
        found = {} if records is None else {number: records[self._key(strategy, number)] for number in kept}
        bar.update(len(found))
        batches = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        for batch, made in self._computed(batches, lambda batch: self._batch(strategy, batch)):
            found |= dict(zip(batch, made, strict=True))
            bar.update(len(batch))
        return [found[number] for number in numbers]

    def _computed(
        self, batches: list[list[int]], work: Callable[[list[int]], list[SequenceRecord]]
    ) -> Iterator[tuple[list[int], list[SequenceRecord]]]:
        """Each batch with its records; those of a file go there, and its processes divide the batches."""
        if self.records is not None:
            return self.records.fill(batches, work)
        return ((batch, work(batch)) for batch in batches)

    def missing(self, strategy: Strategy, numbers: list[int]) -> list[int]:
        """Those of the sequences with these numbers that no file has under this strategy."""
        records = self.records
        return [n for n in numbers if records is None or records.get(self._key(strategy, n)) is None]

    def _batch(self, strategy: Strategy, numbers: list[int]) -> list[SequenceRecord]:
        ids = self.rows[numbers]["input_ids"]
        size = vocabulary_size(self.model)
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise SettingsError(
                f"the rows hold token ids from {int(ids.min())} to {int(ids.max())}, but the model has {size} tokens: "
                "prepare them with the model's tokenizer (data.tokenizer)"
            )
        ids = ids.to(self.model.device)
        parallel = strategy.is_parallel and not self.stepwise
        if parallel:
            values = _in_one_pass(self.model, ids, self.prompt_length, strategy)
        else:
            values = _token_by_token(decode_known(self.model, ids, self.prompt_length, strategy, self.caches))
        keys = [self._key(strategy, number) if self.records else "" for number in numbers]
        return [
            SequenceRecord(key, strategy.name, hardware=hardware(), **own)
            for key, own in zip(keys, values, strict=True)
        ]

    def _key(self, strategy: Strategy, number: int) -> str:
        ids = self.rows[number]["input_ids"].tolist()
        decoded = self.stepwise or not strategy.is_parallel  # such a record has costs too
        return record_key(self.weights, strategy.settings, self.prompt_length, decoded, ids)


def _in_one_pass(model: nn.Module, ids: Tensor, prompt_length: int, strategy: Strategy) -> list[dict[str, Any]]:
    """Each sequence's losses, greedy tokens, full and selecting steps, from a parallel pass."""
    simulation = None if strategy.config is None else Simulation(prompt_length, strategy.config)
    trace = Trace()
    logits = _last_logits(model, ids, simulation, ids.shape[1] - prompt_length, trace)
    scored = zip(_losses(logits, ids).tolist(), logits.argmax(-1).tolist(), strict=True)
    values = [{"losses": losses, "full_steps": None, "greedy": greedy} for losses, greedy in scored]
    if simulation is None:
        return values
    if not trace.full_steps:
        raise ValueError("the model took no notice of the simulation: call refreshkv.enable(model) before evaluate()")
    for name, flags in (("full_steps", trace.full_steps), ("selecting_steps", trace.selecting_steps)):
        counts = {layer: own[:, prompt_length:].sum(1).tolist() for layer, own in flags.items()}
        for i, own in enumerate(values):
            own[name] = {layer: steps[i] for layer, steps in counts.items()} if counts else None
    return values


def _token_by_token(decoded: Decoded) -> list[dict[str, Any]]:
    """Each sequence's losses, full steps and costs, from decoding."""
    count = len(decoded.losses)
    return [
        {
            "losses": own,
            "full_steps": decoded.full_steps[i],
            "selecting_steps": decoded.selecting_steps[i],
            "greedy": greedy,
            "prompt_seconds": decoded.prompt_seconds / count,
            "seconds": decoded.seconds / count,
            "cache_bytes": decoded.cache_bytes / count,
            "peak_memory": decoded.peak_memory,
        }
        for i, (own, greedy) in enumerate(zip(decoded.losses.tolist(), decoded.greedy.tolist(), strict=True))
    ]
