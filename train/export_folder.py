"""The folder that an export is written to: complete or absent, and only an earlier export is ever replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refreshkv.errors import SettingsError
from refreshkv.files import FolderKind, complete_folder
from refreshkv.reading import read_own_json
from refreshkv.train.export_error import ExportError, one_line


@contextmanager
def export_folder(target: Path, checkpoint: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an error (`complete_folder`)."""
    if target == checkpoint or checkpoint in target.parents or target in checkpoint.parents:
        raise ExportError(f"OUT={target} and the checkpoint {checkpoint} lie in each other; choose another folder")
    try:
        with complete_folder(target, EXPORT, overwrite) as folder:
            yield folder
    except OSError as error:
        raise ExportError(f"OUT={target}: the export could not be written: {one_line(error)}") from error


def is_export(folder: Path) -> bool:
    """Whether `folder` holds a model that carries its refresh schedule."""
    try:
        return "refreshkv" in read_own_json(folder / "config.json", "OUT")
    except (SettingsError, TypeError):
        return False


EXPORT = FolderKind(
    setting="OUT",
    writer="export",
    lock_file=".exporting",
    is_complete=is_export,
    error=ExportError,
    absent='is no export (no config.json with "refreshkv")',
    present="already holds an export",
)
