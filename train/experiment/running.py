"""Runs the jobs of an experiment, several at a time, each on its own devices, until all are done or time is up."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from refreshkv.cli import PARENT
from refreshkv.reading import refuse_special_files
from refreshkv.settings import SettingsError
from refreshkv.train.experiment.jobs import Job

POLL = 0.2
"""Seconds between two looks at the running jobs."""
PATIENCE = 60.0
"""Seconds that training runs have to save a checkpoint and exit when time is up."""


@dataclass
class Outcome:
    """Names of the jobs that are done, failed, and left."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, Path] = field(default_factory=dict)
    """Name -> log."""
    left: list[str] = field(default_factory=list)
    """Interrupted, or not started."""


class RunningJob:
    """A job whose commands are running, one after another."""

    def __init__(self, job: Job, slots: list[int], devices: list[str], launch: Path, log: Path):
        self.job, self.slots, self.log = job, slots, log
        self._devices, self._launch = devices, launch
        self._todo = [command for command in job.commands if not command.finished]
        self._processes: list[subprocess.Popen] = []
        self.failed = False

    def advance(self) -> bool:
        """Starts the next command if none is running. Returns whether the job has ended, done or failed."""
        codes = [process.poll() for process in self._processes]
        if any(codes):  # one failed process ends the others
            self.stop()
            self.failed = True
            return True
        if any(code is None for code in codes):
            return False
        if self._processes and not self._todo[0].finished:
            self.failed = True
            return True
        self._todo = self._todo[1:] if self._processes else self._todo
        self._processes = self._start() if self._todo else []
        return not self._todo

    def _start(self) -> list[subprocess.Popen]:
        command = self._todo[0]
        line = command.line(self._launch)
        devices = command.devices(self._devices)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(line)}\n")
            log.flush()
            return [
                subprocess.Popen(line, stdout=log, stderr=log, env=environment, start_new_session=True)
                for environment in _environments(devices)
            ]

    def ask_to_stop(self) -> None:
        """Sends SIGTERM: training runs save a checkpoint and exit, other commands end."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def stop(self, end: float = 0.0) -> None:
        """Waits for the processes until the time `end` (of `time.monotonic`), then kills those left."""
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            except ProcessLookupError:
                pass
            process.wait()


def run_jobs(
    jobs: list[Job], devices: list[str], launch: Path, logs: Path, seconds: float, on_done: Callable[[Job], None]
) -> Outcome:
    """Runs each job once the jobs that it needs are done and its devices are free.

    Jobs for all devices wait until all are free; jobs for none run beside the others.

    Args:
        devices: CUDA device numbers, "" without GPUs; one job at a time for each. A number may come several times.
        launch: folder of the scripts.
        logs: folder of the jobs' logs.
        seconds: time after which training runs are asked to save a checkpoint and exit.
        on_done: called with each job that is done.

    Raises `SettingsError`, before any job starts, if the place of a log is taken by what is no file.
    """
    _validate_logs(jobs, logs)
    outcome, waiting, running = Outcome(), list(jobs), []
    end = time.monotonic() + seconds
    with tqdm(total=len(jobs), unit=" jobs") as bar:
        try:
            while (waiting or running) and time.monotonic() < end:
                waiting = _start_ready(waiting, running, outcome, devices, launch, logs)
                for active in [active for active in running if active.advance()]:
                    running.remove(active)
                    if active.failed:
                        outcome.failed[active.job.name] = active.log
                    else:
                        outcome.done.append(active.job.name)
                        on_done(active.job)
                    bar.update()
                bar.set_description(", ".join(active.job.name for active in running), refresh=False)
                if not running and not _ready(waiting, outcome):
                    break
                time.sleep(POLL)
        finally:
            with undisturbed():
                for active in running:
                    active.ask_to_stop()
                patience = time.monotonic() + PATIENCE
                for active in running:
                    active.stop(patience)
    outcome.left = [job.name for job in waiting] + [active.job.name for active in running]
    return outcome


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Treats SIGTERM as Ctrl-C, so that running jobs are asked to save and exit, and do not run on alone."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores SIGTERM and Ctrl-C inside the block."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ready(waiting: list[Job], outcome: Outcome) -> list[Job]:
    return [job for job in waiting if all(need in outcome.done for need in job.needs)]


def _start_ready(
    waiting: list[Job], running: list[RunningJob], outcome: Outcome, devices: list[str], launch: Path, logs: Path
) -> list[Job]:
    """Starts the jobs that can start, in order, and adds them to `running`; returns the jobs that still wait."""
    # without GPUs a slot is a share of the cores, which every job takes
    wanted = {
        "none": 0 if any(devices) else 1,
        "one": 1,
        "all": len(devices),
    }
    is_held_up = False
    for job in _ready(waiting, outcome):
        free = [slot for slot in range(len(devices)) if not any(slot in active.slots for active in running)]
        count = wanted[job.devices]
        # no job for a device overtakes another: one for all devices would wait for ever
        is_held_up = is_held_up or len(free) < count
        if is_held_up and count > 0:
            continue
        own = free[:count]
        given = list(dict.fromkeys(devices[slot] for slot in own))
        running.append(RunningJob(job, own, given, launch, _log_file(job, logs)))
        waiting = [other for other in waiting if other is not job]
    return waiting


def _log_file(job: Job, logs: Path) -> Path:
    return logs / f"{job.name.replace('/', '-').replace(' ', '-')}.log"


def _validate_logs(jobs: list[Job], logs: Path) -> None:
    """Refuses folders, pipes and devices: opening a pipe would wait for a reader."""
    for log in (_log_file(job, logs) for job in jobs):
        refuse_special_files(log, "output")
        if log.is_dir():
            raise SettingsError(f"output: {log} is a folder, and a job writes its log there: move it away")


def _environments(devices: list[str]) -> list[dict[str, str]]:
    """The environment of each process of a command: its visible devices and its rank."""
    common = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices), PARENT: str(os.getpid())}
    if len(devices) <= 1:
        return [common]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(len(devices)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, **group, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(len(devices))]
