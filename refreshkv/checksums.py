"""Facts about the content of files, kept so that large files are not read again while they stay as they are.

They are kept in the user's cache folder (REFRESHKV_CACHE, or `refreshkv` in XDG_CACHE_HOME or ~/.cache), never among
the files themselves.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from refreshkv.errors import SettingsError
from refreshkv.reading import read_own_json

CHUNK = 1 << 22
JUST_NOW = 1.0
"""Seconds. Facts about a file that changed so lately are not kept: it may change again within the clock's step."""


def digest(values: Any) -> str:
    """A hash, in hex, of JSON values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_checksum(file: Path) -> str:
    """The 128-bit xxh3, in hex, of all bytes of a file; kept (`remembered`)."""
    return remembered("xxh3_128", [file], lambda: content_checksum(file))


def remembered(kind: str, files: Iterable[Path], compute: Callable[[], Any]) -> Any:
    """What `compute` returns (JSON values) about the content of `files`, kept as long as these stay as they are.

    A file stays as it is while its path, size, inode, and times of modification and of change do. Nothing is kept about
    files that changed within the last second, nor where the cache folder cannot be written to. kind: tells several
    facts about the same files apart.
    """
    stamps = [_stamp(file) for file in files]
    place = _cache_folder() / f"{digest([kind, [stamp[0] for stamp in stamps]])}.json"
    known = _kept(place)
    if known is not None and known["stamps"] == stamps:
        return known["value"]
    value = compute()
    newest = max((max(stamp[3:]) for stamp in stamps), default=0)
    if time.time_ns() - newest > JUST_NOW * 10**9:
        _keep(place, {"stamps": stamps, "value": value})
    return value


def content_checksum(file: Path) -> str:
    """The 128-bit xxh3, in hex, of all bytes of a file, read now. It is many times faster than a disk."""
    found = xxhash.xxh3_128()
    with file.open("rb") as content:
        while block := content.read(CHUNK):
            found.update(block)
    return found.hexdigest()


def _stamp(file: Path) -> list:
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _cache_folder() -> Path:
    named = os.environ.get("REFRESHKV_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "refreshkv")


def _kept(place: Path) -> dict[str, Any] | None:
    try:
        known = read_own_json(place, "the cache folder")
    except SettingsError:
        return None
    return known if isinstance(known, dict) and known.keys() == {"stamps", "value"} else None


def _keep(place: Path, values: dict[str, Any]) -> None:
    aside = place.with_name(f"{place.name}.{os.getpid()}")  # processes may keep the same fact at the same time
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(values), encoding="utf-8")
        os.replace(aside, place)
    except OSError:  # no room, or a folder that may only be read: computed again the next time
        pass
