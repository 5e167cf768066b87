"""The folder that an export is written to: complete or absent, and only an earlier export is ever replaced."""

import fnmatch
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refreshkv.files import FolderKind, complete_folder
from refreshkv.folders import validate_folder
from refreshkv.train.export_error import ExportError, one_line

WRITTEN = ("config.json", "generation_config.json", "README.md", "model*.safetensors", "model.safetensors.index.json")
"""Files that every export may hold. Those of its tokenizer come on top."""


@contextmanager
def export_folder(target: Path, checkpoint: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an error (`complete_folder`)."""
    _validate_target(target, checkpoint, overwrite)
    try:
        with complete_folder(target, EXPORT) as folder:
            yield folder
    except OSError as error:
        raise ExportError(f"OUT={target}: the export could not be written: {one_line(error)}") from error


def _validate_target(target: Path, checkpoint: Path, overwrite: bool) -> None:
    if target == checkpoint or checkpoint in target.parents or target in checkpoint.parents:
        raise ExportError(f"OUT={target} and the checkpoint {checkpoint} lie in each other; choose another folder")
    validate_folder(target, "OUT")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_export(target):
        raise ExportError(
            f'OUT={target} exists and is no export (no config.json with "refreshkv"); choose another folder'
        )
    if not overwrite:
        raise ExportError(f"OUT={target} already holds an export; choose another folder, or replace it: --overwrite")
    known = (*WRITTEN, *(file.name for file in (checkpoint / "model").iterdir()))
    for file in sorted(target.iterdir()):
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in known):
            raise ExportError(
                f"OUT={target} also holds {file.name}, which --overwrite would delete; move it away first"
            )


def is_export(folder: Path) -> bool:
    """Whether `folder` holds a model that carries its refresh schedule."""
    try:
        return "refreshkv" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


EXPORT = FolderKind(setting="OUT", writer="export", lock_file=".exporting", is_complete=is_export, error=ExportError)
