"""What benchmarks make of their results: aligned tables, files, plots."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType


def in_columns(lines: Iterable[Sequence[str]]) -> str:
    """Lines of as many cells each, as text: every column as wide as its widest cell."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def save(folder: Path | None, name: str, results: object) -> None:
    """Writes results as JSON into a folder, which is made; nothing without one."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(results, indent=1))


def pyplot() -> ModuleType:
    """matplotlib's, for files only; imported where it is needed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
