"""The folder of prepared rows: complete, or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refreshkv.files import FolderKind, complete_folder
from refreshkv.folders import validate_folder
from refreshkv.settings import SettingsError

INFO_FILE = "rows.json"
"""Marks a folder as prepared rows, and describes them."""

SPLITS = ("train", "validation", "test")
TOKENIZER_FOLDER = "tokenizer"

PREPARED = FolderKind(
    setting="data.folder",
    writer="preparation",
    lock_file=".preparing",
    is_complete=lambda folder: (folder / INFO_FILE).exists(),
    error=SettingsError,
)


@contextmanager
def rows_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an error (`complete_folder`).

    An existing `target` is replaced only with `overwrite`, and only if it holds prepared rows. Raises `SettingsError`
    otherwise.
    """
    _validate_target(target, overwrite)
    with complete_folder(target, PREPARED) as folder:
        yield folder


def _validate_target(target: Path, overwrite: bool) -> None:
    validate_folder(target, "data.folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / INFO_FILE).is_file():
        raise SettingsError(
            f"data.folder={target} exists and holds no prepared rows (no {INFO_FILE} in it); choose another folder"
        )
    if not overwrite:
        raise SettingsError(
            f"data.folder={target} already holds rows; choose another folder, or replace them: --overwrite"
        )
