"""Presses of kvpress by name: they prune each layer's keys and values at the prompt's end, and decoding goes on from
what is left.

Only presses that score and prune (subclasses of kvpress.ScorerPress without hooks of their own) are taken. kvpress
0.5.5 reads keywords that attention modules of newer transformers do not get, `cache_position` and, since transformers
5.24, `past_key_values`; its hook gets them here. Importing kvpress wraps all attention functions of transformers, so
that happens only when a press is named.

Shapes: one sequence of `P` prompt tokens.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from refreshkv.cache.keyword import as_keyword, given_cache
from refreshkv.config import RefreshConfig
from refreshkv.evaluation.costs import Meter, held_bytes
from refreshkv.evaluation.harness.costs import HarnessCosts
from refreshkv.evaluation.harness.scoring import Scored, Text
from refreshkv.evaluation.strategies import Strategy
from refreshkv.settings import SettingsError

PREFIX = "kvpress:"


class PressStrategy(Strategy):
    """Full attention over the prompt, and what the press leaves of it afterwards."""

    def build_press(self, prompt_length: int) -> Any:
        """A new press of kvpress that leaves int(P * budget) of a prompt's P tokens."""
        ratio = compression_ratio(prompt_length, self.settings["budget"])
        return _press_class(self.settings["press"])(compression_ratio=ratio)


def compression_ratio(prompt_length: int, budget: float) -> float:
    """The ratio r next to 1 - budget with int(P * (1 - r)) = int(P * budget).

    Presses keep int(P * (1 - r)) tokens, which for r = 1 - budget is sometimes one less, or one more, by rounding.
    """
    ratio, kept = 1 - budget, int(prompt_length * budget)
    while (found := int(prompt_length * (1 - ratio))) != kept:
        ratio = math.nextafter(ratio, 0.0 if found < kept else 1.0)
    return ratio


def build_press(text: str, config: RefreshConfig) -> PressStrategy:
    """The strategy that `text` names, such as "kvpress:SnapKVPress"; the budget is the share of tokens that is left."""
    name = text.removeprefix(PREFIX)
    if not isinstance(config.budget, float):
        raise SettingsError(f"budget={config.budget}: a press leaves a share of the prompt: write one, such as 0.125")
    kind = _press_class(name)
    own = {field.name: str(field.default) for field in dataclasses.fields(kind) if field.name != "compression_ratio"}
    settings = {"press": name, "budget": config.budget, **own}
    return PressStrategy(f"kvpress {name}", settings, _new_cache)


def _new_cache(model_config: PretrainedConfig, tokens: int = 0) -> DynamicCache:
    """An empty cache of transformers; it grows, so the number of tokens does not matter."""
    return DynamicCache(config=model_config.get_text_config(decoder=True))


def _press_class(name: str) -> Any:
    try:
        import kvpress  # pyright: ignore[reportMissingImports]  # cannot be a dependency: it pins an older transformers
    except ImportError as error:
        raise SettingsError(
            f"strategy={PREFIX}{name}: kvpress cannot be imported ({error}); its releases ask for transformers below "
            "5.3, so install it without that: pip install --no-deps kvpress 'cachetools<6' fire termcolor"
        ) from None
    kind: Any = getattr(kvpress, name, None)
    scores, prunes = kvpress.ScorerPress, kvpress.BasePress
    known = isinstance(kind, type) and issubclass(kind, scores) and kind is not scores and _takes_a_ratio(kind)
    if not known or kind.forward_hook is not prunes.forward_hook or kind.__call__ is not prunes.__call__:
        raise SettingsError(
            f"strategy={PREFIX}{name}: only presses of kvpress that score tokens and prune them at the prompt's end "
            "are run, such as SnapKVPress, KnormPress or TOVAPress"
        )
    return kind


def _takes_a_ratio(kind: type) -> bool:
    """Whether a press can be made of its compression ratio alone; one that wraps another press cannot."""
    try:
        inspect.signature(kind).bind(compression_ratio=0.5)
    except TypeError:
        return False
    return dataclasses.is_dataclass(kind)


