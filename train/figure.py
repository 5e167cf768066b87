"""The figure of a report: perplexity ratio to full attention against generated position, and effective strides."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from refreshkv.config import NEVER
from refreshkv.train.evaluation import Evaluation, Result

STRIDE_COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#E69F00")
"""For fixed strides, from short to long. They and the two below are of the palette of Okabe and Ito, which colour-blind
readers can tell apart. More strides repeat them with other markers."""
SIMILARITY_COLOUR = "#CC79A7"
NEVER_COLOUR = "#D55E00"
BASELINE_COLOURS = ("#999999", "#000000", "#8C6D1F")
"""For caches that evict."""
MARKERS = "os^vP"
BEFORE = {"linestyle": (0, (4, 2)), "linewidth": 1.3, "alpha": 0.75}
AFTER = {"linestyle": "solid", "linewidth": 1.8}
"""How the two evaluations' lines look; a single evaluation looks like the later one."""
SMOOTHING = 16
"""The moving average spans this fraction of the generated positions: 1/16."""


def draw(after: Evaluation, before: Evaluation | None = None) -> bytes:
    """The figure as PNG. Left as the paper's figure 3, right as its figure 4; `before` is dashed, `after` solid."""
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def smoothing_window(last_tokens: int) -> int:
    """Positions in the moving average of the left panel."""
    return max(1, last_tokens // SMOOTHING)


def _styles(evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """Name of each strategy but full attention -> colour and marker."""
    styles = {}
    fixed = [result for result in evaluation.results if _is_fixed(result)]
    for i, result in enumerate(sorted(fixed, key=lambda result: result.config.stride)):
        round_, colour = divmod(i, len(STRIDE_COLOURS))
        styles[result.name] = (STRIDE_COLOURS[colour], MARKERS[round_ % len(MARKERS)])
    others = [result for result in evaluation.results if not result.is_full and result.name not in styles]
    for result in others:
        if result.config is None:
            place = sum(colour in BASELINE_COLOURS for colour, _ in styles.values())
            styles[result.name] = (BASELINE_COLOURS[place % len(BASELINE_COLOURS)], "")
        else:
            styles[result.name] = (NEVER_COLOUR, "") if result.config.stride == NEVER else (SIMILARITY_COLOUR, "D")
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
    _tidy(axes)


def _label_strides(axes: Axes, evaluation: Evaluation) -> None:
    axes.set_title("Effective stride (steps per full step)", loc="left", fontsize=11)
    axes.set_xlabel("layer")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(_stride_ticks(evaluation))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.margins(y=0.15)
    _tidy(axes)


def _stride_ticks(evaluation: Evaluation) -> list[float]:
    """The fixed strides, or else a few powers of two around what there is."""
    fixed = {result.config.stride for result in evaluation.results if _is_fixed(result)}
    strides = [stride for result in evaluation.results for stride in result.effective_strides.values() if stride]
    if fixed or not strides:
        return sorted(fixed)
    least, most = int(np.floor(np.log2(min(strides)))), int(np.ceil(np.log2(max(strides))))
    return [2.0**power for power in range(least, most + 1)]


def _tidy(axes: Axes) -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(figure: Figure, styles: dict[str, tuple[str, str]], compared: bool) -> None:
    handles = [Line2D([], [], color="0.25", linewidth=1, label="full attention")]
    for name, (colour, marker) in styles.items():
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=name, **AFTER))
    if compared:
        handles.append(Line2D([], [], color="0.4", label="before", **BEFORE))
        handles.append(Line2D([], [], color="0.4", label="after", **AFTER))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
