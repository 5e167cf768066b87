"""The figure of a grid's sweep: loss against bytes read. Importing this module needs matplotlib."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from refreshkv.evaluation.plotting import (
    BASELINE_COLOURS,
    NEVER_COLOUR,
    SIMILARITY_COLOURS,
    STRIDE_COLOURS,
    png,
    tidy,
)
from refreshkv.evaluation.sweep.tradeoff import Tradeoff, TradeoffPoint

MARKERS = "os^vPDX*"
LEAST_LOSS = 0.0005
"""Losses below this, and gains, are drawn here: the axis is logarithmic."""
COLOURS = (*STRIDE_COLOURS, *SIMILARITY_COLOURS, NEVER_COLOUR, *BASELINE_COLOURS)


def draw_tradeoff(tradeoff: Tradeoff) -> bytes:
    """One panel for each text: perplexity over full attention's, less one, against bytes read, as PNG.

    Points of one selection and kind of strategy share colour and marker; their names stand beside them.
    """
    texts = list(tradeoff.evaluations)
    figure = Figure(figsize=(1 + 6 * len(texts), 6), layout="constrained")
    points = tradeoff.points
    families = list(dict.fromkeys(_family(point) for point in points))
    for axes, text in zip(figure.subplots(1, len(texts), squeeze=False, sharey=True).flat, texts, strict=True):
        for i, family in enumerate(families):
            _draw_family(axes, [p for p in points if _family(p) == family], text, i, family)
        axes.axhline(tradeoff.within, color="0.6", linestyle="--", linewidth=1, label=f"within {tradeoff.within:.1%}")
        _label(axes, text)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return png(figure)


def _family(point: TradeoffPoint) -> str:
    """The selection and the kind of strategy: points that differ in stride and K only are of one family."""
    if point.config is None:
        return point.name.partition(",")[0]
    selection = point.name.rpartition(": ")[0]
    kind = "full steps" if point.config.select_stride is None else f"selecting, {point.config.score_bits} bits"
    kind = "similarity" if point.config.threshold is not None else kind
    return f"{selection}, {kind}" if selection else kind


def _draw_family(axes: Axes, points: list[TradeoffPoint], text: str, number: int, label: str) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    for budget in sorted({point.budget for point in points}):
        own = sorted((point for point in points if point.budget == budget), key=lambda point: point.read)
        heights = [max(LEAST_LOSS, point.losses[text]) for point in own]
        shown = label if budget == points[0].budget else None
        axes.plot([p.read for p in own], heights, color=colour, marker=marker, markersize=6, linewidth=1, label=shown)
    for point in points:
        position = (point.read, max(LEAST_LOSS, point.losses[text]))
        style = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 7}
        axes.annotate(_short(point), position, color=colour, **style)


def _short(point: TradeoffPoint) -> str:
    """Stride and K, for the figure."""
    config = point.config
    if config is None:
        return f"K={point.budget}"
    stride = config.stride if config.select_stride is None else config.select_stride
    threshold = "" if config.threshold is None else f" {config.threshold:g}"
    return f"S={stride}{threshold} K={point.budget}"


def _label(axes: Axes, text: str) -> None:
    axes.set_title(f"{text}: perplexity, more than full attention's", loc="left", fontsize=11)
    axes.set_xlabel("keys and values read a token, of full attention's")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.yaxis.set_minor_formatter(NullFormatter())
    tidy(axes)
