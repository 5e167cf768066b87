"""The model `refreshkv` of the lm-evaluation-harness: its own `hf` model, decoding under one of our strategies.

Everything but the model's passes is the harness': tokens, batches, stop sequences, chat templates, results. Under
`strategy=full` the passes are its own too, and so are the scores.
"""

import json
import math
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models import huggingface
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from refreshkv import decode_ahead, enable
from refreshkv.cache.keyword import as_keyword
from refreshkv.config import RefreshConfig
from refreshkv.evaluation.caches import Caches
from refreshkv.evaluation.costs import Meter
from refreshkv.evaluation.harness.costs import HarnessCosts, costs_of_decoding
from refreshkv.evaluation.harness.presses import (
    PREFIX,
    PressStrategy,
    build_press,
    press_loop,
    scored_behind_press,
    validate_press,
)
from refreshkv.evaluation.harness.scoring import Answer, Scored, Text, decoded, simulated
from refreshkv.evaluation.strategies import Strategy, build_strategy, refreshing
from refreshkv.evaluation.tasks.scores import CAPACITY_STEP
from refreshkv.loading import Origin, load_configuration, own_config, validate_finite, validate_whole
from refreshkv.options import changed_config
from refreshkv.settings import SettingsError

HFLM: Any = huggingface.HFLM  # type checkers lose the class in the harness' decorator
OWN = "the model's own"
"""Name of the strategy that the model has saved."""


