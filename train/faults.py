"""What ends a job early: a request to stop, a process that died or hangs, a full disk; each with one line that says so.

Every way out leaves the last good checkpoint as it was. Exit codes: `STOPPED` after a request, `FAILED` otherwise.
"""

import errno
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from refreshkv.settings import SettingsError

STOPPED = 75
"""Exit code after SIGTERM or SIGUSR1: everything is saved, `--resume` goes on (EX_TEMPFAIL of sysexits.h)."""
FAILED = 3
"""Exit code of a job that could not go on; `--resume` continues from the last good checkpoint."""

FAILURE_FILE = "failure.txt"
"""Holds a failed job's message. The process that makes it is the one that prints."""

LOST = ("closed by peer", "reset by peer", "broken pipe", "socket closed", "read error", "remote process exited")
LATE = ("timed out", "timeout")
"""Words by which torch's backends tell that another process is gone, or does not answer."""


class StopRequest:
    """Remembers SIGTERM and SIGUSR1 instead of dying of them: `with StopRequest() as stop`."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, device: torch.device) -> str | None:
        """The signal's name if any rank has received one, the same on all ranks; call on all of them."""
        number = torch.tensor(float(self.received), device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Watchdog:
    """`with Watchdog(...) as watchdog` ends this process if `note` is not called for `timeout` seconds.

    Each process has its own, so that a job ends everywhere within that time, also on machines that see no other.
    """

    def __init__(self, timeout: float, output: Path):
        self.timeout, self.output = timeout, output
        self._seen, self._doing = time.monotonic(), "the start"
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def note(self, doing: str) -> None:
        """There is progress; from here on the process works on `doing`."""
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
    """Ends this process at once with `FAILED`; the first process of the job to get here prints the message.

    trace: a file for the stacks of all threads. Nothing is waited for: other processes may never answer.
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
    """Prints `problem` and what is left, unless another process of the job already has."""
    from refreshkv.train.checkpoint import finished_checkpoints

    finished = finished_checkpoints(output)
    left = f"the last good checkpoint is {finished[-1]}; continue with --resume" if finished else "no checkpoint yet"
    message = f"error: {problem}; {left}"
    try:
        with (output / FAILURE_FILE).open("x") as file:
            file.write(f"{message}\n")
    except FileExistsError:
        return
    except OSError:
        pass  # such as a full disk: then several processes may say it
    print(f"\n{message}", file=sys.stderr, flush=True)  # a progress bar may stand on the line


@contextmanager
def named(output: Path) -> Iterator[None]:
    """Turns what a machine or another process did into one line and an exit code, at once; other errors go through."""
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
    """What happened, in words for the user; None for an error of ours."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, torch.OutOfMemoryError):
        return "not enough GPU memory: see what is needed with --dry-run, and which setting to change"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({error}): free space, or lower training.keep_checkpoints"
    if isinstance(error, WriteFailed):
        return str(error)
    if isinstance(error, RuntimeError) and any(word in lower for word in LOST):
        return "another process of the job has ended; what it printed, if anything, stands above"
    if isinstance(error, (RuntimeError, dist.DistError)) and any(word in lower for word in LATE):
        return f"another process of the job does not answer (training.timeout): {text[:200]}"
    return None


class WriteFailed(RuntimeError):
    """A checkpoint could not be written; what was there before stands."""
