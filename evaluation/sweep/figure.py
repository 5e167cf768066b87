"""The figure of a threshold sweep: what each schedule costs and saves, and the effective stride of each layer.

Importing this module needs matplotlib.
"""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

from refreshkv.evaluation.plotting import NEVER_COLOUR, SIMILARITY_COLOURS, png, tidy
from refreshkv.evaluation.sweep.recommendation import Point, Sweep

FIXED_COLOUR = "#0072B2"
CHOSEN_COLOUR = "#009E73"
TICKS = [figure * 10**power for power in range(4) for figure in (1, 1.5, 2, 3, 4, 5, 7)]


def draw_sweep(sweep: Sweep) -> bytes:
    """The sweep's figure as PNG.

    Left: perplexity over full attention's against the effective stride, for thresholds and for fixed schedules. Right:
    the effective stride of each layer under the recommended threshold and its neighbours.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    costs, layers = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_costs(costs, sweep)
    _draw_layers(layers, sweep)
    return png(figure)


def _draw_costs(axes: Axes, sweep: Sweep) -> None:
    points = [point for point in sweep.points if point.effective_stride]
    fixed = sorted((p for p in points if p.threshold is None), key=lambda point: point.effective_stride)
    axes.plot(*_curve(fixed), color=FIXED_COLOUR, marker="s", markersize=5, label="fixed schedule")
    strides = sorted({point.stride for point in points if point.threshold is not None})
    for stride, colour in zip(strides, SIMILARITY_COLOURS * len(strides), strict=False):
        own = [point for point in points if point.threshold is not None and point.stride == stride]
        own.sort(key=lambda point: point.threshold)
        axes.plot(*_curve(own), color=colour, marker="o", markersize=5, label=f"similarity, checked every {stride}")
        _name_thresholds(axes, own, colour)
    bottom = _limit_heights(axes, [math.expm1(point.gap) for point in sweep.points])
    axes.axhline(math.expm1(sweep.largest_gap), color=NEVER_COLOUR, linestyle="--", label="never refreshed")
    if sweep.largest_gap > sweep.least_gap:
        band = {"color": CHOSEN_COLOUR, "alpha": 0.1, "linewidth": 0, "label": f"keeps {sweep.keep:.0%} of the gain"}
        axes.axhspan(bottom, math.expm1(sweep.allowed_gap), **band)
    chosen = sweep.recommend().point
    if chosen:
        hollow = {"markersize": 13, "markerfacecolor": "none", "markeredgewidth": 2, "linestyle": "none", "zorder": 3}
        label = f"recommended: {chosen.threshold:g}"
        axes.plot(*_curve([chosen]), color=CHOSEN_COLOUR, marker="o", label=label, **hollow)
    axes.set_title("Perplexity, more than full attention's", loc="left", fontsize=11)
    axes.set_xlabel("effective stride (decoding steps per full step)")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    _logarithmic(axes, [point.effective_stride for point in points])
    axes.figure.legend(loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    tidy(axes)


def _limit_heights(axes: Axes, heights: list[float]) -> float:
    """Leaves some room around the points; returns the lower end."""
    room = 0.12 * (max(heights) - min(heights)) or 0.001
    axes.set_ylim(min(heights) - room, max(heights) + room)
    return min(heights) - room


def _curve(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.effective_stride for point in points], [math.expm1(point.gap) for point in points]


def _name_thresholds(axes: Axes, points: list[Point], colour: str) -> None:
    """Writes thresholds beside their points; where several would overlap, only the first."""
    named: list[tuple[float, float]] = []
    heights = [math.expm1(point.gap) for point in points]
    span = max(heights) - min(heights) or 1.0
    for point, height in zip(points, heights, strict=True):
        position = (math.log(point.effective_stride), height / span)
        if all(abs(position[0] - x) > 0.04 or abs(position[1] - y) > 0.04 for x, y in named):
            named.append(position)
            offset = {"xytext": (6, -11), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"{point.threshold:g}", (point.effective_stride, height), color=colour, **offset)


def _draw_layers(axes: Axes, sweep: Sweep) -> None:
    chosen = sweep.recommend().point
    results = [result for result in sweep.evaluation.results if result.config and result.config.threshold is not None]
    if chosen:
        results = [result for result in results if result.config.stride == chosen.stride]
        index = [result.name for result in results].index(chosen.name)
        results = results[max(0, index - 1) : index + 2]
    for i, result in enumerate(results):
        is_chosen = chosen is not None and result.name == chosen.name
        colour = CHOSEN_COLOUR if is_chosen else SIMILARITY_COLOURS[i % len(SIMILARITY_COLOURS)]
        heights = [math.nan if stride is None else stride for stride in result.effective_strides.values()]
        width = {"linewidth": 2.2 if is_chosen else 1.2, "alpha": 1.0 if is_chosen else 0.6}
        label = f"threshold {result.config.threshold:g}"
        axes.plot(list(result.effective_strides), heights, color=colour, marker="o", markersize=4, label=label, **width)
    axes.set_title("Effective stride of each layer", loc="left", fontsize=11)
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if results:
        axes.legend(frameon=False, fontsize=9)
    tidy(axes)


def _logarithmic(axes: Axes, strides: list[float]) -> None:
    axes.set_xscale("log")
    least, most = 0.9 * min(strides), 1.15 * max(strides)
    axes.set_xlim(least, most)
    axes.set_xticks([tick for tick in TICKS if least <= tick <= most])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
