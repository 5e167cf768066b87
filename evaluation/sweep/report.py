"""The report of a threshold sweep: a table for the terminal, and sweep.json, sweep.md, sweep.png in a folder."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from refreshkv.evaluation.reports import EXAMPLES_FILE, ROWS_FILE, drawn, provenance
from refreshkv.evaluation.sweep.recommendation import Sweep
from refreshkv.files import write_bytes, write_json, write_text
from refreshkv.tables import column_table, markdown_table

NAMES = ("sweep.json", "sweep.md", "sweep.png")
FILES = (*NAMES, ROWS_FILE, EXAMPLES_FILE)
"""All that a sweep writes into its folder."""


def build_sweep_report(sweep: Sweep, model: str, settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The content of sweep.json, as plain values."""
    recommendation = sweep.recommend()
    return {
        "layout": 1,
        "model": model,
        "settings": settings,
        **provenance(command),
        "recommendation": {
            "text": recommendation.text,
            "stride": recommendation.point and recommendation.point.stride,
            "threshold": recommendation.point and recommendation.point.threshold,
        },
        "keep": sweep.keep,
        "points": [dataclasses.asdict(point) for point in sweep.points],
        "evaluation": sweep.evaluation.to_dict(),
    }


def write_sweep_report(folder: Path, sweep: Sweep, report: dict[str, Any]) -> list[str]:
    """Writes sweep.json, sweep.md and, if matplotlib is installed, sweep.png; returns the names of those written."""
    figure = drawn("sweep.png", lambda: _draw(sweep))
    write_json(folder / "sweep.json", report)
    write_text(folder / "sweep.md", _markdown(sweep, report, has_figure=figure is not None))
    if figure is None:
        return list(NAMES[:2])
    write_bytes(folder / "sweep.png", figure)
    return list(NAMES)


def _draw(sweep: Sweep) -> bytes:
    from refreshkv.evaluation.sweep.figure import draw_sweep  # needs matplotlib

    return draw_sweep(sweep)


def sweep_table(sweep: Sweep) -> str:
    """The schedules in aligned columns, for a terminal."""
    return column_table(_cells(sweep))


def _cells(sweep: Sweep) -> list[list[str]]:
    header = ["schedule", "effective stride", "perplexity", "against full", "gain kept", "fixed, same stride"]
    full = sweep.evaluation.full
    lines = [header, [full.name, "-", f"{full.perplexity:.3f}", "-", "-", "-"]]
    for point in sweep.points:
        lines.append(
            [
                point.name,
                f"{point.effective_stride:.1f}" if point.effective_stride else "-",
                f"{full.perplexity * math.exp(point.gap):.3f}",
                f"{math.expm1(point.gap):+.2%}",
                "-" if point.kept is None else f"{point.kept:.0%}",
                "-" if point.fixed_gap is None else f"{math.expm1(point.fixed_gap):+.2%}",
            ]
        )
    if sweep.scores:
        scores = [f"{100 * sweep.scores[line[0]]:.1f}" for line in lines[1:]]
        lines = [[*line, cell] for line, cell in zip(lines, ["tasks", *scores], strict=True)]
    return lines


def _markdown(sweep: Sweep, report: dict[str, Any], has_figure: bool) -> str:
    table = markdown_table(_cells(sweep))
    text = report["recommendation"]["text"]
    evaluation = sweep.evaluation
    prompt = evaluation.row_length - evaluation.last_tokens
    explained = (
        f"Perplexity of the last {evaluation.last_tokens:,} tokens after a prompt of {prompt:,}, {evaluation.rows:,} "
        "rows. Against full: perplexity over full attention's, less one. Gain kept: how much of the difference between "
        "never refreshing and the shortest fixed stride is left. Fixed, same stride: what a fixed schedule with as "
        "many full steps would cost, between its measured neighbours."
    )
    details = {**report["settings"], "hardware": report["hardware"], "date": report["date"]}
    parts = [f"# Threshold of {report['model']}", f"{text[0].upper()}{text[1:]}."]
    parts += ["![The sweep](sweep.png)"] if has_figure else []
    parts += [table, explained, *(f"**Warning:** {warning}." for warning in evaluation.warnings)]
    parts += ["\n".join(f"- {key}: {value}" for key, value in details.items()), f"```\n{report['command']}\n```"]
    return "\n\n".join(parts) + "\n"
