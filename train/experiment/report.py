"""Tables and plots of an experiment's figures: the gap that each arm closes."""

import io
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from refreshkv.files import write_bytes, write_text
from refreshkv.tables import markdown_table
from refreshkv.train.experiment.config import UNTRAINED, ExperimentConfig
from refreshkv.train.experiment.pieces import report_name

PLAIN = "plain"
"""The arm of ordinary continued training, if there is one: full attention is compared with its."""
FULL = "full"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")

Entries = dict[str, dict[str, Any]]


def write_tables(config: ExperimentConfig, entries: Entries) -> str:
    """Writes tables.md and PNGs into the experiment's folder of results; returns the tables."""
    folder, parts = Path(config.results), []
    folder.mkdir(parents=True, exist_ok=True)
    for study in config.studies:
        for kind, table, plot in (
            ("perplexity", perplexity_table, draw_gaps),
            ("tasks", task_table, draw_tasks),
        ):
            lines = table(config, study, entries)
            if len(lines) < 2:
                continue
            image = f"{study}-{kind}.png"
            write_bytes(folder / image, plot(config, study, entries))
            parts.append(f"## {study}: {kind}\n\n{markdown_table(lines, text_columns=2)}\n\n![{study}]({image})\n")
    text = "\n".join(parts)
    write_text(folder / "tables.md", text)
    return text


def perplexity_table(config: ExperimentConfig, study: str, entries: Entries) -> list[list[str]]:
    """A header, then a line for each arm and selection that has figures: mean over seeds, and their spread."""
    strategies = _strategies(config, study, entries)
    header = ["arm", "selection", "seeds", "full", "against plain"]
    header += [part for name in strategies for part in (name, "gap closed")]
    lines = [header]
    plain = _mean(_perplexities(config, study, PLAIN, None, entries, FULL))
    for arm, selection in _rows(config, study):
        closed = {n: [100 * x for x in gaps_closed(config, study, arm, selection, entries, n)] for n in strategies}
        full = _perplexities(config, study, arm, selection, entries, FULL)
        if not full:
            continue
        is_compared = plain is not None and arm != PLAIN and config.arms[arm].settings is not None
        against = f"{100 * (_mean(full) / plain - 1):+.2f} %" if is_compared else ""
        line = [arm, selection, str(len(full)), f"{_mean(full):.3f}", against]
        for name in strategies:
            found = _perplexities(config, study, arm, selection, entries, name)
            line += [_spread(found, 3), _spread(closed[name], 1)]
        lines.append(line)
    return lines


def gaps_closed(
    config: ExperimentConfig, study: str, arm: str, selection: str, entries: Entries, strategy: str
) -> list[float]:
    """Share of the untouched base's gap that is gone, one for each seed.

    A gap is the strategy's perplexity less full attention's of the same model; the base's is under its first selection.
    Empty while the base's figures are missing, and where it has no gap.
    """
    first = config.arms[UNTRAINED].selections[0]
    base = [_perplexities(config, study, UNTRAINED, first, entries, name) for name in (strategy, FULL)]
    if not all(base):
        return []
    before = base[0][0] - base[1][0]
    if before <= 0:
        return []
    own = [_perplexities(config, study, arm, selection, entries, name) for name in (strategy, FULL)]
    return [1 - (refreshed - full) / before for refreshed, full in zip(*own, strict=True)]


def task_table(config: ExperimentConfig, study: str, entries: Entries) -> list[list[str]]:
    """A header, then a line for each arm, selection, strategy: mean score of each task over seeds, in percent."""
    lines, tasks = [], []
    for arm, selection in _rows(config, study):
        found = _seeds(config, study, arm, selection, "tasks", entries)
        if not found:
            continue
        tasks = list(dict.fromkeys(result["task"] for result in found[0]["results"]))
        for strategy in dict.fromkeys(result["decoding"] for result in found[0]["results"]):
            scores = [_spread([100 * _score(one, task, strategy) for one in found], 1) for task in tasks]
            lines.append([arm, selection, strategy, str(len(found)), *scores])
    return [["arm", "selection", "strategy", "seeds", *tasks], *lines]