def validate_press(strategy: PressStrategy, model: PreTrainedModel, batch_size: Any) -> None:
    """Raises `SettingsError` where a press would be silently wrong."""
    if str(batch_size) != "1":
        raise SettingsError(f"--batch_size {batch_size}: {strategy.name} scores padding as tokens: write 1")
    if any(type(layer) is not DynamicLayer for layer in _new_cache(model.config).layers):
        raise SettingsError(f"{strategy.name}: the model has layers without full attention, which presses do not prune")


@contextmanager
def pressed(model: PreTrainedModel, press: Any) -> Iterator[None]:
    """Inside the block each pass of the model is pruned by the press; it must be a prompt, from an empty cache."""
    prune = press.forward_hook

    def with_older_names(module: nn.Module, args: tuple, keywords: dict[str, Any], output: Any) -> Any:
        hidden = keywords["hidden_states"]
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        older = {"cache_position": positions, "past_key_values": given_cache(keywords)}
        return prune(module, args, {**keywords, **older}, output)

    press.forward_hook = with_older_names  # of this press alone, which is made for one prompt
    with press(model):
        yield


class PressedSteps:
    """The logits of a prompt's end, and of each token behind it, from a pruned cache."""

    def __init__(self, model: Any, strategy: PressStrategy):
        self.model, self.strategy = model, strategy
        self.cache = _new_cache(model.config)
        self.length = 0

    def prompt(self, ids: Tensor) -> Tensor:
        """ids (1, P) -> logits (1, V) of the token behind them."""
        self.length = ids.shape[1]
        try:
            with pressed(self.model, self.strategy.build_press(self.length)):
                return self.model(ids, **as_keyword(self.cache), logits_to_keep=1).logits[:, -1]
        except AssertionError as error:  # how presses refuse prompts that are too short and models that do not fit
            raise SettingsError(f"strategy={PREFIX}{self.strategy.settings['press']}: {error}") from None

    def step(self, token: Tensor) -> Tensor:
        """token (1, 1) -> logits (1, V) of the next one. Its position is that of the whole text, not the cache's."""
        position = torch.full_like(token, self.length)
        self.length += 1
        return self.model(token, **as_keyword(self.cache), position_ids=position).logits[:, -1]


@torch.no_grad()
def scored_behind_press(model: PreTrainedModel, strategy: PressStrategy, text: Text) -> Scored:
    """Scores one continuation token by token behind a pruned prompt."""
    meter, steps = Meter(model), PressedSteps(model, strategy)
    ids = torch.tensor([text.tokens], device=model.device)
    logits = [steps.prompt(ids[:, : text.prompt_length])]
    for column in range(text.prompt_length, len(text.tokens) - 1):
        logits.append(steps.step(ids[:, column : column + 1]))
    wanted, own = ids[0, text.prompt_length :], torch.cat(logits).float()
    wanted, own = wanted[-text.scored :], own[-text.scored :]
    loss = F.cross_entropy(own, wanted, reduction="sum")
    costs = HarnessCosts(meter.read()[0], len(logits) - 1, cache_bytes=held_bytes(steps.cache), cached_sequences=1)
    return [(-float(loss), bool((own.argmax(-1) == wanted).all()))], costs


def press_loop(strategy: PressStrategy, spent: Callable[[HarnessCosts], None]) -> Callable[..., Tensor]:
    """A `custom_generate` of one sequence, greedily or by sampling. spent: gets what each text cost."""

    def generate(
        model: PreTrainedModel, input_ids: Tensor, *, generation_config: GenerationConfig, **keywords: Any
    ) -> Tensor:
        meter, steps, ids = Meter(model), PressedSteps(model, strategy), input_ids
        logits = steps.prompt(ids)
        while True:
            scores = keywords["logits_processor"](ids, logits.float())
            token = scores.argmax(-1, keepdim=True)
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1)
            ids = torch.cat([ids, token], dim=1)
            if bool(keywords["stopping_criteria"](ids, None).all()):
                break
            logits = steps.step(token)
        count = ids.shape[1] - input_ids.shape[1] - 1
        spent(HarnessCosts(meter.read()[0], count, cache_bytes=held_bytes(steps.cache), cached_sequences=1))
        return ids

    return generate
