"""A suite: one table or figure of a paper as data (configs/suites/*.yaml).

It says what is measured under which strategies, how the table is laid out, and which numbers the paper has.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from refreshkv import RefreshConfig
from refreshkv.evaluation.strategies import Strategy, build_strategy
from refreshkv.ranges import COUNT, validate_numbers
from refreshkv.settings import SettingsError, find_config, read_yaml, settings_from_dict


@dataclass
class Corpus:
    """Prepared sequences whose last tokens are scored."""

    data: str
    """Folder that launch/prepare.py wrote."""
    prepare: str
    """The command that makes the folder; shown if it is missing."""
    row_length: int
    """Tokens of a sequence in the paper. Other lengths are accepted, and the report says so."""
    rows: int = 100
    last_tokens: int = 256
    """Tokens that are scored."""
    decoded_tokens: int | None = None
    """Tokens that are decoded, the scored ones last; None to score all that are decoded."""
    split: Literal["train", "validation", "test"] = "test"
    refresh: dict[str, Any] = field(default_factory=dict)
    """Settings of `RefreshConfig` for this one only."""

    def __post_init__(self) -> None:
        validate_numbers(self, {"row_length": COUNT, "rows": COUNT, "last_tokens": COUNT})


@dataclass
class Benchmark:
    """Tasks whose answers are generated; the score is the mean over them."""

    tasks: list[str]
    """Names, or groups such as ruler."""
    length: int
    """Tokens of prompt and answer together."""
    examples: int = 100
    """Examples of each task."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Task -> further settings."""
    refresh: dict[str, Any] = field(default_factory=dict)
    """Settings of `RefreshConfig` for this one only."""

    def __post_init__(self) -> None:
        validate_numbers(self, {"length": COUNT, "examples": COUNT})


@dataclass
class Line:
    """A line of the table: one strategy."""

    strategy: str | None
    """As in --strategies, such as similarity:10. None if this project cannot run it: the paper's numbers only."""
    refresh: dict[str, Any] = field(default_factory=dict)
    """Settings of `RefreshConfig` for this line."""
    model: str | None = None
    """One of the suite's models, if lines are of different models."""
    why: str | None = None
    """Why there is no strategy."""


@dataclass
class Column:
    """A column of the table: one figure of one corpus or benchmark."""

    of: str | list[str] | None
    """Name of a corpus or benchmark; of several benchmarks for the mean of their scores; None if this project measures
    nothing of it: the paper's numbers only."""
    value: Literal["perplexity", "score", "effective stride", "seconds", "cache MiB"]
    model: str | None = None
    """One of the suite's models, if columns are of different models."""

    @property
    def sources(self) -> list[str]:
        """The corpora and benchmarks that the column's figures come from."""
        return [] if self.of is None else [self.of] if isinstance(self.of, str) else self.of


@dataclass
class Paper:
    """The paper's numbers for the same lines and columns."""

    source: str
    """Where the numbers come from."""
    numbers: dict[str, Any]
    """The paper's model -> line -> column -> number; null where it is not known offline, left out where the paper has
    none."""


