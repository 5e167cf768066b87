"""Figures of perplexities: the ratio to full attention against the generated position, and effective strides.

Importing this module needs matplotlib.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from refreshkv.config import NEVER
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.plotting import (
    BASELINE_COLOURS,
    NEVER_COLOUR,
    SIMILARITY_COLOURS,
    STRIDE_COLOURS,
    png,
    tidy,
)

MARKERS = "os^vP"
BEFORE = {"linestyle": (0, (4, 2)), "linewidth": 1.3, "alpha": 0.75}
AFTER = {"linestyle": "solid", "linewidth": 1.8}
"""Line styles of the two evaluations; a single evaluation has the later one's."""
SMOOTHING = 16
"""The moving average spans 1/16 of the generated positions."""


def draw(after: Evaluation, before: Evaluation | None = None) -> bytes:
    """A report's figure as PNG: on the left as the paper's figure 3, on the right as its figure 4.

    `before` is drawn with dashed lines, `after` with solid ones.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    ratios, strides = figure.subplots(1, 2, width_ratios=(3, 2))
    styles = _styles(after)
    for evaluation, line in ((before, BEFORE), (after, AFTER)):
        if evaluation is not None:
            _draw_ratios(ratios, evaluation, styles, line)
            _draw_strides(strides, evaluation, styles, line)
    _label_ratios(ratios, after)
    _label_strides(strides, after)
    _draw_legend(figure, styles, compared=before is not None)
    return png(figure)


def draw_ratios(panels: dict[str, Evaluation]) -> bytes:
    """The paper's figure 3 as PNG: perplexity, as a ratio to full attention, against the generated position.

    Each evaluation gets a panel; all must have the same strategies, full attention among them.
    """
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 5.5 * columns, 0.8 + 3.8 * lines), layout="constrained")
    first = next(iter(panels.values()))
    for axes, (title, evaluation) in zip(_axes(figure, lines, columns), panels.items(), strict=False):
        _draw_ratios(axes, evaluation, _styles(first), AFTER)
        _label_ratios(axes, evaluation)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel("perplexity / full attention's")
    _draw_legend(figure, _styles(first), compared=False, columns=3 * columns)
    return _used_panels(figure)


def draw_strides(panels: dict[str, dict[str, dict[int, float | None]]]) -> bytes:
    """The paper's figure 4 as PNG: effective stride against layer.

    panels: title -> line -> layer -> decoding steps per full step; None leaves a gap. All panels have the same lines.
    """
    columns = min(len(panels), 3)
    lines_of_panels = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 5.5 * columns, 1 + 3.8 * lines_of_panels), layout="constrained")
    names = list(dict.fromkeys(line for lines in panels.values() for line in lines))
    colours = (*STRIDE_COLOURS, *SIMILARITY_COLOURS, NEVER_COLOUR, *BASELINE_COLOURS)
    rounds = [divmod(i, len(colours)) for i in range(len(names))]
    styles = {name: (colours[i], MARKERS[turn % len(MARKERS)]) for name, (turn, i) in zip(names, rounds, strict=True)}
    for axes, (title, lines) in zip(_axes(figure, lines_of_panels, columns), panels.items(), strict=False):
        for name, strides in lines.items():
            heights = [np.nan if stride is None else stride for stride in strides.values()]
            axes.plot(list(strides), heights, color=styles[name][0], marker=styles[name][1], markersize=4, **AFTER)
        _label_layers(axes, title)
        axes.set_ylabel("decoding steps per full step")
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, label=name, **AFTER)
        for name, (colour, marker) in styles.items()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns), frameon=False)
    return _used_panels(figure)


def _axes(figure: Figure, lines_of_panels: int, columns: int) -> list[Axes]:
    """The panels, line by line."""
    return list(figure.subplots(lines_of_panels, columns, squeeze=False).flat)


def _label_layers(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    tidy(axes)


def _used_panels(figure: Figure) -> bytes:
    """The figure as PNG, without the panels that nothing was drawn into."""
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    return png(figure)


def smoothing_window(last_tokens: int) -> int:
    """Positions in the moving average of the left panel."""
    return max(1, last_tokens // SMOOTHING)


def _styles(evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """Strategy -> colour and marker; full attention has none."""
    styles = {}
    fixed = [result for result in evaluation.results if _is_fixed(result)]
    for i, result in enumerate(sorted(fixed, key=lambda result: result.config.stride)):
        round_, colour = divmod(i, len(STRIDE_COLOURS))
        styles[result.name] = (STRIDE_COLOURS[colour], MARKERS[round_ % len(MARKERS)])
    others = [result for result in evaluation.results if not result.is_full and result.name not in styles]
    for result in others:
        if result.config is not None and result.config.stride == NEVER and result.config.select_stride is None:
            styles[result.name] = (NEVER_COLOUR, "")
        else:
            colours = BASELINE_COLOURS if result.config is None else SIMILARITY_COLOURS
            index = sum(colour in colours for colour, _ in styles.values()) % len(colours)
            styles[result.name] = (colours[index], "" if result.config is None else "D")
    return styles


def _is_fixed(result: Result) -> bool:
    return result.config is not None and result.config.threshold is None and result.config.stride != NEVER


def _draw_ratios(axes: Axes, evaluation: Evaluation, styles: dict[str, tuple[str, str]], line: dict) -> None:
    window = smoothing_window(evaluation.last_tokens)
    kernel = np.full(window, 1 / window)
    positions = np.arange(evaluation.last_tokens - window + 1) + (window + 1) / 2
    full = np.convolve(evaluation.full.losses, kernel, mode="valid")
    for result in evaluation.results:
        if not result.is_full:
            ratio = np.exp(np.convolve(result.losses, kernel, mode="valid") - full)
            axes.plot(positions, ratio, color=styles[result.name][0], **line)


def _draw_strides(axes: Axes, evaluation: Evaluation, styles: dict[str, tuple[str, str]], line: dict) -> None:
    for result in evaluation.results:
        heights = [np.nan if stride is None else stride for stride in result.effective_strides.values()]
        if not np.isnan(heights).all():
            colour, marker = styles[result.name]
            filling = {"marker": marker, "markersize": 5, "markerfacecolor": "white" if line is BEFORE else colour}
            axes.plot(list(result.effective_strides), heights, color=colour, **line, **filling)


def _label_ratios(axes: Axes, evaluation: Evaluation) -> None:
    window = smoothing_window(evaluation.last_tokens)
    axes.axhline(1, color="0.25", linewidth=1)
    axes.set_title("Perplexity, ratio to full attention", loc="left", fontsize=11)
    axes.set_xlabel(f"generated position (moving average over {window})" if window > 1 else "generated position")
    axes.set_xlim(1, max(2, evaluation.last_tokens))
    tidy(axes)


def _label_strides(axes: Axes, evaluation: Evaluation) -> None:
    axes.set_title("Effective stride (steps per full step)", loc="left", fontsize=11)
    axes.set_xlabel("layer")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(_stride_ticks(evaluation))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.margins(y=0.15)
    tidy(axes)


def _stride_ticks(evaluation: Evaluation) -> list[float]:
    """The fixed strides; without any, powers of two around the strides drawn."""
    fixed = {result.config.stride for result in evaluation.results if _is_fixed(result)}
    strides = [stride for result in evaluation.results for stride in result.effective_strides.values() if stride]
    if fixed or not strides:
        return sorted(fixed)
    least, most = int(np.floor(np.log2(min(strides)))), int(np.ceil(np.log2(max(strides))))
    return [2.0**power for power in range(least, most + 1)]


def _draw_legend(figure: Figure, styles: dict[str, tuple[str, str]], compared: bool, columns: int = 5) -> None:
    handles = [Line2D([], [], color="0.25", linewidth=1, label="full attention")]
    for name, (colour, marker) in styles.items():
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=name, **AFTER))
    if compared:
        handles.append(Line2D([], [], color="0.4", label="before", **BEFORE))
        handles.append(Line2D([], [], color="0.4", label="after", **AFTER))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns), frameon=False)
