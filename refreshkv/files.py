"""Files and folders that readers see complete or not at all, also after a kill or on a full disk."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

PARTIAL = ".partial"
"""How the names of unfinished files and folders end."""


@contextmanager
def atomic_file(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder; renames it to `path` when the block ends without an error.

    An error removes the temporary file and leaves an earlier `path` as it was. A killed process leaves the temporary
    file, named `.NAME.partial`, which the next writer of `path` replaces.

    durable: wait until the file and its name lie on the disk, which takes milliseconds.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, content: bytes, durable: bool = False) -> None:
    """Replaces `path` by a file with this content, atomically (`atomic_file`)."""
    with atomic_file(path, durable) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str, durable: bool = False) -> None:
    """Replaces `path` by a UTF-8 file with this text, atomically (`atomic_file`).

    Bytes of file names that are not UTF-8 are written with backslashes.
    """
    write_bytes(path, text.encode(errors="backslashreplace"), durable)


def write_json(path: str | Path, values: Any, indent: int = 2, durable: bool = False) -> None:
    """Replaces `path` by a JSON file with these plain values, atomically (`atomic_file`)."""
    write_text(path, json.dumps(values, indent=indent) + "\n", durable)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, lies on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@dataclass(frozen=True)
class FolderKind:
    """What a folder written by `complete_folder` holds, and how error messages name it."""

    setting: str
    """The setting that names the folder, such as data.folder."""
    writer: str
    """What is writing it, such as "preparation"."""
    lock_file: str
    """Marks an unfinished folder as this kind's; locked as long as its writer runs."""
    is_complete: Callable[[Path], bool]
    """Whether a folder holds a finished result of this kind."""
    error: type[Exception]
    """Raised with one line that names the setting."""


@contextmanager
def complete_folder(target: Path, kind: FolderKind) -> Iterator[Path]:
    """Yields an empty folder `TARGET.partial`; renames it to `target` when the block ends without an error.

    An error removes the unfinished folder; a killed process leaves it, and the next writer clears it. A complete
    `target` is replaced: the caller decides before whether it may be. Raises `kind.error` if another process is writing
    the folder, if `TARGET.partial` holds anything else, or if it cannot be created.
    """
    partial = target.with_name(f"{target.name}{PARTIAL}")
    lock = _claim(partial, kind)
    try:
        yield partial
        (partial / kind.lock_file).unlink()
        _replace_folder(partial, target, kind)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


def _claim(partial: Path, kind: FolderKind) -> FileLock:
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if any(partial.iterdir()) and not (partial / kind.lock_file).exists() and not kind.is_complete(partial):
            raise kind.error(f"{kind.setting}: {partial} is needed and holds other files; choose another folder")
        lock = FileLock(partial / kind.lock_file)
        lock.acquire(timeout=0)
    except Timeout:
        raise kind.error(f"{kind.setting}: another {kind.writer} is writing to {partial}; wait for it to end") from None
    except OSError as error:
        raise kind.error(f"{kind.setting}: cannot write to {partial}: {error.strerror or error}") from error
    for leftover in partial.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != kind.lock_file:
            leftover.unlink()
    return lock


def _replace_folder(partial: Path, target: Path, kind: FolderKind) -> None:
    if not kind.is_complete(target):
        os.replace(partial, target)
        return
    replaced = target.with_name(f"{target.name}.replaced")
    if kind.is_complete(replaced):
        shutil.rmtree(replaced)
    os.replace(target, replaced)
    os.replace(partial, target)
    shutil.rmtree(replaced)
