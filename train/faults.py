"""Ends a job that cannot go on: a process died or hangs, a disk is full. One process prints one line that says so.

The last good checkpoint stays as it was. The exit code is `FAILED`.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from refreshkv.machine import is_full_disk
from refreshkv.settings import SettingsError
from refreshkv.train.run_folder import FAILURE_FILE, finished_checkpoints

FAILED = 3
"""Exit code of a job that could not go on; `--resume` continues from the last good checkpoint."""

LOST = ("closed by peer", "reset by peer", "broken pipe", "socket closed", "read error", "remote process exited")
"""Words in the errors of torch's backends when another process is gone."""
LATE = ("timed out", "timeout")
"""Words in their errors when another process does not answer."""


class Watchdog:
    """`with Watchdog(...) as watchdog` ends this process if `note` is not called for `timeout` seconds.

    Every process has one of its own, so that a job ends within that time on every machine, whether the machines can
    still reach each other or not.
    """

    def __init__(self, timeout: float, output: Path):
        self.timeout, self.output = timeout, output
        self._seen, self._doing = time.monotonic(), "the start"
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def note(self, doing: str) -> None:
        """Reports progress: the process works on `doing` now. An error message names it."""
        self._seen, self._doing = time.monotonic(), doing

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self._seen > self.timeout:
                rank = os.environ.get("RANK", "0")
                trace = self.output / f"stuck-rank-{rank}.txt"
                end(
                    self.output,
                    f"no progress for {self.timeout:g} s (training.timeout) in {self._doing}: a process hangs; where "
                    f"each one was is in {trace.with_name('stuck-rank-*.txt')}",
                    trace,
                )


def end(output: Path, problem: str, trace: Path | None = None) -> None:
    """Ends this process at once with `FAILED`; the first process of the job that comes here prints the message.

    It waits for no other process, since those may never answer. trace: a file for the stacks of all threads.
    """
    try:
        announce(output, problem)
        if trace is not None:
            with trace.open("w") as file:
                faulthandler.dump_traceback(file)
        sys.stdout.flush()
    finally:
        os._exit(FAILED)


def announce(output: Path, problem: str) -> None:
    """Prints `problem` and the last good checkpoint, unless another process of the job already has."""
    finished = finished_checkpoints(output)
    left = f"the last good checkpoint is {finished[-1]}; continue with --resume" if finished else "no checkpoint yet"
    message = f"error: {problem}; {left}"
    try:
        with (output / FAILURE_FILE).open("x") as file:
            file.write(f"{message}\n")
    except FileExistsError:
        return
    except OSError:
        pass  # the disk may be full: then several processes print the message
    print(f"\n{message}", file=sys.stderr, flush=True)  # a progress bar may stand on the line


@contextmanager
def reporting(output: Path) -> Iterator[None]:
    """Ends this process with one line for an error that a machine or another process caused; other errors pass."""
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        problem = _problem(error)
        if problem is None:
            raise
        end(output, problem)


def _problem(error: Exception) -> str | None:
    """The user's line for an error that a machine or another process caused; None for any other error."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, torch.OutOfMemoryError):
        return "not enough GPU memory: see what is needed with --dry-run, and which setting to change"
    if is_full_disk(error):
        return f"the disk is full ({error}): free space, or lower training.keep_checkpoints"
    if isinstance(error, WriteFailed):
        return str(error)
    if isinstance(error, RuntimeError) and any(word in lower for word in LOST):
        return "another process of the job has ended; what it printed, if anything, stands above"
    if isinstance(error, (RuntimeError, dist.DistError)) and any(word in lower for word in LATE):
        return f"another process of the job does not answer (training.timeout): {text[:200]}"
    return None


class WriteFailed(RuntimeError):
    """A checkpoint could not be written. Earlier checkpoints are untouched."""
