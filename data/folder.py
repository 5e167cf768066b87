"""The folder of prepared rows: complete, or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refreshkv.files import FolderKind, complete_folder, validate_target
from refreshkv.settings import SettingsError

INFO_FILE = "rows.json"
"""Marks a folder as prepared rows, and describes them."""

SPLITS = ("train", "validation", "test")
TOKENIZER_FOLDER = "tokenizer"

PREPARED = FolderKind(
    setting="data.folder",
    writer="preparation",
    content="prepared rows",
    mark=INFO_FILE,
    lock_file=".preparing",
    is_complete=lambda folder: (folder / INFO_FILE).is_file(),
    error=SettingsError,
)


@contextmanager
def rows_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an error (`complete_folder`).

    An existing `target` is replaced only with `overwrite`, and only if it holds prepared rows. Raises `SettingsError`
    otherwise.
    """
    validate_target(target, PREPARED, overwrite)
    with complete_folder(target, PREPARED) as folder:
        yield folder
