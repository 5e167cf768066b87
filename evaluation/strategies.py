"""Strategies of decoding, by name: full attention, RefreshKV under a schedule, and caches that evict.

A strategy builds the cache that `model.generate` gets.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import Cache, PretrainedConfig

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.baselines.ablation import GROUPS, AblationCache
from refreshkv.baselines.cascading import CascadingCache, CascadingConfig
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.config import NEVER
from refreshkv.ranges import LARGEST_COUNT, Range, show
from refreshkv.settings import SettingsError, settings_to_dict

SCORE_BITS = {"16bit": 16, "8bit": 8, "4bit": 4}
"""How `select:STRIDE:BITS` names the bits of the score keys."""

LATER_SETTINGS = ("select_stride", "score_bits", "pool_ahead", "rectify")
"""Settings of `RefreshConfig` that earlier reports and records do not have: left out where they are the defaults."""

FULL = "full"
NEVER_REFRESHED = "never refreshed"


@dataclass(frozen=True)
class Strategy:
    """A strategy of decoding: a name, its settings, and the cache it needs."""

    name: str
    """Names the strategy in tables."""
    settings: dict[str, Any]
    """Plain values that define the strategy; empty for full attention."""
    build_cache: Callable[[PretrainedConfig, int], Cache]
    """(model configuration, most tokens of a sequence) -> a new cache."""
    config: RefreshConfig | None = None
    """RefreshKV's schedule and selection, which one parallel pass can simulate; None for all other strategies."""

    @property
    def is_full(self) -> bool:
        """Whether it is ordinary full attention."""
        return not self.settings

    @property
    def is_parallel(self) -> bool:
        """Whether one pass over known tokens gives the logits of decoding them one by one."""
        return self.is_full or self.config is not None

    def largest_budget(self, prompt_length: int) -> int | None:
        """The budget K after a prompt without padding; None for full attention."""
        return None if self.is_full else RefreshConfig(budget=self.settings["budget"]).largest_budget(prompt_length)


Number = TypeVar("Number", int, float)

Builder = Callable[[RefreshConfig, list[str]], Strategy]
"""(the model's schedule and selection, the arguments that follow the name after colons) -> the strategy."""


def build_strategies(names: list[str], config: RefreshConfig) -> list[Strategy]:
    """Builds the strategies with these names, such as "full", "snapkv", "refresh:10", "similarity:5:0.85",
    "select:2:4bit".

    `config` gives what a name leaves open. Raises `SettingsError` for unknown names, wrong arguments, and for a
    strategy that is named twice.
    """
    strategies: dict[str, Strategy] = {}
    for text in names:
        strategy = build_strategy(text, config)
        if strategy.name in strategies:
            raise SettingsError(f"--strategies names {strategy.name} twice")
        strategies[strategy.name] = strategy
    return list(strategies.values())


def build_strategy(text: str, config: RefreshConfig) -> Strategy:
    """Builds the strategy that `text` names, such as "refresh:10"; errors as in `build_strategies`."""
    name, *arguments = text.split(":")
    if name not in STRATEGIES:
        raise SettingsError(f"--strategies: there is no {name!r}; known are {', '.join(STRATEGIES)}")
    try:
        return STRATEGIES[name](config, arguments)
    except ValueError as error:
        raise SettingsError(f"--strategies: {text}: {error}") from None


def default_strategies(config: RefreshConfig, strides: list[int]) -> list[Strategy]:
    """Full attention, a refresh every S steps for each S of `strides`, and a selection that is never refreshed.

    If `config` has a threshold, its similarity schedule too; if it has selecting steps, its own pattern. All select as
    `config` says.
    """
    strategies = [full_attention()]
    for stride in dict.fromkeys(strides):
        strategies.append(_scheduled(config, stride, None))
    if config.threshold is not None and config.stride != NEVER:
        strategies.append(_scheduled(config, config.stride, config.threshold))
    if config.select_stride is not None:
        strategies.append(selecting(config, config.select_stride, config.score_bits, keep_schedule=True))
    return [*strategies, never_refreshed(config)]


