"""Files and folders that readers see complete or not at all, also after a kill or on a full disk."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from refreshkv.folders import named, validate_folder
from refreshkv.reading import read_own_json

PARTIAL = ".partial"
"""How the names of unfinished files and folders end."""

REMOVED = ".removed"
"""How the name of a folder ends while it is being removed; it begins with a dot."""

RECORD_FILE = ".written.json"
"""In a folder that we wrote: the list of its files, which an `--overwrite` may remove."""


@contextmanager
def atomic_file(path: str | Path, durable: bool = False, mode: int | None = None) -> Iterator[Path]:
    """Yields a temporary path in the same folder; renames it to `path` when the block ends without an error.

    An error removes the temporary file and leaves an earlier `path` as it was. A killed process leaves the temporary
    file, named `.NAME.partial`, which the next writer of `path` replaces.

    durable: wait until the file and its name lie on the disk, which takes milliseconds. mode: who may read and write
    it, such as 0o600; None for what the process's umask gives.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
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


def remove_folder(folder: Path) -> None:
    """Removes a folder that readers take for whole by its name: renames it to `.NAME.removed` first.

    A killed process thus leaves no half-removed folder under a name that counts; `clear_removed` removes the rest. If
    `folder` is a symbolic link, only the link is removed. Raises `OSError` if anything cannot be removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    aside = _aside(folder)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{REMOVED}")


def clear_removed(parent: Path) -> None:
    """Removes what a killed `remove_folder` has left in `parent`."""
    for leftover in parent.glob(f".*{REMOVED}"):
        shutil.rmtree(leftover)


def write_record(folder: Path, leave_out: Sequence[str] = ()) -> None:
    """Writes the list of all files below `folder`, with their sizes in bytes: what an `--overwrite` may remove."""
    files = {name: (folder / name).stat().st_size for name in _names_below(folder) if name not in leave_out}
    write_json(folder / RECORD_FILE, {"files": files}, indent=1)


def not_on_record(folder: Path, leave_out: Sequence[str] = ()) -> str | None:
    """What speaks against removing `folder`: the first file that we did not write, or that was changed since.

    None if all of it is ours. leave_out: names at the top of the folder that do not count.
    """
    try:
        files = read_own_json(folder / RECORD_FILE, "the record")["files"]
        recorded = {str(name): int(size) for name, size in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has no list of the files that were written there ({RECORD_FILE}), so all of it may be yours"
    for name in _names_below(folder):
        if name == RECORD_FILE or name in leave_out:
            continue
        if name not in recorded or (folder / name).is_symlink():
            return f"also holds {name}"
        if (folder / name).stat().st_size != recorded[name]:
            return f"also holds {name}, changed since it was written,"
    return None


def _names_below(folder: Path) -> list[str]:
    """The paths of all files and symbolic links below `folder`, relative to it, in order."""
    names = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(names)


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
    absent: str = "holds nothing of this kind"
    """What an error says of a folder that holds something else."""
    present: str = "is written already"
    """What an error says of a folder that holds a finished result."""


@contextmanager
def complete_folder(target: Path, kind: FolderKind, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder `TARGET.partial`; renames it to `target` when the block ends without an error.

    The finished folder lists its files in `RECORD_FILE`. An error removes the unfinished folder; a killed process
    leaves it, and the next writer clears it. Behind a symbolic link the folder that it leads to is written.

    overwrite: replace a complete `target`, if it holds nothing that is not on its list.

    Raises `kind.error` if `target` holds anything that may not be replaced, if another process is writing it, if
    `TARGET.partial` holds anything else, or if it cannot be created.
    """
    validate_folder(target, kind.setting, kind.error)
    target = Path(os.path.realpath(target))
    _validate_target(target, kind, overwrite)
    partial = target.with_name(f"{target.name}{PARTIAL}")
    lock = _claim(partial, kind)
    try:
        _finish_replacement(target)
        _validate_target(target, kind, overwrite)
        yield partial
        write_record(partial, leave_out=[kind.lock_file])
        _replace_folder(partial, target)
        (target / kind.lock_file).unlink()
    except BaseException:
        with suppress(OSError):  # it never counts, and the error that is on its way says more
            remove_folder(partial)
        raise
    finally:
        lock.release()


def _validate_target(target: Path, kind: FolderKind, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not kind.is_complete(target):
        raise kind.error(f"{named(kind.setting, target)} exists and {kind.absent}; choose another folder")
    if not overwrite:
        raise kind.error(
            f"{named(kind.setting, target)} {kind.present}; choose another folder, or replace it: --overwrite"
        )
    foreign = not_on_record(target, leave_out=[kind.lock_file])
    if foreign:
        raise kind.error(
            f"{named(kind.setting, target)} {foreign}: --overwrite would delete that; move it away first, or choose "
            "another folder"
        )


def _claim(partial: Path, kind: FolderKind) -> FileLock:
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if any(partial.iterdir()) and not (partial / kind.lock_file).exists():
            raise kind.error(f"{kind.setting}: {partial} is needed and holds other files; choose another folder")
        lock = FileLock(partial / kind.lock_file)
        lock.acquire(timeout=0)
        shutil.rmtree(_aside(partial), ignore_errors=True)
    except Timeout:
        raise kind.error(f"{kind.setting}: another {kind.writer} is writing to {partial}; wait for it to end") from None
    except OSError as error:
        raise kind.error(f"{kind.setting}: cannot write to {partial}: {error.strerror or error}") from error
    for leftover in partial.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        elif leftover.name != kind.lock_file:
            leftover.unlink()
    return lock


def _replace_folder(partial: Path, target: Path) -> None:
    """Renames `partial` to `target`. Between the two renames of a replacement the old folder is `.NAME.replaced`, from
    where `_finish_replacement` brings it back."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    replaced = _replaced(target)
    os.replace(target, replaced)
    os.replace(partial, target)
    shutil.rmtree(replaced)


def _finish_replacement(target: Path) -> None:
    """Undoes, or ends, a replacement in which an earlier writer was killed."""
    replaced = _replaced(target)
    if not replaced.exists():
        return
    if target.exists():
        shutil.rmtree(replaced)
    else:
        os.replace(replaced, target)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")
