"""Figures of an experiment. Importing this module needs matplotlib."""

from statistics import fmean

from matplotlib.figure import Figure

from refreshkv.evaluation.plotting import png
from refreshkv.train.experiment.comparison import (
    FULL,
    Entries,
    arm_selections,
    gaps_closed,
    perplexities,
    refreshing_strategies,
)
from refreshkv.train.experiment.config import ExperimentConfig
from refreshkv.train.experiment.tradeoffs import bytes_read, losses, tradeoff_tables

LEAST_LOSS = 0.0005
"""Losses below this, and gains, are drawn here: the axis is logarithmic."""
LINES = ("o-", "s--", "v:", "^-.", "D-", "X--")
"""Marker and line of each kind of strategy."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")


def draw_gaps(config: ExperimentConfig, study: str, entries: Entries) -> bytes:
    """A study's bars as PNG: the gap that each arm closes under each strategy. Points are single seeds."""
    bars = [bar for bar in arm_selections(config, study) if perplexities(config, study, *bar, entries, FULL)]
    strategies = refreshing_strategies(config, study, entries)
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(bars) * max(1, len(strategies))), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(strategies))
    for index, name in enumerate(strategies):
        for bar, (arm, selection) in enumerate(bars):
            shares = [100 * x for x in gaps_closed(config, study, arm, selection, entries, name)]
            if not shares:
                continue
            position = bar + (index - (len(strategies) - 1) / 2) * height
            label, colour = name if bar == 0 else None, COLOURS[index % len(COLOURS)]
            axes.barh(position, fmean(shares), height * 0.9, color=colour, label=label)
            axes.plot(shares, [position] * len(shares), ".", color="black", markersize=4)
    axes.set_yticks(range(len(bars)), [f"{arm}\n({selection})" for arm, selection in bars])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gap to full attention closed, % of the untouched base's")
    axes.set_title(study)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return png(figure)


def draw_tasks(study: str, table: list[list[str]]) -> bytes:
    """A study's bars as PNG: mean score over tasks of each strategy, for each arm. table: of `task_table`."""
    lines = table[1:]
    arms = list(dict.fromkeys(f"{line[0]}\n({line[1]})" for line in lines))
    strategies = list(dict.fromkeys(line[2] for line in lines))
    figure = Figure(figsize=(9, 1.2 + 0.25 * len(lines)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(strategies)
    for line in lines:
        index = strategies.index(line[2])
        position = arms.index(f"{line[0]}\n({line[1]})") + (index - (len(strategies) - 1) / 2) * height
        score = fmean(float(cell.split()[0]) for cell in line[4:])
        axes.barh(position, score, height * 0.9, color=COLOURS[index % len(COLOURS)])
    for index, name in enumerate(strategies):
        axes.barh(0, 0, color=COLOURS[index % len(COLOURS)], label=name)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel("mean score over tasks, %")
    axes.set_title(study)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return png(figure)


def draw_tradeoffs(config: ExperimentConfig, study: str, entries: Entries) -> bytes:
    """A panel for each text as PNG: loss against bytes read, a line for each arm and kind of strategy."""
    tables = tradeoff_tables(config, study, entries)
    figure = Figure(figsize=(1 + 5.5 * len(tables), 5.5), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True).flat
    for axes, (text, (header, *lines)) in zip(panels, tables.items(), strict=True):
        families: dict[str, list[str]] = {}
        for name in header[4:]:
            families.setdefault(name.rpartition(", K=")[0], []).append(name)
        for number, (arm, *_) in enumerate(lines):
            for (family, names), line in zip(families.items(), LINES, strict=False):
                reads = [100 * bytes_read(config, study, arm, name, entries) for name in names]
                means = [fmean(losses(config, study, arm, text, name, entries)) for name in names]
                heights = [100 * max(LEAST_LOSS, loss) for loss in means]
                axes.plot(reads, heights, line, color=COLOURS[number % len(COLOURS)], label=f"{arm}, {family}")
        axes.set_yscale("log")
        axes.set_title(text, loc="left")
        axes.set_xlabel("keys and values read a token, % of full attention's")
    figure.axes[0].set_ylabel("perplexity over full attention's, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return png(figure)