@register_model("refreshkv")
class RefreshLM(HFLM):
    """A transformers decoder whose answers are generated and scored under one strategy.

    Args:
        pretrained: folder or Hub id, as for `--model hf`.
        strategy: as in `refreshkv evaluate --strategies`, such as select:2:4bit, or a press, such as
            kvpress:SnapKVPress; None: the schedule and selection that the model has saved, or the paper's.
        budget: K, tokens of the small cache, or a share of the prompt.
        rolling_prompt: tokens of each window of a rolling perplexity that are the prompt, with full attention. The
            harness' own windows have a context of one token.
        prompt_attention: transformers' attention for prompts.
        settings: refresh=PRESET and refresh.KEY=VALUE; all others are those of `--model hf`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        strategy: str | None = None,
        budget: int | float | None = None,
        rolling_prompt: int | None = None,
        prompt_attention: str = "sdpa",
        **settings: Any,
    ) -> None:
        own = {key: value for key, value in settings.items() if key == "refresh" or key.startswith("refresh.")}
        theirs = {key: settings[key] for key in settings.keys() - own.keys()}
        _validate_pretrained(pretrained, theirs)
        try:
            super().__init__(pretrained=pretrained, **theirs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise SettingsError(f"--model_args: {error}: leave it out") from error
        validate_finite(self.model, f"pretrained: {self.model.name_or_path}")
        overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in own.items()]
        flags = {"budget": None if budget is None else str(budget)}
        self.strategy = _strategy(strategy, changed_config(own_config(self.model.config), overrides, **flags))
        self.rolling_prompt = _whole_or_none("rolling_prompt", rolling_prompt)
        self._least_prompt = 1
        self.costs, self._new_costs = HarnessCosts(), HarnessCosts()
        self._caches = Caches(self.model, record=False)  # prompts differ in length, so few caches are used again
        if isinstance(self.strategy, PressStrategy):
            validate_press(self.strategy, self.model, self.batch_size)
        elif not self.strategy.is_full:
            _validate_batch_size(self.batch_size)
            enable(self.model, self.strategy.config or RefreshConfig(), prompt_attention)
            self.model.generation_config.cache_implementation = None  # the strategy's cache takes its place
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:  # the harness divides examples over processes on GPUs only
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _create_model(self, pretrained: str, *arguments: Any, **settings: Any) -> None:
        loader = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _WholeModels(loader)
        try:
            super()._create_model(pretrained, *arguments, **settings)
        finally:
            self.AUTO_MODEL_CLASS = loader

    # ---- what the harness calls

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        answers = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._gather_costs()
        return answers

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[Answer]:
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._gather_costs()
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        self._validate_rolling()
        self._least_prompt = self.rolling_prompt or 1
        try:
            answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._least_prompt = 1
        self._gather_costs()
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """The metadata of `hf`, and under "refreshkv" the strategy, its settings and what it cost."""
        own = {"strategy": self.strategy.name, "settings": self.strategy.settings, **self.costs.to_dict()}
        return {**super().get_model_info(), "refreshkv": own}

    # ---- the model's passes

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        sequences, columns = context.shape
        if not self.strategy.is_full and settings.get("num_beams", 1) != 1:
            raise SettingsError(f"num_beams={settings['num_beams']}: a small cache decodes greedily or by sampling")
        if isinstance(self.strategy, PressStrategy):
            loop = press_loop(self.strategy, self._new_costs.add)
            return super()._model_generate(context, max_length, stop, custom_generate=loop, **settings)
        if self.strategy.is_full:
            loop, cache = {}, DynamicCache(config=self.model.config.get_text_config(decoder=True))
        else:
            loop = {"custom_generate": decode_ahead}
            cache = self._caches.take(self.strategy, sequences, columns, _rounded(max_length))
        meter = Meter(self.model)
        output = super()._model_generate(context, max_length, stop, **as_keyword(cache), **loop, **settings)
        self._new_costs.add(costs_of_decoding(cache, sequences, columns, meter.read()[0]))
        return output

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self.strategy.is_full:
            meter = Meter(self.model)
            answers = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
            self._new_costs.add(HarnessCosts(meter.read()[0]))
            return answers
        texts = [Text.of(list(context), list(end), self.max_length, self._least_prompt) for _, context, end in requests]
        longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
        size = int(self.batch_size) if self.strategy.config is not None else 1
        found: dict[int, Answer] = {}
        for start in range(0, len(texts), size):
            numbers = longest_first[start : start + size]
            answers, costs = self._score([texts[i] for i in numbers])
            self._new_costs.add(costs)
            for number, answer in zip(numbers, answers, strict=True):
                found[number], asked = answer, requests[number][0]
                if asked is not None:  # a window of a rolling perplexity is no request of its own
                    self.cache_hook.add_partial("loglikelihood", asked, answer)
        return [found[number] for number in range(len(texts))]

    def _score(self, texts: list[Text]) -> Scored:
        if self.strategy.config is not None:
            return simulated(self.model, self.strategy.config, texts, self.softmax_dtype)
        if isinstance(self.strategy, PressStrategy):
            return scored_behind_press(self.model, self.strategy, texts[0])
        return decoded(self.model, self.strategy, texts[0], self._caches, _rounded)

    # ---- checks and costs

    def _validate_rolling(self) -> None:
        config = self.strategy.config
        if self.strategy.is_full:
            return
        if config is None:
            raise SettingsError(
                f"strategy={self.strategy.name}: a rolling perplexity needs one pass over a window, which caches that "
                "evict do not have: use refreshkv evaluate --data"
            )
        if isinstance(config.budget, float) and self.rolling_prompt is None:
            raise SettingsError(
                f"budget={config.budget} is a share of the prompt, which is one token in a rolling perplexity: write a "
                "number of tokens, or rolling_prompt=TOKENS"
            )

    def _gather_costs(self) -> None:
        """Adds what all processes have spent since the last call, in the first process."""
        for costs in self.gather_object(self._new_costs) or ():
            self.costs.add(costs)
        self._new_costs = HarnessCosts()


class _WholeModels:
    """In the place of transformers' class for models: refuses those without some of their weights."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def from_pretrained(self, name: str, **settings: Any) -> PreTrainedModel:
        model, loading = self.loader.from_pretrained(name, output_loading_info=True, **settings)
        validate_whole(loading, f"pretrained: {name}")
        return model


def _validate_pretrained(pretrained: str | PreTrainedModel | None, settings: dict[str, Any]) -> None:
    """Raises `SettingsError` if no model is named, or if the folder or repository holds none."""
    if pretrained is None:
        raise SettingsError("--model_args: pretrained is missing: name a model's folder or Hub id")
    if isinstance(pretrained, str) and not {"gguf_file", "subfolder"} & settings.keys():
        origin = Origin(settings.get("revision"), bool(settings.get("trust_remote_code", False)))
        load_configuration(pretrained, "pretrained", origin)


def _strategy(name: str | None, config: RefreshConfig) -> Strategy:
    if name is None:
        return refreshing(OWN, config)
    if name.startswith(PREFIX):
        return build_press(name, config)
    try:
        return build_strategy(name, config)
    except SettingsError as error:
        raise SettingsError(str(error).replace("--strategies", "strategy")) from None


def _validate_batch_size(size: Any) -> None:
    if not str(size).isdecimal():
        raise SettingsError(f"--batch_size {size} is found by full attention's passes: write a number")


def _whole_or_none(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SettingsError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def _rounded(tokens: int) -> int:
    """The capacity of a cache for this many tokens: other sizes would be compiled anew."""
    return math.ceil(tokens / CAPACITY_STEP) * CAPACITY_STEP
