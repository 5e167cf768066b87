"""A lock on a run's folder: two jobs that train in one folder would write into each other's checkpoints."""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from refreshkv.folders import make_folder
from refreshkv.reading import refuse_special_files
from refreshkv.settings import SettingsError

LOCK_FILE = ".training"


@contextmanager
def locked_run(output: Path) -> Iterator[None]:
    """Makes the folder of a run and locks it until the block ends, also by a kill.

    Raises `SettingsError` if another job trains in it. A file system without locks gets a warning and no lock.
    """
    make_folder(output, "training.output")
    with _opened(output / LOCK_FILE) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"another job trains in training.output={output}: wait until it has ended, or name another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"training.output={output} cannot be locked ({error.strerror}): start no second job in it", stacklevel=3
            )
        yield


def _opened(path: Path) -> IO[str]:
    """Opens or makes the file; `SettingsError` if that fails, or if it is a pipe, for which opening would wait."""
    refuse_special_files(path, "training.output")
    try:
        return path.open("a")
    except OSError as error:
        raise SettingsError(
            f"training.output: {path} cannot be opened ({error.strerror}): name another folder"
        ) from error


def validate_unlocked(output: Path) -> None:
    """Raises `SettingsError` if another job trains in `output`; writes nothing."""
    if os.path.isfile(output / LOCK_FILE):  # false, too, for a name that is too long
        with locked_run(output):
            pass
