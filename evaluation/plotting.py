"""Colours and axes that all figures share. Importing this module needs matplotlib."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STRIDE_COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#E69F00")
"""Fixed strides, from short to long. The palette of Okabe and Ito, which colour-blind readers can tell apart; so are
the next two. More strides repeat the colours with other markers."""
SIMILARITY_COLOURS = ("#CC79A7", "#7B3294", "#C51B7D")
NEVER_COLOUR = "#D55E00"
BASELINE_COLOURS = ("#999999", "#000000", "#8C6D1F", "#66A61E", "#A6761D")
"""Caches that evict."""


def tidy(axes: Axes) -> None:
    """Light grid behind the lines, no frame above and on the right."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
