"""A folder that is either complete or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from refreshkv.settings import SettingsError

INFO_FILE = "rows.json"
"""Marks a folder as prepared rows, and says all about them."""

LOCK_FILE = ".preparing"
"""Marks a folder as a preparation, and is locked as long as that is running."""


@contextmanager
def complete_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder `target.partial`, renamed to `target` when the block has ended without an error.

    A preparation that was killed leaves only `target.partial`, and the next one clears it away. An existing `target` is
    replaced only with `overwrite`, and only if it holds prepared rows. Raises `SettingsError` otherwise.
    """
    _check_target(target, overwrite)
    partial = target.with_name(f"{target.name}.partial")
    lock = _claim(partial)
    try:
        yield partial
        (partial / LOCK_FILE).unlink()
        _put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


def _check_target(target: Path, overwrite: bool) -> None:
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


def _claim(partial: Path) -> FileLock:
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if any(partial.iterdir()) and not (partial / LOCK_FILE).exists():
            raise SettingsError(f"data.folder: {partial} is needed and holds other files; choose another folder")
        lock = FileLock(partial / LOCK_FILE)
        lock.acquire(timeout=0)
    except Timeout:
        raise SettingsError(f"data.folder: another preparation is writing to {partial}; wait for it to end") from None
    except OSError as error:
        raise SettingsError(f"data.folder: cannot write to {partial}: {error.strerror or error}") from error
    _clear(partial)
    return lock


def _clear(partial: Path) -> None:
    for leftover in partial.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != LOCK_FILE:
            leftover.unlink()


def _put_in_place(partial: Path, target: Path) -> None:
    if not (target / INFO_FILE).exists():
        os.replace(partial, target)
        return
    replaced = target.with_name(f"{target.name}.replaced")
    if (replaced / INFO_FILE).exists():
        shutil.rmtree(replaced)
    os.replace(target, replaced)
    os.replace(partial, target)
    shutil.rmtree(replaced)
