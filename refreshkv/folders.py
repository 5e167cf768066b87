"""Folders that a user names: where they are, and whether files can be written into them."""

import os
import tempfile
from pathlib import Path

from refreshkv.errors import SettingsError


def resolved(folder: str | Path, setting: str) -> Path:
    """The absolute path of a folder without links; `SettingsError` that names `setting` if its links go in circles."""
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop is a RuntimeError up to Python 3.12
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"{named(setting, folder)} cannot be used ({reason}): choose another folder") from None


def validate_folder(folder: str | Path, setting: str, kind: type[Exception] = SettingsError) -> None:
    """Raises an error of `kind` unless `folder` is a folder, or a name that one can be made with; nothing is written.

    The nearest folder above that exists must take new files.
    """
    path = resolved(folder, setting)
    try:
        nearest = path
        while not os.path.lexists(nearest) and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            reason = "it" if nearest == path else str(nearest)
            raise kind(f"{named(setting, folder)} cannot be written to: {reason} is no folder; choose another folder")
        longest = os.pathconf(nearest, "PC_NAME_MAX")
        for part in path.relative_to(nearest).parts:
            if len(os.fsencode(part)) > longest:
                raise kind(f"{named(setting, folder)} has a name of more than {longest} bytes: shorten it")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise kind(_not_writable(setting, folder, error)) from None


def make_folder(folder: str | Path, setting: str) -> Path:
    """Makes a folder, with those above it, unless it is there; checks that it takes new files. Returns its path.

    Raises `SettingsError` that names `setting` otherwise.
    """
    validate_folder(folder, setting)
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SettingsError(_not_writable(setting, folder, error)) from None
    return path


def _not_writable(setting: str, folder: str | Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{named(setting, folder)} cannot be written to: {reason}; choose another folder"


def named(setting: str, folder: str | Path) -> str:
    """A setting with its folder, as the user writes it, shortened if it is long: `--output x` or `data.folder=x`."""
    between = " " if setting.startswith("-") or " " in setting else "="
    return f"{setting}{between}{str(folder)[:200]}".replace("\0", "\\0")
