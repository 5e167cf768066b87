"""What all reports share: how and where they were made, the folder they go to, and figures that may be left out."""

import datetime
import functools
import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from refreshkv.folders import make_folder, validate_folder
from refreshkv.reading import read_own_json
from refreshkv.settings import SettingsError

ROWS_FILE = "rows.jsonl"
"""In a report's folder: the finished sequences of a perplexity."""
EXAMPLES_FILE = "examples.jsonl"
"""In a report's folder: the finished examples of tasks, with every answer."""
HOLDS = {
    "config.json": "a model",
    "rows.json": "prepared sequences",
    "source.json": "what was fetched",
    "run.yaml": "a training run",
    "manifest.json": "a checkpoint",
    "store.json": "a prompt store",
}
"""Files that say what a folder is: reports do not go there."""
LIBRARIES = ("refreshkv", "torch", "transformers", "datasets")


def provenance(command: str) -> dict[str, Any]:
    """How and where a report was made: the command, the date, the libraries' versions and the hardware."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES},
        },
        "hardware": hardware(),
    }


def hardware() -> str:
    """The GPUs, or the CPU, that torch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def open_output(folder: str | Path, names: tuple[str, ...], overwrite: bool, resume: bool = False) -> Path:
    """Creates a report's folder before the work begins, and checks that it can be written to.

    Args:
        names: the files that the evaluation writes.
        overwrite: remove those that are there.
        resume: keep them; the evaluation continues.

    Raises `SettingsError` if the folder has one of the files and neither is wanted or no evaluation has written it, if
    it holds a model, sequences or a run, or if it is not writable.
    """
    validate_folder(folder, "--output")
    folder = Path(folder)
    for name, content in HOLDS.items():
        if (folder / name).is_file():
            raise SettingsError(f"--output {folder} holds {content} ({name}): choose another folder for the report")
    existing = [name for name in names if (folder / name).exists()]
    if existing and not overwrite and not resume:
        raise SettingsError(
            f"--output {folder} already holds {existing[0]}: continue that with --resume, replace it with --overwrite, "
            "or choose another folder"
        )
    if existing and not any(_is_ours(folder / name) for name in existing):
        raise SettingsError(
            f"--output {folder} holds {existing[0]}, which no evaluation has written: move it away, or choose another "
            "folder"
        )
    make_folder(folder, "--output")
    try:
        if overwrite:
            for name in existing:
                (folder / name).unlink()
    except OSError as error:
        raise SettingsError(f"--output {folder} cannot be written to: {error.strerror or error}") from error
    return folder


def _is_ours(file: Path) -> bool:
    """Whether an evaluation has written this report, or these records; figures and tables alone do not tell."""
    if not file.is_file():
        return False
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                first = lines.readline()
            return not first.endswith("\n") or "key" in json.loads(first)
        return file.suffix == ".json" and {"command", "versions"} <= set(read_own_json(file, "--output"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def drawn(name: str, draw: Callable[[], bytes]) -> bytes | None:
    """Calls `draw`, which imports matplotlib and returns the figure as PNG.

    Without matplotlib it prints one line that says how to get the figure `name`, and returns None.
    """
    try:
        return draw()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        _say_left_out(name)
        return None


@functools.cache
def _say_left_out(name: str) -> None:
    """Prints the line once for each figure, however often its report is written."""
    print(f"{name} is left out, for matplotlib is not installed: pip install 'refreshkv[eval]'")
