"""Continues the prompts of prepared sequences, and scores every generated token under full attention.

Shapes: `B` sequences of a batch, `N` generated tokens, `P` prompt length.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed

from refreshkv import decode_ahead
from refreshkv.cache.keyword import as_keyword
from refreshkv.evaluation.caches import GREEDY
from refreshkv.evaluation.costs import Meter
from refreshkv.evaluation.perplexity.losses import losses_and_likeliest
from refreshkv.evaluation.records import RecordFile, record_key
from refreshkv.evaluation.reports import hardware
from refreshkv.evaluation.strategies import Strategy
from refreshkv.generation.finite import FiniteLogits
from refreshkv.generation.inherited import without_own_settings
from refreshkv.identity import fingerprint
from refreshkv.settings import SettingsError, settings_from_dict

TEXT = "the text itself"
"""Stands for a strategy: the sequence's own continuation, which nobody generated."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen."""

    name: str
    """greedy or sampled."""
    settings: dict[str, Any]
    """Plain values that define it; empty for greedy."""

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate()`, to be called inside `without_own_settings(model)`."""
        if not self.settings:
            return GREEDY
        values = {name: value for name, value in self.settings.items() if name != "seed"}
        return {**GREEDY, **values, "do_sample": True}


GREEDILY = Decoding("greedy", {})


def sampled(temperature: float, top_p: float, seed: int) -> Decoding:
    """Draws each token. All strategies get the same random numbers, so that equal predictions draw equal tokens."""
    return Decoding("sampled", {"temperature": temperature, "top_p": top_p, "top_k": 50, "seed": seed})


@dataclass(frozen=True)
class Continuation:
    """The generated tokens of one sequence, and full attention's judgement: a line of the file."""

    key: str
    """Hash of everything that the other values depend on."""
    strategy: str
    decoding: str
    index: int
    """Number of the sequence among those evaluated."""
    tokens: list[int]
    """(N,): the generated tokens."""
    losses: list[float]
    """(N,): the tokens' losses under full attention, in nats, each after all tokens before it."""
    likeliest: list[bool]
    """(N,): whether the token is full attention's most likely one after the same text."""
    seconds: float | None = None
    """The batch's time for prompts and generation, divided by its sequences; None for the text itself."""
    hardware: str | None = None


class Continuations(RecordFile[Continuation]):
    """The finished sequences of an evaluation, in a file."""

    kind = "an evaluation of long generation"

    def parse(self, values: dict[str, Any]) -> Continuation:
        return settings_from_dict(Continuation, values)


@torch.no_grad()
def continue_sequences(
    model: PreTrainedModel,
    rows: Dataset,
    strategies: list[Strategy],
    decodings: list[Decoding],
    new_tokens: int,
    records: Continuations,
    batch_size: int = 1,
    progress: bool = True,
) -> list[Continuation]:
    """Continues the first P tokens of each sequence by N = `new_tokens`, under each strategy and decoding.

    Texts do not end early: the end-of-text token counts as any other. Sequences that `records` has are not generated
    again. The result begins with the sequences' own continuations (`TEXT`).

    Args:
        model: a transformers decoder after `refreshkv.enable`, in evaluation mode.
        rows: torch-format dataset of sequences, whose `input_ids` all have the same length P + N.
    """
    weights = fingerprint(model)
    ways = [(None, GREEDILY), *((strategy, decoding) for decoding in decodings for strategy in strategies)]
    found: list[Continuation] = []
    with tqdm(total=len(ways) * len(rows), unit=" texts", disable=not progress) as bar:
        for strategy, decoding in ways:
            bar.set_description(TEXT if strategy is None else f"{strategy.name}, {decoding.name}")
            for start in range(0, len(rows), batch_size):
                ids = rows[start : start + batch_size]["input_ids"]
                keys = _keys(weights, ids, strategy, decoding, start, new_tokens)
                if any(records.get(key) is None for key in keys):
                    made = _batch(model, ids, strategy, decoding, start, new_tokens)
                    fresh = zip(keys, made, strict=True)
                    records.add([Continuation(key, **own) for key, own in fresh if records.get(key) is None])
                found += [records[key] for key in keys]
                bar.update(len(ids))
    return found


def _keys(
    weights: str, ids: Tensor, strategy: Strategy | None, decoding: Decoding, start: int, new_tokens: int
) -> list[str]:
    """The keys of a batch's records. What is drawn depends on the whole batch, so its beginning and size count."""
    settings = TEXT if strategy is None else strategy.settings
    drawn = [start, len(ids)] if decoding.settings else []
    kept = ids if strategy is None else ids[:, :-new_tokens]  # the prompt alone is read
    common = (weights, settings, decoding.settings, drawn, new_tokens)
    return [record_key(*common, own.tolist(), number) for number, own in enumerate(kept, start)]


def _batch(
    model: PreTrainedModel, ids: Tensor, strategy: Strategy | None, decoding: Decoding, start: int, new_tokens: int
) -> list[dict[str, Any]]:
    """The fields of each sequence's `Continuation`, all but the key."""
    ids, seconds = ids.to(model.device), None
    if strategy is not None:
        meter = Meter(model)
        ids = _generate(model, ids[:, :-new_tokens], strategy, decoding, start, new_tokens)
        seconds = meter.read()[0] / len(ids)
    losses, likeliest = losses_and_likeliest(model, ids, new_tokens)
    tokens = ids[:, -new_tokens:]
    columns = zip(tokens.tolist(), losses.tolist(), (tokens == likeliest).tolist(), strict=True)
    name = TEXT if strategy is None else strategy.name
    common = {"strategy": name, "decoding": decoding.name, "seconds": seconds, "hardware": hardware()}
    return [
        {**common, "index": start + i, "tokens": own, "losses": lost, "likeliest": chosen}
        for i, (own, lost, chosen) in enumerate(columns)
    ]


def _generate(
    model: PreTrainedModel, prompts: Tensor, strategy: Strategy, decoding: Decoding, start: int, new_tokens: int
) -> Tensor:
    """Prompts (B, P) and what follows them under the strategy: (B, P + N)."""
    cache, finite = strategy.build_cache(model.config, prompts.shape[1] + new_tokens), FiniteLogits("--model")
    if decoding.settings:
        set_seed(decoding.settings["seed"] + start)
    with without_own_settings(model):
        ids = model.generate(  # pyright: ignore[reportCallIssue]  # a mixin of the models' classes
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            **as_keyword(cache),
            custom_generate=decode_ahead,
            logits_processor=[finite],
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            disable_compile=True,  # one shape for a few hundred steps: compiling takes longer
            **decoding.arguments(),
        )
    finite.validate()
    if ids.shape[1] != prompts.shape[1] + new_tokens:
        raise SettingsError(f"{strategy.name}: the model ended the text early: its generation settings say so")
    return ids
