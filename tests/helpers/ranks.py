"""Processes of one job without a launcher, forked from a server that has imported everything once.

A launcher's ranks import torch and DeepSpeed each, which takes longer than what most tests run.
"""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.helpers.jobs import ROOT, free_port

PRELOADED = [
    "deepspeed",
    "deepspeed.runtime.sequence_parallel.ulysses_sp",
    "refreshkv.train.loop",
    "refreshkv.train.export",
    "refreshkv.train.experiment.report",
    "refreshkv.evaluation.commands",
    "tests.helpers.models",
]


def _context() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the server takes over the environment it is started in
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _as_rank(rank: int, world: int, port: int, log: str, folder: str, function: Callable, arguments: tuple) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


class Ranks:
    """A running job of `world` processes that each call `function(*arguments)`; what they print goes to `log`."""

    def __init__(self, world: int, log: Path, function: Callable, *arguments: Any):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        self.log, port, context = log, free_port(), _context()
        self.processes = [
            context.Process(target=_as_rank, args=(rank, world, port, str(log), str(log.parent), function, arguments))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 200) -> list[int | None]:
        """Exit codes of all ranks, -9 for one that was killed; those still running after `timeout` seconds are."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to all that still run."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to one rank, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    @property
    def printed(self) -> str:
        """What all ranks have printed so far."""
        return self.log.read_text()


def run_script(arguments: list[str], script: str = "launch/train.py") -> None:
    """A script of `launch/` in this process, as if from the command line; exits with its code."""
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run_ranks(world: int, log: Path, function: Callable, *arguments: Any) -> str:
    """Runs a job to its end; what it printed. Fails the test if a rank fails."""
    ranks = Ranks(world, log, function, *arguments)
    codes = ranks.wait()
    assert codes == [0] * world, f"exit codes {codes}\n{ranks.printed}"
    return ranks.printed
