"""Runs the pieces of an experiment, several at a time, each on devices of its own, until all are done or time is up."""

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

from refreshkv.train.experiment.pieces import Piece

PATIENCE = 60.0
"""Seconds that a training run has to save and leave when time is up."""


@dataclass
class Outcome:
    """What became of the pieces."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, Path] = field(default_factory=dict)
    """Name -> log."""
    left: list[str] = field(default_factory=list)
    """Interrupted, or not begun."""


class Job:
    """A piece under way."""

    def __init__(self, piece: Piece, slots: list[int], devices: list[str], launch: Path, log: Path):
        self.piece, self.slots, self.log = piece, slots, log
        self._devices, self._launch = devices, launch
        self._todo = [command for command in piece.commands if not command.finished]
        self._processes: list[subprocess.Popen] = []
        self.failed = False

    def advance(self) -> bool:
        """Starts the next command if none is running; whether the piece is over, done or failed."""
        codes = [process.poll() for process in self._processes]
        if any(codes):  # one that failed takes the others with it
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
        """Training runs save and leave; the rest ends."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def stop(self, end: float = 0.0) -> None:
        """Waits for what is running until the time `end`, and ends it."""
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
            except ProcessLookupError:
                pass
            process.wait()


def run_pieces(
    pieces: list[Piece], devices: list[str], launch: Path, logs: Path, seconds: float, on_done: Callable[[Piece], None]
) -> Outcome:
    """Runs pieces as devices are free and what they need is done; those of all devices when all are, and those of none
    beside them.

    Args:
        devices: CUDA device numbers, "" for none: as many pieces run at a time. One may stand there several times.
        launch: folder of the scripts.
        logs: folder of each piece's log.
        seconds: after which runs are asked to save and leave.
        on_done: called with each piece that has finished.
    """
    outcome, waiting, running = Outcome(), list(pieces), []
    end = time.monotonic() + seconds
    with tqdm(total=len(pieces), unit=" pieces") as bar:
        try:
            while (waiting or running) and time.monotonic() < end:
                waiting = _start_ready(waiting, running, outcome, devices, launch, logs)
                for job in [job for job in running if job.advance()]:
                    running.remove(job)
                    if job.failed:
                        outcome.failed[job.piece.name] = job.log
                    else:
                        outcome.done.append(job.piece.name)
                        on_done(job.piece)
                    bar.update()
                bar.set_description(", ".join(job.piece.name for job in running), refresh=False)
                if not running and not _ready(waiting, outcome):
                    break
                time.sleep(0.2)
        finally:
            with undisturbed():
                for job in running:
                    job.ask_to_stop()
                patience = time.monotonic() + PATIENCE
                for job in running:
                    job.stop(patience)
    outcome.left = [piece.name for piece in waiting] + [job.piece.name for job in running]
    return outcome


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM as if it were Ctrl-C: what runs is asked to save and leave, and does not go on alone."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Neither SIGTERM nor Ctrl-C until it is over."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ready(waiting: list[Piece], outcome: Outcome) -> list[Piece]:
    return [piece for piece in waiting if all(need in outcome.done for need in piece.needs)]


def _start_ready(
    waiting: list[Piece], running: list[Job], outcome: Outcome, devices: list[str], launch: Path, logs: Path
) -> list[Piece]:
    """Starts what can be started, in order; returns what still waits. Changes `running`."""
    wanted = {"none": 0 if any(devices) else 1, "one": 1, "all": len(devices)}  # without GPUs the slots are the cores'
    is_held_up = False
    for piece in _ready(waiting, outcome):
        free = [slot for slot in range(len(devices)) if not any(slot in job.slots for job in running)]
        count = wanted[piece.devices]
        # nothing that wants a device overtakes another, or a piece for all of them would wait for ever
        is_held_up = is_held_up or len(free) < count
        if is_held_up and count > 0:
            continue
        own = free[:count]
        log = logs / f"{piece.name.replace('/', '-').replace(' ', '-')}.log"
        running.append(Job(piece, own, list(dict.fromkeys(devices[slot] for slot in own)), launch, log))
        waiting = [other for other in waiting if other is not piece]
    return waiting


def _environments(devices: list[str]) -> list[dict[str, str]]:
    """One for each process of a command: which devices it sees, and its place among the others."""
    common = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
    if len(devices) <= 1:
        return [common]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(len(devices)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, **group, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(len(devices))]