def full_attention() -> Strategy:
    """Every step attends to all tokens, with the same kernels and the same loop as the other strategies."""
    return Strategy(FULL, {}, FullCache)


def refreshing(name: str, config: RefreshConfig) -> Strategy:
    """RefreshKV with the schedule and the selection of `config`."""
    # a stride of NEVER stays a number here: reports and records of earlier versions have it so, and are compared
    settings, usual = settings_to_dict(config), settings_to_dict(RefreshConfig())
    settings = {key: value for key, value in settings.items() if key not in LATER_SETTINGS or value != usual[key]}
    return Strategy(name, settings, lambda model, tokens: RefreshCache(model, tokens, config), config)


def never_refreshed(config: RefreshConfig) -> Strategy:
    """Decoding from the tokens that `config` selects after the prompt."""
    return refreshing(NEVER_REFRESHED, _without_selecting(config, NEVER, None))


def selecting(config: RefreshConfig, select_stride: int, score_bits: int, keep_schedule: bool = False) -> Strategy:
    """A selecting step every `select_stride` steps, by keys of `score_bits` bits.

    No step after the prompt is full, unless `keep_schedule` keeps the full steps of `config`.
    """
    schedule = {} if keep_schedule else {"stride": NEVER, "threshold": None}
    changed = dataclasses.replace(config, select_stride=select_stride, score_bits=score_bits, **schedule)
    name = f"select S={select_stride}" + ("" if score_bits == 16 else f" {score_bits} bits")
    if changed.stride != NEVER:
        name += f" refresh S={changed.stride}"
    if changed.threshold is not None:
        name += f" threshold {changed.threshold:g}"
    return refreshing(name, changed)


def _scheduled(config: RefreshConfig, stride: int, threshold: float | None) -> Strategy:
    """Full steps by the schedule, and no selecting steps."""
    name = f"refresh S={stride}" + ("" if threshold is None else f" threshold {threshold:g}")
    return refreshing(name, _without_selecting(config, stride, threshold))


def _without_selecting(config: RefreshConfig, stride: int, threshold: float | None) -> RefreshConfig:
    return dataclasses.replace(config, stride=stride, threshold=threshold, select_stride=None, score_bits=16)


def _full(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 0, "full")
    return full_attention()


def _never(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 0, "never")
    return never_refreshed(config)


def _fixed(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 1, "refresh:STRIDE")
    stride = _number(int, "STRIDE", arguments[0]) if arguments else config.stride
    return _scheduled(config, stride, None)


def _similarity(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 2, "similarity:STRIDE:THRESHOLD")
    stride = _number(int, "STRIDE", arguments[0]) if arguments else config.stride
    threshold = _number(float, "THRESHOLD", arguments[1]) if len(arguments) > 1 else config.threshold
    if threshold is None:
        raise ValueError("no threshold is set; write similarity:STRIDE:THRESHOLD or add --threshold")
    return _scheduled(config, stride, threshold)


def _select(config: RefreshConfig, arguments: list[str]) -> Strategy:
    usage = "select:STRIDE:BITS, such as select:2:4bit"
    _at_most(arguments, 2, usage)
    stride = _number(int, "STRIDE", arguments[0]) if arguments else config.select_stride
    if stride is None:
        raise ValueError(f"no select_stride is set; write {usage}")
    bits = arguments[1] if len(arguments) > 1 else "16bit" if arguments else f"{config.score_bits}bit"
    if bits not in SCORE_BITS:
        raise ValueError(f"BITS must be one of {', '.join(SCORE_BITS)}, got {bits!r}")
    return selecting(config, stride, SCORE_BITS[bits])


def _streaming(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 1, "streaming:SINK_TOKENS")
    sinks = _number(int, "SINK_TOKENS", arguments[0]) if arguments else 4
    if sinks < 0:
        raise ValueError(f"sink tokens must be at least 0, got {sinks}")
    if isinstance(config.budget, int) and config.budget <= sinks:
        raise ValueError(f"budget={config.budget} leaves no room beside {sinks} sink tokens: make it larger")
    name = "StreamingLLM" + (f" with {sinks} sinks" if arguments else "")
    return _baseline(name, StreamingCache, budget=config.budget, sink_tokens=sinks)


