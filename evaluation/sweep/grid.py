"""A grid of strategies in a YAML file (configs/grids/selections.yaml): named selections, each under some
strategies and budgets."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from refreshkv.config import RefreshConfig
from refreshkv.evaluation.strategies import Strategy, build_strategy, full_attention
from refreshkv.settings import SettingsError, load_settings, settings_from_dict


@dataclass
class GridPart:
    """Each of its strategies under each of its selections, with each of its budgets."""

    strategies: list[str]
    """As in --strategies, such as select:2:4bit."""
    budgets: list[int | float]
    """Sizes K of the small cache: tokens, or shares of the prompt."""
    selections: list[str] = field(default_factory=list)
    """Names of the grid's selections. Empty for caches that evict, which select by themselves."""


@dataclass
class Grid:
    """The strategies that a sweep measures, full attention besides."""

    selections: dict[str, Any]
    """Name -> settings of `RefreshConfig`; what they leave open is the paper's."""
    parts: list[Any]
    """The parts, `GridPart`; a sweep that is stopped has measured the first ones."""

    def build_strategies(self) -> list[Strategy]:
        """Full attention, then the strategies in order; one that several parts name comes once.

        Raises `SettingsError` for unknown selections and strategies and for impossible settings.
        """
        configs = {
            name: settings_from_dict(RefreshConfig, values or {}, prefix=f"selections.{name}.")
            for name, values in self.selections.items()
        }
        found = {"full": full_attention()}
        for number, values in enumerate(self.parts):
            part = settings_from_dict(GridPart, values, prefix=f"parts[{number}].")
            unknown = [name for name in part.selections if name not in configs]
            if unknown:
                raise SettingsError(
                    f"parts[{number}].selections: there is no {unknown[0]}; known: {', '.join(configs)}"
                )
            for strategy in _part_strategies(part, configs):
                found.setdefault(strategy.name, strategy)
        return list(found.values())


def load_grid(name: str, setting: str = "--grid") -> Grid:
    """The grid of a YAML file, or of a name in configs/grids. setting: names it in errors."""
    return load_settings(Grid, name, folders=("grids",), setting=setting)


def _part_strategies(part: GridPart, configs: dict[str, RefreshConfig]) -> list[Strategy]:
    named = [(f"{name}: ", configs[name]) for name in part.selections] or [("", RefreshConfig())]
    found = []
    for label, config in named:
        for text in part.strategies:
            for budget in part.budgets:
                strategy = build_strategy(text, dataclasses.replace(config, budget=budget))
                found.append(dataclasses.replace(strategy, name=f"{label}{strategy.name}, K={budget}"))
    return found
