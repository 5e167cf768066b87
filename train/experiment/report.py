"""Tables of an experiment: perplexity and the gap that each arm closes, and scores of tasks."""

from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from refreshkv.evaluation.reports import drawn
from refreshkv.files import write_bytes, write_text
from refreshkv.tables import markdown_table
from refreshkv.train.experiment.comparison import (
    FULL,
    Entries,
    arm_selections,
    finished_seeds,
    gaps_closed,
    perplexities,
    refreshing_strategies,
)
from refreshkv.train.experiment.config import PLAIN, ExperimentConfig
from refreshkv.train.experiment.gains import gain_table
from refreshkv.train.experiment.tradeoffs import tradeoff_tables


def write_tables(config: ExperimentConfig, entries: Entries) -> str:
    """Writes tables.md and, if matplotlib is installed, PNGs into the folder of results; returns the tables."""
    folder, parts = Path(config.results), []
    folder.mkdir(parents=True, exist_ok=True)
    for study in config.studies:
        for kind, table in (("perplexity", perplexity_table), ("tasks", task_table)):
            lines = table(config, study, entries)
            if len(lines) < 2:
                continue
            image = f"{study}-{kind}.png"
            figure = drawn(image, partial(_draw, config, study, kind, entries, lines))
            part = f"## {study}: {kind}\n\n{markdown_table(lines, text_columns=2)}\n"
            if figure is not None:
                write_bytes(folder / image, figure)
                part += f"\n![{study}]({image})\n"
            parts.append(part)
        parts += _tradeoffs(config, study, entries, folder)
    text = "\n".join(parts)
    if entries:  # tables without figures would look like somebody else's
        write_text(folder / "tables.md", text)
    return text


def _tradeoffs(config: ExperimentConfig, study: str, entries: Entries, folder: Path) -> list[str]:
    """The tables of a study's grid, one for each text, and the figure."""
    tables = tradeoff_tables(config, study, entries)
    parts = [f"## {study}: {text}\n\n{markdown_table(lines)}\n" for text, lines in tables.items()]
    if tables:
        parts.append(
            "Perplexity over full attention's of the same model, less one; in brackets the gap (perplexity less full "
            "attention's) as a share of plain training's and of the untrained model's.\n"
        )
        image = f"{study}-tradeoff.png"
        figure = drawn(image, lambda: _draw_tradeoffs(config, study, entries))
        if figure is not None:
            write_bytes(folder / image, figure)
            parts.append(f"![{study}]({image})\n")
    gains = gain_table(config, study, entries)
    if len(gains) > 1:
        parts.append(f"## {study}: shares of another arm's gain\n\n{markdown_table(gains, text_columns=4)}\n")
    return parts


def _draw_tradeoffs(config: ExperimentConfig, study: str, entries: Entries) -> bytes:
    from refreshkv.train.experiment.figures import draw_tradeoffs  # needs matplotlib

    return draw_tradeoffs(config, study, entries)


def _draw(config: ExperimentConfig, study: str, kind: str, entries: Entries, lines: list[list[str]]) -> bytes:
    from refreshkv.train.experiment.figures import draw_gaps, draw_tasks  # needs matplotlib

    return draw_gaps(config, study, entries) if kind == "perplexity" else draw_tasks(study, lines)


def perplexity_table(config: ExperimentConfig, study: str, entries: Entries) -> list[list[str]]:
    """A header, then a line for each arm and selection with figures: means over seeds, with standard deviations."""
    strategies = refreshing_strategies(config, study, entries)
    header = ["arm", "selection", "seeds", "full", "against plain"]
    header += [part for name in strategies for part in (name, "gap closed")]
    lines = [header]
    plain = _mean(perplexities(config, study, PLAIN, None, entries, FULL))
    for arm, selection in arm_selections(config, study):
        closed = {n: [100 * x for x in gaps_closed(config, study, arm, selection, entries, n)] for n in strategies}
        full = perplexities(config, study, arm, selection, entries, FULL)
        if not full:
            continue
        mean, against = fmean(full), ""
        if plain is not None and arm != PLAIN and config.arms[arm].settings is not None:
            against = f"{100 * (mean / plain - 1):+.2f} %"
        line = [arm, selection, str(len(full)), f"{mean:.3f}", against]
        for name in strategies:
            found = perplexities(config, study, arm, selection, entries, name)
            line += [_spread(found, 3), _spread(closed[name], 1)]
        lines.append(line)
    return lines


def task_table(config: ExperimentConfig, study: str, entries: Entries) -> list[list[str]]:
    """A header, then a line for each arm, selection and strategy: mean score of each task over seeds, in percent."""
    lines, tasks = [], []
    for arm, selection in arm_selections(config, study):
        found = finished_seeds(config, study, arm, selection, "tasks", entries)
        if not found:
            continue
        tasks = list(dict.fromkeys(result["task"] for result in found[0]["results"]))
        for strategy in dict.fromkeys(result["decoding"] for result in found[0]["results"]):
            scores = [[100 * _score(one, task, strategy) for one in found] for task in tasks]
            scores += [[fmean(own) for own in zip(*scores, strict=True)]] if len(tasks) > 1 else []
            lines.append([arm, selection, strategy, str(len(found)), *(_spread(own, 1) for own in scores)])
    return [["arm", "selection", "strategy", "seeds", *tasks, *(["mean"] if len(tasks) > 1 else [])], *lines]


def _score(entry: dict[str, Any], task: str, strategy: str) -> float:
    return next(r["scores"]["score"] for r in entry["results"] if (r["task"], r["decoding"]) == (task, strategy))


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds, as text; a dash without values."""
    if not values:
        return "-"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
