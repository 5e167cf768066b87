"""Losses of rows under one way to decode: in one parallel pass where there is one, else token by token.

Shapes: `B` rows of a batch, `T` tokens in a row, `N` last tokens that are scored, `P = T - N` prompt length.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from refreshkv.config import Simulation, Trace
from refreshkv.evaluation.caches import Caches
from refreshkv.evaluation.records import RecordFile, numbered_layers
from refreshkv.evaluation.stepwise import Decoded, decode_known
from refreshkv.evaluation.strategies import Decoding
from refreshkv.identity import fingerprint

LOGITS_AT_ONCE = 1 << 26
"""Logits that are held in float32 at the same time: 256 MiB."""


@dataclass(frozen=True)
class RowRecord:
    """What one strategy gave on one row."""

    key: str
    """Hash of everything that it depends on; empty if it is not kept in a file."""
    strategy: str
    losses: list[float]
    """(N,): next-token losses of the scored tokens, in nats."""
    full_steps: dict[int, int] | None
    """Refreshed layer -> full steps among the N decoding steps; None if nothing is refreshed."""
    prompt_seconds: float | None = None
    """The batch's time for the prompt over its rows; None if nothing was decoded token by token, and so below."""
    seconds: float | None = None
    """The batch's time for the N decoding steps, over its rows."""
    cache_bytes: float | None = None
    """What the batch's cache held at the end, over its rows."""
    peak_memory: int | None = None
    """Most bytes that the GPU held during the batch, weights included; None on a CPU."""


class RowRecords(RecordFile[RowRecord]):
    """The finished rows."""

    kind = "an evaluation of rows"

    def parse(self, values: dict[str, Any]) -> RowRecord:
        return RowRecord(**{**values, "full_steps": numbered_layers(values["full_steps"])})


def row_losses(
    model: nn.Module,
    ids: Tensor,
    simulation: Simulation | None = None,
    last: int | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Next-token losses of ids (B, T) in nats: (B, n) float32 of the last `n = last` tokens, of all T - 1 if None.

    None for `simulation` is full attention; `trace` receives its full steps. Only the last n positions' logits are
    computed, in the model's own dtype, and few of them are held in float32 at a time.
    """
    count = ids.shape[1] - 1 if last is None else last
    extra = {} if simulation is None else {"simulation": simulation, "trace": trace}
    logits = model(ids, use_cache=False, logits_to_keep=count + 1, **extra).logits[:, :-1]
    chunk = max(1, LOGITS_AT_ONCE // (logits.shape[0] * logits.shape[2]))
    parts = zip(logits.split(chunk, dim=1), ids[:, -count:].split(chunk, dim=1), strict=True)
    return torch.cat(
        [F.cross_entropy(part.float().transpose(1, 2), targets, reduction="none") for part, targets in parts], dim=1
    )


class RowMeasurement:
    """The same rows of one model, under one strategy after the other."""

    def __init__(
        self,
        model: nn.Module,
        rows: Dataset,
        prompt_length: int,
        batch_size: int,
        stepwise: bool,
        records: RowRecords | None,
    ) -> None:
        """As in `refreshkv.evaluation.perplexity.evaluate`."""
        self.model, self.rows, self.prompt_length, self.batch_size = model, rows, prompt_length, batch_size
        self.stepwise, self.records = stepwise, records
        self.weights = "" if records is None else fingerprint(model)
        self.caches = Caches(model)

    def records_of(self, strategy: Decoding, numbers: list[int], bar: tqdm) -> list[RowRecord]:
        """What `strategy` gives on the rows of these `numbers`, in their order; known ones are not computed again."""
        bar.set_description(strategy.name)
        found, missing = {}, []
        for number in numbers:
            known = self.records and self.records.get(self._key(strategy, number))
            if known:
                found[number] = known
            else:
                missing.append(number)
        bar.update(len(found))
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            found |= dict(zip(batch, self._batch(strategy, batch), strict=True))
            bar.update(len(batch))
        return [found[number] for number in numbers]

    def _batch(self, strategy: Decoding, numbers: list[int]) -> list[RowRecord]:
        ids = self.rows[numbers]["input_ids"].to(self.model.device)
        parallel = strategy.is_parallel and not self.stepwise
        if parallel:
            values = _in_one_pass(self.model, ids, self.prompt_length, strategy)
        else:
            values = _one_by_one(decode_known(self.model, ids, self.prompt_length, strategy, self.caches))
        keys = [self._key(strategy, number) if self.records else "" for number in numbers]
        made = [RowRecord(key, strategy.name, **own) for key, own in zip(keys, values, strict=True)]
        if self.records:
            self.records.add(made)
        return made

    def _key(self, strategy: Decoding, number: int) -> str:
        ids = self.rows[number]["input_ids"].tolist()
        # a row that was decoded one by one tells more than one that was not
        one_by_one = self.stepwise or not strategy.is_parallel
        parts = [self.weights, strategy.settings, self.prompt_length, one_by_one, ids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _in_one_pass(model: nn.Module, ids: Tensor, prompt_length: int, strategy: Decoding) -> list[dict[str, Any]]:
    """Each row's losses and full steps, from a simulation."""
    simulation = None if strategy.is_full else Simulation(prompt_length, strategy.config)
    trace = Trace()
    losses = row_losses(model, ids, simulation, last=ids.shape[1] - prompt_length, trace=trace).tolist()
    if simulation is None:
        return [{"losses": own, "full_steps": None} for own in losses]
    if not trace.full_steps:
        raise ValueError("the model took no notice of the simulation: call refreshkv.enable(model) before evaluate()")
    counts = {layer: flags[:, prompt_length:].sum(1).tolist() for layer, flags in trace.full_steps.items()}
    return [
        {"losses": own, "full_steps": {layer: rows[i] for layer, rows in counts.items()}}
        for i, own in enumerate(losses)
    ]


def _one_by_one(decoded: Decoded) -> list[dict[str, Any]]:
    """Each row's losses, full steps and costs, from decoding."""
    counts, rows = decoded.full_steps, len(decoded.losses)
    return [
        {
            "losses": own,
            "full_steps": None if counts is None else {layer: steps[i] for layer, steps in counts.items()},
            "prompt_seconds": decoded.prompt_seconds / rows,
            "seconds": decoded.seconds / rows,
            "cache_bytes": decoded.cache_bytes / rows,
            "peak_memory": decoded.peak_memory,
        }
        for i, own in enumerate(decoded.losses.tolist())
    ]