@dataclass
class Suite:
    """One table or figure."""

    title: str
    about: str
    """What the table shows, and how it is measured."""
    reading: str
    """What is certain about it, and what is this project's reading of the paper."""
    paper: Paper
    rows: dict[str, Any]
    """Label -> `Line`: the table's lines, from top to bottom."""
    columns: dict[str, Any]
    """Label -> `Column`."""
    corpora: dict[str, Any] = field(default_factory=dict)
    """Name -> `Corpus`."""
    benchmarks: dict[str, Any] = field(default_factory=dict)
    """Name -> `Benchmark`."""
    refresh: dict[str, Any] = field(default_factory=dict)
    """Settings of `RefreshConfig` for all lines; other settings are the paper's, not those saved with the model."""
    models: dict[str, str] = field(default_factory=dict)
    """Name -> description of each model that the table compares. Empty: one table for each --model."""
    layout: Literal["table", "ratios", "strides"] = "table"
    """ratios adds a figure of perplexity against position, strides one of effective stride against layer."""

    def __post_init__(self) -> None:
        for name, kind in (("corpora", Corpus), ("benchmarks", Benchmark), ("rows", Line), ("columns", Column)):
            values = getattr(self, name)
            converted = {key: settings_from_dict(kind, value, f"{name}.{key}.") for key, value in values.items()}
            setattr(self, name, converted)
        self._check_names()
        self._check_numbers()
        for of in {**self.corpora, **self.benchmarks}:
            for model in self.models or [""]:
                self.strategies(of, model)  # refuses what it cannot build

    def _check_names(self) -> None:
        both = set(self.corpora) & set(self.benchmarks)
        if both:
            raise SettingsError(f"{min(both)} is among the corpora and the benchmarks: rename one")
        if not self.rows or not self.columns or not self.paper.numbers:
            raise SettingsError("rows, columns and paper.numbers must not be empty")
        for label, column in self.columns.items():
            for of in column.sources:
                if of not in {**self.corpora, **self.benchmarks}:
                    raise SettingsError(f"columns.{label}.of: there is no corpus or benchmark {of}")
                if (column.value == "score") != (of in self.benchmarks) and column.value in ("score", "perplexity"):
                    raise SettingsError(f"columns.{label}.value: {of} has no {column.value}")
            if len(column.sources) > 1 and column.value != "score":
                raise SettingsError(f"columns.{label}.of: only scores have a mean, not {column.value}: name one")
        for kind, items in (("rows", self.rows), ("columns", self.columns)):
            for label, item in items.items():
                if item.model is not None and item.model not in self.models:
                    raise SettingsError(f"{kind}.{label}.model: {item.model} is not among the models")
        by_rows, by_columns = (all(item.model for item in items.values()) for items in (self.rows, self.columns))
        if self.models and by_rows == by_columns:
            raise SettingsError("models: either all rows or all columns must say which model they are of")

    def _check_numbers(self) -> None:
        for model, lines in self.paper.numbers.items():
            if not isinstance(lines, dict):
                raise SettingsError(f"paper.numbers.{model} must be a section with a line for each row, got {lines!r}")
            for line, numbers in lines.items():
                if line not in self.rows:
                    raise SettingsError(f"paper.numbers.{model}: there is no row {line}")
                if not isinstance(numbers, dict):
                    raise SettingsError(
                        f"paper.numbers.{model}.{line} must be a section with a number for each column, got {numbers!r}"
                    )
                for column, number in numbers.items():
                    if column not in self.columns:
                        raise SettingsError(f"paper.numbers.{model}.{line}: there is no column {column}")
                    if number is not None and not isinstance(number, (int, float)):
                        raise SettingsError(f"paper.numbers.{model}.{line}.{column} must be a number or null")

    def config(self, *changes: dict[str, Any]) -> RefreshConfig:
        """The paper's defaults, overridden by the suite's settings and then by `changes`."""
        values = {**RefreshConfig().to_dict(), **self.refresh}
        for change in changes:
            values |= change
        return settings_from_dict(RefreshConfig, values, "refresh.")

    def shows_costs(self, of: str) -> bool:
        """Whether a column of this corpus or benchmark shows times or memory, which only decoding gives."""
        return any(
            of in column.sources and column.value in ("seconds", "cache MiB") for column in self.columns.values()
        )

    def strategies(self, of: str, model: str) -> list[Strategy]:
        """The strategies for one corpus or benchmark with one model, named after their table lines."""
        own = {**self.corpora, **self.benchmarks}[of].refresh
        if not any(of in column.sources and column.model in (None, model) for column in self.columns.values()):
            return []
        return [
            dataclasses.replace(build_strategy(line.strategy, self.config(own, line.refresh)), name=label)
            for label, line in self.rows.items()
            if line.strategy is not None and line.model in (None, model)
        ]


def load_suite(name: str) -> tuple[Suite, Path]:
    """Loads the suite `name` of configs/suites, or any YAML file; returns it and the file's path.

    Raises `SettingsError` for an unknown name, and for a file that is not a suite.
    """
    path = find_config(name, ("suites",), "--suite")
    values = read_yaml(path, "--suite")
    try:
        return settings_from_dict(Suite, values, ""), path
    except SettingsError as error:
        raise SettingsError(f"--suite {path}: {error}") from None


def named_models(suite: Suite, given: list[str]) -> dict[str, str]:
    """Name -> folder or Hub id, from --model MODEL or --model NAME=MODEL.

    Raises `SettingsError` if a compared model is missing, or if a name comes twice.
    """
    models: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not path or Path(text).exists():
            name, path = Path(text).name, text
        if name in models:
            raise SettingsError(f"--model: {name} comes twice; write NAME={path}")
        models[name] = path
    if suite.models and set(models) != set(suite.models):
        wanted = " ".join(f"--model {name}=... ({what})" for name, what in suite.models.items())
        raise SettingsError(f"--model: this table compares models; give {wanted}")
    return models
