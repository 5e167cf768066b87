"""The report of a suite: the paper's table, its numbers beside ours; suite.json, suite.md, for figures suite.png."""

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

from refreshkv.evaluation.reports import EXAMPLES_FILE, ROWS_FILE, drawn, provenance
from refreshkv.evaluation.suites.config import Column, Suite
from refreshkv.evaluation.suites.run import Measured
from refreshkv.files import write_bytes, write_json, write_text
from refreshkv.tables import column_table, markdown_table

NAMES = ("suite.json", "suite.md", "suite.png")
FILES = (*NAMES, ROWS_FILE, EXAMPLES_FILE)
"""All that a suite writes into its folder."""
LAYOUT = 1
"""Version of suite.json's layout."""
UNKNOWN = "n/a"
"""Stands for numbers of the paper that are not known offline."""
NOT_MEASURED = "-"
DIGITS = {"perplexity": 3, "score": 1, "effective stride": 1, "seconds": 2, "peak GiB": 2, "cache MiB": 2}
COSTS = ("seconds", "peak GiB", "cache MiB")


def build_suite_report(
    suite: Suite,
    name: str,
    file: str,
    results: dict[str, Measured],
    notes: list[str],
    settings: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """The content of suite.json, as plain values.

    Args:
        file: path of the suite's YAML file, where missing numbers can be filled in.
        notes: differences from the paper, one phrase each.
    """
    return {
        "layout": LAYOUT,
        "name": name,
        "file": file,
        "suite": dataclasses.asdict(suite),
        "models": {model: measured.path for model, measured in results.items()},
        "not the paper's": notes,
        "warnings": [warning for measured in results.values() for warning in measured.warnings],
        "settings": settings,
        **provenance(command),
        "tables": _tables(suite, results),
        "costs": {model: _costs(measured) for model, measured in results.items()},
        "results": {
            model: {
                "figures": measured.figures,
                "effective strides": measured.strides,
                "corpora": {corpus: item.to_dict() for corpus, item in measured.evaluations.items()},
                "benchmarks": {of: [dataclasses.asdict(item) for item in own] for of, own in measured.tasks.items()},
            }
            for model, measured in results.items()
        },
    }


def write_suite_report(folder: Path, report: dict[str, Any], suite: Suite, results: dict[str, Measured]) -> list[str]:
    """Writes suite.json, suite.md and, for a figure if matplotlib is installed, suite.png; returns the names."""
    figure = None if suite.layout == "table" else drawn("suite.png", lambda: _draw(suite, results))
    write_json(folder / "suite.json", report)
    write_text(folder / "suite.md", _markdown(report, has_figure=figure is not None))
    if figure is None:
        return list(NAMES[:2])
    write_bytes(folder / "suite.png", figure)
    return list(NAMES)


def _draw(suite: Suite, results: dict[str, Measured]) -> bytes:
    from refreshkv.evaluation.perplexity.figure import draw_ratios, draw_strides  # needs matplotlib

    if suite.layout == "strides":
        return draw_strides({model: _figure_lines(own.strides) for model, own in results.items()})
    return draw_ratios(
        {f"{model}, {corpus}": item for model, own in results.items() for corpus, item in own.evaluations.items()}
    )


def suite_table(report: dict[str, Any]) -> str:
    """The tables in aligned columns for a terminal, and the differences from the paper below."""
    texts = []
    for title, lines in [*report["tables"].items(), *_cost_tables(report)]:
        texts.append(f"{title}\n{column_table(lines)}")
    return "\n\n".join([*texts, "\n".join(_notes(report))])


def _tables(suite: Suite, results: dict[str, Measured]) -> dict[str, list[list[str]]]:
    """Title -> header and lines: one table for each model, or one table that compares the models."""
    if suite.models:
        return {", ".join(results): _table(suite, results, None)}
    return {model: _table(suite, results, model) for model in results}


def _table(suite: Suite, results: dict[str, Measured], model: str | None) -> list[list[str]]:
    """Each column as measured, and beside it the numbers of the paper's models."""
    papers = [name for name in suite.paper.numbers if _any_number(suite, name)]
    papers = papers or list(suite.paper.numbers)[:1]
    beside = [f"paper, {name}" if len(papers) > 1 else "paper" for name in papers]
    titles = [_title(title, column.sources, results) for title, column in suite.columns.items()]
    table = [["", *(head for title in titles for head in (title, *beside))]]
    for label, own_line in suite.rows.items():
        cells = [label]
        for title, column in suite.columns.items():
            name = own_line.model or column.model or model
            assert name is not None  # `Suite` has checked it
            measured = results[name]
            own = _figure(column, measured.figures.get(label, {}))
            digits = DIGITS[column.value]
            cells.append(NOT_MEASURED if own is None else f"{own:,.{digits}f}")
            cells += [_printed(suite, paper, label, title) for paper in papers]
        table.append(cells)
    return table


def _figure(column: Column, figures: dict[str, dict[str, float | None]]) -> float | None:
    """A cell of the column from a line's figures by corpus or benchmark; None if it was not measured."""
    found = [figures.get(of, {}).get(column.value) for of in column.sources]
    measured = [value for value in found if value is not None]
    return fmean(measured) if measured and len(measured) == len(found) else None


def _title(title: str, sources: list[str], results: dict[str, Measured]) -> str:
    """The column's title, which says when its tasks run on substitutes."""
    tasks = [task for measured in results.values() for of in sources for task in measured.tasks.get(of, [])]
    on_substitutes = any(task.substitutes for task in tasks)
    return f"{title}-substitute" if on_substitutes else title


def _costs(measured: Measured) -> list[list[str]]:
    """A header; then seconds of one sequence or example, and memory, for each table line and corpus or benchmark."""
    table = [["", "on", *COSTS]]
    for line, own in measured.figures.items():
        for of, figures in own.items():
            cells = [NOT_MEASURED if figures[c] is None else f"{figures[c]:,.{DIGITS[c]}f}" for c in COSTS]
            table.append([line, of, *cells])
    return table


def _cost_tables(report: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """The cost tables of the models for which any cost was measured."""
    tables = [(f"time of one row or example, and memory: {model}", table) for model, table in report["costs"].items()]
    return [(title, table) for title, table in tables if any(set(line[2:]) != {NOT_MEASURED} for line in table[1:])]


def _stride_tables(report: dict[str, Any], model: str) -> list[tuple[str, list[list[str]]]]:
    """A table of decoding steps per full step, a line for each layer; no table if no strategy refreshes."""
    columns = _figure_lines(report["results"][model]["effective strides"])
    layers = sorted({layer for own in columns.values() for layer in own}, key=int)
    table = [["layer", *columns]]
    for layer in layers:
        cells = [own.get(layer) for own in columns.values()]
        table.append([str(layer), *(NOT_MEASURED if cell is None else f"{cell:.1f}" for cell in cells)])
    return [(f"effective stride of each layer: {model}", table)] if layers else []


def _printed(suite: Suite, model: str, line: str, column: str) -> str:
    """The paper's number, as text."""
    numbers = suite.paper.numbers[model].get(line, {})
    if column not in numbers:
        return NOT_MEASURED
    return UNKNOWN if numbers[column] is None else f"{numbers[column]:,g}"


def _any_number(suite: Suite, model: str) -> bool:
    return any(number is not None for line in suite.paper.numbers[model].values() for number in line.values())


def _figure_lines(strides: dict[str, dict[str, dict[int, float | None]]]) -> dict[str, dict[int, float | None]]:
    """One line of the figure for each table line and each corpus or benchmark."""
    return {f"{line}, {of}": layers for line, own in strides.items() for of, layers in own.items()}


def _notes(report: dict[str, Any]) -> list[str]:
    suite = report["suite"]
    notes = [f"warning: {text}" for text in dict.fromkeys(report["warnings"])]
    notes += [f"not as in the paper: {note}" for note in report["not the paper's"]]
    notes += [f"{label}: {row['why']}" for label, row in suite["rows"].items() if row["why"]]
    if any(UNKNOWN in line for lines in report["tables"].values() for line in lines):
        notes.append(f"{UNKNOWN}: not available offline; who has the paper writes it under numbers in {report['file']}")
    for model, lines in suite["paper"]["numbers"].items():
        if not any(number is not None for line in lines.values() for number in line.values()):
            notes.append(f"{model}: none of the paper's numbers is available offline")
    blank = [column for column in suite["columns"].values() if column["value"] in ("seconds", "cache MiB")]
    if (
        any(isinstance(column["of"], str) and column["of"] in suite["corpora"] for column in blank)
        and not report["settings"]["decode"]
    ):
        notes.append("seconds and MiB are of rows decoded token by token, else -: --decode measures them for all")
    return notes


def _markdown(report: dict[str, Any], has_figure: bool) -> str:
    suite = report["suite"]
    parts = [f"# {suite['title']}", suite["about"].strip(), f"**What is certain.** {suite['reading'].strip()}"]
    strides = [table for model in report["models"] for table in _stride_tables(report, model)]
    for title, lines in [*report["tables"].items(), *_cost_tables(report), *strides]:
        parts += [f"## {title}", markdown_table(lines)]
    parts.append("\n".join(f"- {note}" for note in _notes(report)))
    if has_figure:
        parts.append("![The figure](suite.png)")
    parts.append(f"The paper's numbers: {suite['paper']['source'].strip()}")
    models = ", ".join(f"{name} is {path}" for name, path in report["models"].items())
    details = {"models": models, **report["settings"], "hardware": report["hardware"], "date": report["date"]}
    parts += ["\n".join(f"- {key}: {value}" for key, value in details.items()), f"```\n{report['command']}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"
