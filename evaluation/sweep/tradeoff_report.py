"""The report of a grid's sweep: a table for the terminal, and tradeoff.json, tradeoff.md, tradeoff.png in a folder."""

import dataclasses
from pathlib import Path
from typing import Any

from refreshkv.evaluation.reports import ROWS_FILE, drawn, provenance
from refreshkv.evaluation.sweep.tradeoff import Tradeoff, TradeoffPoint
from refreshkv.files import write_bytes, write_json, write_text
from refreshkv.tables import column_table, markdown_table

NAMES = ("tradeoff.json", "tradeoff.md", "tradeoff.png")
FILES = (*NAMES, ROWS_FILE)
"""All that the sweep of a grid writes into its folder."""


def build_tradeoff_report(
    tradeoff: Tradeoff,
    model: str,
    settings: dict[str, Any],
    command: str,
    fingerprints: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The content of tradeoff.json, as plain values. fingerprints: text -> that of the measured
    sequences."""
    point, text = tradeoff.recommend()
    origin = provenance(command)
    computed_on = sorted({place for evaluation in tradeoff.evaluations.values() for place in evaluation.hardware})
    return {
        "layout": 1,
        "model": model,
        "settings": settings,
        "fingerprints": fingerprints or {},
        **origin,
        "hardware": "; ".join(computed_on) or origin["hardware"],
        "within": tradeoff.within,
        "recommendation": {"text": text, "refresh": point and point.config and point.config.to_dict()},
        "left out": tradeoff.left_out,
        "points": [_plain(point) for point in tradeoff.points],
        "full attention": {text: item.full.perplexity for text, item in tradeoff.evaluations.items()},
        "last tokens": next(iter(tradeoff.evaluations.values())).last_tokens,
        "standard error of the mean loss": {
            text: {result.name: result.standard_error for result in item.results}
            for text, item in tradeoff.evaluations.items()
        },
    }


def write_tradeoff_report(folder: Path, tradeoff: Tradeoff, report: dict[str, Any]) -> list[str]:
    """Writes tradeoff.json, tradeoff.md and, if matplotlib is installed, tradeoff.png; returns the written names."""
    figure = drawn("tradeoff.png", lambda: _draw(tradeoff))
    write_json(folder / NAMES[0], report)
    write_text(folder / NAMES[1], _markdown(tradeoff, report, has_figure=figure is not None))
    if figure is None:
        return list(NAMES[:2])
    write_bytes(folder / NAMES[2], figure)
    return list(NAMES)


def tradeoff_table(tradeoff: Tradeoff) -> str:
    """The strategies in aligned columns, for a terminal."""
    return column_table(_cells(tradeoff))


def _draw(tradeoff: Tradeoff) -> bytes:
    from refreshkv.evaluation.sweep.tradeoff_figure import draw_tradeoff  # needs matplotlib

    return draw_tradeoff(tradeoff)


def _plain(point: TradeoffPoint) -> dict[str, Any]:
    values = {field.name: getattr(point, field.name) for field in dataclasses.fields(point)}
    return {**values, "config": point.config and point.config.to_dict()}


def _cells(tradeoff: Tradeoff) -> list[list[str]]:
    texts = list(tradeoff.evaluations)
    several = len(texts) > 1
    header = ["strategy", "bytes read", "compute"]
    header += [f"over full, {text}" if several else "over full" for text in texts]
    header += [f"greedy agreement, {text}" if several else "greedy agreement" for text in texts]
    lines = [header]
    for point in tradeoff.points:
        lines.append(
            [
                point.name,
                f"{point.read:.1%}",
                "-" if point.computed is None else f"{point.computed:.1%}",
                *(_loss(point.losses[text], point.errors[text]) for text in texts),
                *(_percent(point.agreements[text]) for text in texts),
            ]
        )
    return lines


def _loss(loss: float, error: float | None) -> str:
    return f"{loss:+.2%}" + ("" if error is None else f" ± {100 * error:.2f}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _markdown(tradeoff: Tradeoff, report: dict[str, Any], has_figure: bool) -> str:
    evaluation = next(iter(tradeoff.evaluations.values()))
    prompt = evaluation.row_length - evaluation.last_tokens
    full = ", ".join(f"{text} {value:.3f}" for text, value in report["full attention"].items())
    explained = (
        f"Perplexity of the last {evaluation.last_tokens:,} tokens after a prompt of {prompt:,}, {evaluation.rows:,} "
        f"sequences of each text; full attention: {full}. Over full: perplexity over full attention's, less one, ± its "
        "standard error over the sequences. Bytes read: keys and values that a decoding step reads, of those that full "
        "attention reads. Compute: operations of attention and scoring, likewise. Greedy agreement: scored positions "
        "whose most likely token is full attention's."
    )
    text = report["recommendation"]["text"]
    parts = [f"# Strategies for {report['model']}", f"{text[0].upper()}{text[1:]}."]
    parts += ["![Loss against bytes read](tradeoff.png)"] if has_figure else []
    parts += [markdown_table(_cells(tradeoff)), explained]
    if tradeoff.left_out:
        parts += [f"Stopped before {len(tradeoff.left_out)} further strategies, which tradeoff.json names."]
    parts += [f"**Warning:** {warning}." for warning in evaluation.warnings]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    details = {**report["settings"], "hardware": report["hardware"], "date": report["date"], "versions": versions}
    parts += ["\n".join(f"- {key}: {value}" for key, value in details.items()), f"```\n{report['command']}\n```"]
    return "\n\n".join(parts) + "\n"
