"""The folder of prepared rows: complete, or not there."""

from contextlib import AbstractContextManager
from pathlib import Path

from refreshkv.files import FolderKind, complete_folder
from refreshkv.settings import SettingsError

INFO_FILE = "rows.json"
"""Marks a folder as prepared rows, and describes them."""

SPLITS = ("train", "validation", "test")
TOKENIZER_FOLDER = "tokenizer"

PREPARED = FolderKind(
    setting="data.folder",
    writer="preparation",
    lock_file=".preparing",
    is_complete=lambda folder: (folder / INFO_FILE).is_file(),
    error=SettingsError,
    absent=f"holds no prepared rows (no {INFO_FILE} in it)",
    present="already holds rows",
)


def rows_folder(target: Path, overwrite: bool) -> AbstractContextManager[Path]:
    """An empty folder that becomes `target` when the block ends without an error (`complete_folder`).

    An existing `target` is replaced only with `overwrite`, and only if it holds prepared rows and nothing else. Raises
    `SettingsError` otherwise.
    """
    return complete_folder(target, PREPARED, overwrite)