def _cascading(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 2, "cascading:PARTS:ACCEPTANCE, such as cascading:4:score")
    parts = _number(int, "PARTS", arguments[0]) if arguments else 4
    acceptance = arguments[1] if len(arguments) > 1 else "count"
    if acceptance not in ("count", "score"):
        raise ValueError(f"ACCEPTANCE must be count or score, got {acceptance}")
    settings = {"budget": config.budget, "parts": parts, "by_score": acceptance == "score"}
    CascadingConfig(**settings)  # refuses what it cannot
    name = f"cascading N={parts}" + (" by score" if settings["by_score"] else "")
    return _baseline(name, CascadingCache, **settings)


def _h2o(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 0, "h2o")
    return _baseline("H2O", H2OCache, budget=config.budget)


def _snapkv(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 3, "snapkv:WINDOW:KERNEL:POOLING, such as snapkv:64:5:average")
    window, kernel, pooling = [*arguments, *("1", "7", "max")[len(arguments) :]]
    window, kernel = _number(int, "WINDOW", window), _number(int, "KERNEL", kernel)
    RefreshConfig(observation_window=window, pool_kernel=kernel)  # refuses what it cannot
    if pooling not in ("max", "average"):
        raise ValueError(f"pooling must be max or average, got {pooling}")
    name = "SnapKV" + (f" window {window} kernel {kernel} {pooling}" if arguments else "")
    options = {"observation_window": window, "kernel": kernel, "pooling": pooling}
    return _baseline(name, SnapKVCache, budget=config.budget, **options)


def _grouped(config: RefreshConfig, arguments: list[str]) -> Strategy:
    usage = "grouped:GROUP:STRIDE, such as grouped:mean:10"
    _at_most(arguments, 2, usage)
    group = arguments[0] if arguments else None
    if group not in GROUPS:
        raise ValueError(f"GROUP must be one of {', '.join(GROUPS)}; it is written {usage}")
    return _ablation(f"group's {group}", config, arguments[1:], group=group)


def _without_refresh(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 1, "without-refresh:STRIDE")
    return _ablation("full steps without a refresh", config, arguments, selects=False)


def _without_full_attention(config: RefreshConfig, arguments: list[str]) -> Strategy:
    _at_most(arguments, 1, "without-full-attention:STRIDE")
    return _ablation("refreshes without a full step", config, arguments, attends=False)


def _ablation(name: str, config: RefreshConfig, arguments: list[str], **changed: Any) -> Strategy:
    """RefreshKV with a fixed schedule and the paper's selection, and one part changed."""
    stride = _number(int, "STRIDE", arguments[0]) if arguments else config.stride
    return _baseline(f"{name} S={stride}", AblationCache, budget=config.budget, stride=stride, **changed)


def _baseline(name: str, kind: Callable[..., Cache], **settings: Any) -> Strategy:
    """A strategy of a baseline's cache, which takes the settings as keywords."""
    return Strategy(name, {"cache": kind.__name__, **settings}, lambda model, tokens: kind(model, tokens, **settings))


def _number(kind: type[Number], name: str, text: str) -> Number:
    try:
        number = kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {wanted}, got {show(text)}") from None
    if problem := Range(-LARGEST_COUNT).problem(number):
        raise ValueError(f"{name} {problem}, got {show(text)}")
    return number


def _at_most(arguments: list[str], count: int, usage: str) -> None:
    if len(arguments) > count:
        raise ValueError(f"too many arguments; it is written {usage}")


STRATEGIES: dict[str, Builder] = {
    "full": _full,
    "refresh": _fixed,
    "similarity": _similarity,
    "never": _never,
    "select": _select,
    "streaming": _streaming,
    "cascading": _cascading,
    "h2o": _h2o,
    "snapkv": _snapkv,
    "grouped": _grouped,
    "without-refresh": _without_refresh,
    "without-full-attention": _without_full_attention,
}
"""All strategies. A new one needs an entry here, and nothing else."""
