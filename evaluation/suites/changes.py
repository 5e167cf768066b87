"""Applies a command line's changes to a suite, and describes how it then differs from the paper."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from refreshkv.data.tasks.registry import settings_by_task, spelled_out
from refreshkv.evaluation.suites.config import Benchmark, Corpus, Suite
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class Changes:
    """Values that replace a suite's; None keeps the suite's value."""

    rows: int | None = None
    last_tokens: int | None = None
    examples: int | None = None
    task_length: int | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    """Corpus -> folder of prepared sequences."""
    without: list[str] = field(default_factory=list)
    """Corpora and benchmarks to leave out, with their columns."""
    refresh: dict[str, Any] = field(default_factory=dict)
    """Settings of `RefreshConfig` for all table lines."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """Task -> settings."""


def change(suite: Suite, changes: Changes) -> tuple[Suite, list[str]]:
    """Returns the changed suite, and one phrase for each difference from the paper.

    Raises `SettingsError` for corpora, benchmarks and tasks that the suite does not have.
    """
    _check_known("--without", changes.without, [*suite.corpora, *suite.benchmarks])
    said = [f"{name} is left out" for name in changes.without]
    parts = {
        kind: {name: item for name, item in getattr(suite, kind).items() if name not in changes.without}
        for kind in ("corpora", "benchmarks")
    }
    _check_known("--corpus", changes.corpora, parts["corpora"])
    wanted = {
        "corpora": {"rows": changes.rows, "last_tokens": changes.last_tokens},
        "benchmarks": {"examples": changes.examples, "length": changes.task_length},
    }
    for kind, values in wanted.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given and not parts[kind]:
            option = "task-length" if "length" in given else next(iter(given)).replace("_", "-")
            raise SettingsError(f"--{option} means nothing here: the suite measures no {kind}")
        for name, item in parts[kind].items():
            data = {"data": changes.corpora[name]} if name in changes.corpora else {}
            parts[kind][name], own = _replaced(item, {**given, **data}, changes.refresh)
            said += [f"{name}: {text}" for text in own]
    said += _change_tasks(parts["benchmarks"], changes.tasks)
    before = suite.config().to_dict()
    said += [
        f"{key} {value} instead of {before[key]}" for key, value in changes.refresh.items() if value != before[key]
    ]
    columns = {
        label: column for label, column in suite.columns.items() if not set(column.sources) & set(changes.without)
    }
    if not any(column.sources for column in columns.values()):
        raise SettingsError("--without leaves nothing to measure")
    return _rebuilt(suite, columns=columns, refresh={**suite.refresh, **changes.refresh}, **parts), said


def _check_known(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise SettingsError(f"{option}: the suite measures no {name}; it has {', '.join(known) or 'none'}")


def _replaced(
    item: Corpus | Benchmark, values: dict[str, Any], refresh: dict[str, Any]
) -> tuple[Corpus | Benchmark, list[str]]:
    """Returns the item with these values, and one phrase for each that differs.

    `refresh` replaces the item's own settings of `RefreshConfig`.
    """
    own = {key: refresh[key] for key in item.refresh if key in refresh}
    pairs = [(key, value, getattr(item, key)) for key, value in values.items()]
    pairs += [(key, value, item.refresh[key]) for key, value in own.items()]
    said = [f"{key} {new} instead of {old}" for key, new, old in pairs if new != old]
    return dataclasses.replace(item, **values, refresh={**item.refresh, **own}), said


def _change_tasks(benchmarks: dict[str, Benchmark], tasks: dict[str, Any]) -> list[str]:
    """Sets task settings in the benchmarks that have these tasks; returns one phrase for each setting."""
    said = []
    known = {name: spelled_out(benchmark.tasks) for name, benchmark in benchmarks.items()}
    given = settings_by_task(tasks, [task for names in known.values() for task in names], "the suite's tasks")
    for name, benchmark in benchmarks.items():
        for task in known[name]:
            values = given.get(task, {})
            if values:
                own = benchmark.settings.get(task, {})
                benchmark.settings = {**benchmark.settings, task: {**own, **values}}
                said += [f"{name}: tasks.{task}.{key}={value}" for key, value in values.items()]
    return said


def _rebuilt(suite: Suite, **parts: Any) -> Suite:
    """A suite with these parts, and the paper's numbers for the columns that are left."""
    values = {item.name: getattr(suite, item.name) for item in dataclasses.fields(Suite)} | parts
    for name in ("corpora", "benchmarks", "rows", "columns"):
        values[name] = {label: dataclasses.asdict(item) for label, item in values[name].items()}
    numbers = {
        model: {line: {c: n for c, n in own.items() if c in values["columns"]} for line, own in lines.items()}
        for model, lines in suite.paper.numbers.items()
    }
    return Suite(**{**values, "paper": dataclasses.replace(suite.paper, numbers=numbers)})
