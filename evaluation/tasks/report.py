"""The report of an evaluation on tasks: a table for the terminal, tasks.json and tasks.md in a folder."""

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

from refreshkv.data.tasks.task import Task
from refreshkv.evaluation.costs import effective_stride
from refreshkv.evaluation.reports import EXAMPLES_FILE, provenance
from refreshkv.evaluation.strategies import Strategy
from refreshkv.evaluation.tasks.scores import TaskResult
from refreshkv.files import write_json, write_text
from refreshkv.tables import column_table, markdown_table

FILES = ("tasks.json", "tasks.md", EXAMPLES_FILE)
LAYOUT = 1
"""Version of tasks.json's layout."""


def build_task_report(
    results: list[TaskResult],
    tasks: list[Task],
    strategies: list[Strategy],
    model: str,
    settings: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """The content of tasks.json, as plain values."""
    return {
        "layout": LAYOUT,
        "model": model,
        "tasks": {
            task.label: {"settings": task.settings(), "substitutes": list(task.family.substitutes)} for task in tasks
        },
        "strategies": {strategy.name: strategy.settings for strategy in strategies},
        "settings": settings,
        **provenance(command),
        "results": [dataclasses.asdict(result) for result in results],
    }


def write_task_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes tasks.json and tasks.md, replacing earlier ones and touching nothing else in the folder."""
    write_json(folder / "tasks.json", report)
    write_text(folder / "tasks.md", _markdown(report))


def task_table(report: dict[str, Any]) -> str:
    """The strategies in aligned columns for a terminal, and the tasks' substitutes below."""
    return "\n".join([column_table(_cells(report)), *_notes(report)])


def _cells(report: dict[str, Any]) -> list[list[str]]:
    """The table's cells: a header, then scores in percent and costs of each strategy."""
    names = list(report["tasks"])
    header = ["strategy", *names, *(["mean"] if len(names) > 1 else [])]
    lines = [[*header, "seconds", "peak GiB", "cache MiB", "effective stride"]]
    for strategy in report["strategies"]:
        own = {result["task"]: result for result in report["results"] if result["decoding"] == strategy}
        scores = [own[name]["scores"]["score"] if name in own else None for name in names]
        scores += [_mean(scores)] if len(names) > 1 else []
        held = [result["cache_bytes"] for result in own.values() if result["cache_bytes"] is not None]
        peaks = [result["peak_memory"] for result in own.values() if result["peak_memory"] is not None]
        lines.append(
            [
                strategy,
                *("-" if score is None else f"{100 * score:.1f}" for score in scores),
                f"{sum(result['seconds'] for result in own.values()):,.1f}" if own else "-",
                f"{max(peaks) / 2**30:.2f}" if peaks else "-",
                f"{max(held) / 2**20:,.2f}" if held else "-",
                _stride(list(own.values())),
            ]
        )
    return lines


def _mean(scores: list[float | None]) -> float | None:
    """The mean score; None if a task has none."""
    found = [score for score in scores if score is not None]
    return fmean(found) if len(found) == len(scores) else None


def _stride(results: list[dict[str, Any]]) -> str:
    """Decoding steps per full step over all layers and tasks."""
    stride = effective_stride([s for result in results for s in (result["effective_strides"] or {}).values()])
    return "-" if stride is None else f"{stride:.1f}"


def _notes(report: dict[str, Any]) -> list[str]:
    count = report["settings"]["examples"]
    lengths = sorted({f"{entry['settings']['length']:,}" for entry in report["tasks"].values()})
    notes = [f"scores in percent; {count} examples of each task, of up to {', '.join(lengths)} tokens each"]
    if len(report["results"]) < len(report["tasks"]) * len(report["strategies"]):
        notes.append("- is not finished (--stop-after): --resume continues")
    return notes + [
        f"{label}: {', '.join(entry['substitutes'])}"
        for label, entry in report["tasks"].items()
        if entry["substitutes"]
    ]


def _markdown(report: dict[str, Any]) -> str:
    table = markdown_table(_cells(report))
    notes = "\n".join(f"- {note}" for note in _notes(report))
    command = f"```\n{report['command']}\n```"
    details = "\n".join(
        f"- {key}: {value}" for key, value in {**report["settings"], "hardware": report["hardware"]}.items()
    )
    return "\n\n".join([f"# {report['model']}", table, notes, _layers(report), details, command]) + "\n"


def _layers(report: dict[str, Any]) -> str:
    """A markdown table of each layer's effective stride, for each task and strategy that refreshes."""
    results = [result for result in report["results"] if result["effective_strides"]]
    if not results:
        return "No strategy refreshes anything."
    layers = list(results[0]["effective_strides"])
    lines = [["effective stride", *(f"layer {layer}" for layer in layers)]]
    for result in results:
        strides = [result["effective_strides"][layer] for layer in layers]
        cells = [f"{stride:.1f}" if stride else "-" for stride in strides]
        lines.append([f"{result['task']}, {result['decoding']}", *cells])
    return markdown_table(lines)
