"""What benchmarks make of their results: files and plots."""

from pathlib import Path
from types import ModuleType

from refreshkv.files import write_json


def save(folder: Path | None, name: str, results: object) -> None:
    """Writes results as JSON into a folder, which is made; nothing without one."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, results, indent=1)


def pyplot() -> ModuleType:
    """matplotlib's, for files only; imported where it is needed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
