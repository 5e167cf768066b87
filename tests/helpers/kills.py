"""Scripts of `launch/` that are killed at a given moment, in processes forked from a server that has imported all.

A moment is the number of an event: a file opened for writing, renamed, removed or cut, a folder made or removed, below
one folder, by any process of the job. Most of what a kill can break lies between two of them.
"""

import itertools
import mmap
import os
import random
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from refreshkv.train.faults import FAILED
from tests.helpers.ranks import Ranks, run_script

NAMED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}
NUMBERS = itertools.count()
LONGEST_DELAY = 0.03
"""Most seconds between the event and the kill, drawn anew for each: writing goes on meanwhile."""


def run_counted(folder: str, counts: str, moment: int, delay: float, script: str, arguments: list[str]) -> None:
    """`launch/SCRIPT`; counts the events below `folder` in the file `counts`, and kills itself at number `moment`."""
    with open(counts, "r+b") as file:
        counter = mmap.mmap(file.fileno(), 8)
    process = os.getpid()

    def hook(event: str, values: tuple) -> None:
        if not _is_event(event, values, folder):
            return
        number = struct.unpack("q", counter[:8])[0] + 1
        counter[:8] = struct.pack("q", number)
        if number == moment:
            _kill(process, delay)

    sys.addaudithook(hook)
    if script == "launch/experiment.py":
        import refreshkv.train.experiment.running as running

        running.subprocess = _Forking  # starting Python anew would take most of the test's time
        running.POLL = 0.02
    run_script(arguments, script)


def _is_event(event: str, values: tuple, folder: str) -> bool:
    if event == "open":
        writes = isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes) and str(values[0]).startswith(folder)
    # shutil.rmtree removes names relative to an open folder
    is_relative = event in ("os.remove", "os.rmdir") and values[-1] not in (None, -1)
    return event in NAMED and (is_relative or str(values[0]).startswith(folder))


def _kill(process: int, delay: float) -> None:
    def end() -> None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)  # a script of an experiment

    if delay:
        threading.Thread(target=end).start()
    else:
        end()


class _Forked:
    """In place of `subprocess.Popen`: the script in a fork of this process."""

    def __init__(self, line, stdout, stderr, env, start_new_session):
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                os.environ.clear()
                os.environ.update(env)
                sys.argv = line[1:]
                runpy.run_path(line[1], run_name="__main__")
                code = 0
            except SystemExit as ended:
                code = ended.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


class _Forking:
    """In place of the module `subprocess`."""

    Popen, TimeoutExpired = _Forked, subprocess.TimeoutExpired


class Command:
    """A script with its arguments, on `ranks` ranks, whose files lie below `folder`."""

    def __init__(self, folder: Path, script: str, *arguments: object, ranks: int = 1):
        self.folder, self.script, self.ranks = folder, script, ranks
        self.arguments = [str(argument) for argument in arguments]

    def run(self, moment: int = 0, delay: float = 0.0) -> tuple[list[int | None], int, str]:
        """Runs it until it ends, or until the event `moment`: exit codes, the number of events, what was printed.

        When one process is killed, all others of the job are killed at once.
        """
        beside = self.folder.with_name(f"{self.folder.name}-run-{next(NUMBERS)}")
        beside.mkdir()
        counts = beside / "counts"
        counts.write_bytes(bytes(8))
        given = (f"{self.folder}/", str(counts), moment, delay, f"launch/{self.script}.py", self.arguments)
        job = Ranks(self.ranks, beside / "printed.txt", run_counted, *given)
        while all(process.is_alive() for process in job.processes):
            time.sleep(0.002)
        if any(process.exitcode not in (None, 0) for process in job.processes):
            job.kill()
        codes = job.wait(300)
        return codes, struct.unpack("q", counts.read_bytes())[0], job.printed

    def finish(self) -> int:
        """Runs it to its end; returns the number of events."""
        codes, events, printed = self.run()
        assert codes == [0] * self.ranks, printed
        return events

    def kill(self, events: int, draw: random.Random) -> bool:
        """Runs it and kills it at one of its `events`, or soon after. Returns False if it ended before."""
        moment, delay = draw.randint(1, events), draw.choice([0.0, LONGEST_DELAY * draw.random()])
        codes, _, printed = self.run(moment, delay)
        assert codes == [0] * self.ranks or set(codes) <= {-signal.SIGKILL, 0, FAILED}, printed
        return -signal.SIGKILL in codes
