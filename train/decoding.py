"""Ways to decode, by name: each builds the cache that `model.generate` is given."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Cache, PretrainedConfig

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.config import NEVER
from refreshkv.settings import SettingsError
from refreshkv.train.evaluation import FULL, NEVER_REFRESHED


@dataclass(frozen=True)
class Decoding:
    """One way to decode."""

    name: str
    """For tables."""
    settings: dict[str, Any]
    """Plain values that say all about it."""
    build_cache: Callable[[PretrainedConfig, int], Cache | None]
    """From the model's configuration and the most tokens of a row: a new cache; None for transformers' own."""


Builder = Callable[[RefreshConfig, list[str]], Decoding]
"""From the model's schedule and selection, and the arguments that follow the name after colons."""


def build_decodings(names: list[str], config: RefreshConfig) -> list[Decoding]:
    """One for each of `names`, such as "full", "snapkv", "refresh:10", "similarity:5:0.85".

    What a name leaves open comes from `config`. Raises `SettingsError` for unknown names, wrong arguments, and for the
    same way to decode twice.
    """
    decodings: dict[str, Decoding] = {}
    for text in names:
        name, *arguments = text.split(":")
        if name not in DECODINGS:
            raise SettingsError(f"--strategies: there is no {name!r}; known are {', '.join(DECODINGS)}")
        try:
            decoding = DECODINGS[name](config, arguments)
        except ValueError as error:
            raise SettingsError(f"--strategies: {text}: {error}") from None
        if decoding.name in decodings:
            raise SettingsError(f"--strategies names {decoding.name} twice")
        decodings[decoding.name] = decoding
    return list(decodings.values())


def refreshing(name: str, config: RefreshConfig) -> Decoding:
    """Decoding from a small cache by the schedule and the selection of `config`."""
    return Decoding(name, config.to_dict(), lambda model, tokens: RefreshCache(model, tokens, config))


def _full(config: RefreshConfig, arguments: list[str]) -> Decoding:
    _at_most(arguments, 0, "full")
    return Decoding(FULL, {}, lambda model, tokens: None)


def _snapkv(config: RefreshConfig, arguments: list[str]) -> Decoding:
    _at_most(arguments, 0, "snapkv")
    return refreshing(NEVER_REFRESHED, dataclasses.replace(config, stride=NEVER, threshold=None))


def _fixed(config: RefreshConfig, arguments: list[str]) -> Decoding:
    _at_most(arguments, 1, "refresh:STRIDE")
    stride = int(arguments[0]) if arguments else config.stride
    return refreshing(f"refresh S={stride}", dataclasses.replace(config, stride=stride, threshold=None))


def _similarity(config: RefreshConfig, arguments: list[str]) -> Decoding:
    _at_most(arguments, 2, "similarity:STRIDE:THRESHOLD")
    stride = int(arguments[0]) if arguments else config.stride
    threshold = float(arguments[1]) if len(arguments) > 1 else config.threshold
    if threshold is None:
        raise ValueError("no threshold is set; write similarity:STRIDE:THRESHOLD or add --threshold")
    changed = dataclasses.replace(config, stride=stride, threshold=threshold)
    return refreshing(f"refresh S={stride} threshold {threshold:g}", changed)


def _at_most(arguments: list[str], count: int, usage: str) -> None:
    if len(arguments) > count:
        raise ValueError(f"too many arguments; it is written {usage}")


DECODINGS: dict[str, Builder] = {"full": _full, "snapkv": _snapkv, "refresh": _fixed, "similarity": _similarity}
"""All ways to decode. Another one needs an entry here, and nothing else."""