def draw_gaps(config: ExperimentConfig, study: str, entries: Entries) -> bytes:
    """Bars: the gap that each arm closes at each stride; points: single seeds."""
    rows = [row for row in _rows(config, study) if _perplexities(config, study, *row, entries, FULL)]
    strategies = _strategies(config, study, entries)
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(rows) * max(1, len(strategies))), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(strategies))
    for index, name in enumerate(strategies):
        for row, (arm, selection) in enumerate(rows):
            shares = [100 * x for x in gaps_closed(config, study, arm, selection, entries, name)]
            if not shares:
                continue
            place = row + (index - (len(strategies) - 1) / 2) * height
            label, colour = name if row == 0 else None, COLOURS[index % len(COLOURS)]
            axes.barh(place, fmean(shares), height * 0.9, color=colour, label=label)
            axes.plot(shares, [place] * len(shares), ".", color="black", markersize=4)
    axes.set_yticks(range(len(rows)), [f"{arm}\n({selection})" for arm, selection in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gap to full attention closed, % of the untouched base's")
    axes.set_title(study)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return _png(figure)


def draw_tasks(config: ExperimentConfig, study: str, entries: Entries) -> bytes:
    """Bars: the mean score over tasks of each strategy, for each arm."""
    lines = task_table(config, study, entries)[1:]
    arms = list(dict.fromkeys(f"{line[0]}\n({line[1]})" for line in lines))
    strategies = list(dict.fromkeys(line[2] for line in lines))
    figure = Figure(figsize=(9, 1.2 + 0.25 * len(lines)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(strategies)
    for line in lines:
        index = strategies.index(line[2])
        place = arms.index(f"{line[0]}\n({line[1]})") + (index - (len(strategies) - 1) / 2) * height
        score = fmean(float(cell.split()[0]) for cell in line[4:])
        axes.barh(place, score, height * 0.9, color=COLOURS[index % len(COLOURS)])
    for index, name in enumerate(strategies):
        axes.barh(0, 0, color=COLOURS[index % len(COLOURS)], label=name)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel("mean score over tasks, %")
    axes.set_title(study)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return _png(figure)


def _rows(config: ExperimentConfig, study: str) -> list[tuple[str, str]]:
    return [(arm, selection) for arm in config.studies[study].arms for selection in config.arms[arm].selections]


def _seeds(
    config: ExperimentConfig, study: str, arm: str, selection: str, kind: str, entries: Entries
) -> list[dict[str, Any]]:
    seeds = [None] if config.arms[arm].settings is None else config.studies[study].seeds
    names = [report_name(study, arm, seed, selection, kind) for seed in seeds]
    return [entries[name] for name in names if name in entries]


def _perplexities(
    config: ExperimentConfig, study: str, arm: str, selection: str | None, entries: Entries, strategy: str
) -> list[float]:
    """One for each seed that is finished; selection None: the arm's first."""
    if arm not in config.studies[study].arms:
        return []
    selection = selection or config.arms[arm].selections[0]
    found = _seeds(config, study, arm, selection, "perplexity", entries)
    return [one["results"][strategy]["perplexity"] for one in found]


def _strategies(config: ExperimentConfig, study: str, entries: Entries) -> list[str]:
    """All but full attention, as the first finished report has them."""
    for arm, selection in _rows(config, study):
        for one in _seeds(config, study, arm, selection, "perplexity", entries):
            return [name for name in one["results"] if name != FULL]
    return []


def _score(entry: dict[str, Any], task: str, strategy: str) -> float:
    return next(r["scores"]["score"] for r in entry["results"] if (r["task"], r["decoding"]) == (task, strategy))


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
