"""The figure of long generation: agreement and perplexity by position. Importing this module needs matplotlib."""

from typing import Any

from matplotlib.figure import Figure

from refreshkv.evaluation.plotting import BASELINE_COLOURS, NEVER_COLOUR, STRIDE_COLOURS, png, tidy

COLOURS = (*STRIDE_COLOURS, NEVER_COLOUR, *BASELINE_COLOURS)


def draw_generation(report: dict[str, Any]) -> bytes:
    """PNG: for greedy tokens, and drawn ones if there are any, two panels against the generated position. On the left
    the share of tokens that full attention wrote there too, on the right the perplexity under full attention."""
    kinds = list(dict.fromkeys(one["decoding"] for one in report["results"] if one["decoding"]))
    figure = Figure(figsize=(11, 0.8 + 3.6 * len(kinds)), layout="constrained")
    for (left, right), kind in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        names = [one["strategy"] for one in report["results"]]
        for one in report["results"]:
            if one["decoding"] not in (kind, ""):
                continue
            colour = COLOURS[names.index(one["strategy"]) % len(COLOURS)]
            points = _middles(len(one["likeliest_by_position"]), report["settings"]["generated"])
            if one["same_by_position"] is not None:
                left.plot(points, [100 * value for value in one["same_by_position"]], ".-", color=colour)
            right.plot(points, one["perplexity_by_position"], ".-", color=colour, label=one["strategy"])
        left.set_title(f"{kind}: tokens as full attention's text, %", loc="left", fontsize=11)
        right.set_title(f"{kind}: perplexity under full attention", loc="left", fontsize=11)
        right.set_yscale("log")
        for axes in (left, right):
            axes.set_xlabel("generated token")
            tidy(axes)
        right.legend(frameon=False, fontsize=8)
    return png(figure)


def _middles(blocks: int, tokens: int) -> list[float]:
    return [(i + 0.5) * tokens / blocks for i in range(blocks)]
