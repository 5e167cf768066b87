"""A checkpoint's manifest: the size and checksum of each of its files, written last and checked before loading."""

import stat
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from refreshkv.checksums import content_checksum
from refreshkv.errors import SettingsError
from refreshkv.files import flush_to_disk, write_json
from refreshkv.reading import read_own_json

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path, rank: int = 0, world: int = 1) -> None:
    """Forces the files below `folder` to the disk and writes their manifest.

    All ranks call it together, and each handles its share of the files.
    """
    entries = {}
    for file in _files(folder)[rank::world]:
        flush_to_disk(file)
        entries[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "xxh3_128": content_checksum(file)}
    shares = gather(entries, world)
    if rank == 0:
        whole = {name: entry for share in shares for name, entry in sorted(share.items())}
        write_json(folder / MANIFEST_FILE, {"files": whole}, indent=1, durable=True)


def find_damage(folder: Path, rank: int = 0, world: int = 1, only: tuple[str, ...] | None = None) -> str | None:
    """The first damage of a checkpoint, the same text on all ranks; None if every file is as it was written.

    A file that could be loaded and that the manifest does not list is damage, too. All ranks call it together, and each
    reads its share of the files. only: look at these files and no others.
    """
    try:
        entries = read_own_json(folder / MANIFEST_FILE, "its manifest")["files"]
        names = sorted(entries if only is None else only)
        problems = [_damage(folder / name, entries[name]) for name in names[rank::world]]
        if only is None:
            problems += [f"{name} is not in its {MANIFEST_FILE}" for name in unlisted_files(folder, entries)]
    except KeyError as error:
        problems = [f"{error.args[0]} is not in its {MANIFEST_FILE}"]
    except SettingsError as error:
        problems = [str(error)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problems = [f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"]
    found = [problem for share in gather(problems, world) for problem in share if problem]
    return found[0] if found else None


def unlisted_files(folder: Path, entries: Collection[str]) -> list[str]:
    """Files that DeepSpeed or transformers would load and that are not among the manifest's entries."""
    loaded = [*folder.glob("*.pt"), *(file for file in (folder / "model").rglob("*") if not file.is_dir())]
    names = (file.relative_to(folder).as_posix() for file in loaded)
    return sorted(name for name in names if name not in entries)


def _damage(file: Path, entry: dict) -> str | None:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for a writer, without end
            return f"{file.name} is a folder, a pipe or a device, not a file"
        size = status.st_size
        if size != entry["bytes"]:
            return f"{file.name} has {size:,} bytes instead of {entry['bytes']:,}"
        return None if content_checksum(file) == entry["xxh3_128"] else f"the checksum of {file.name} is wrong"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_FILE)


def gather(share: object, world: int) -> list:
    """The shares of all ranks, in order; all call it together."""
    if world == 1:
        return [share]
    shares: list = [None] * world
    dist.all_gather_object(shares, share)
    return shares
