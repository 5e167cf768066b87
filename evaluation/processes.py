"""Several processes that share one evaluation: each computes some of the sequences and examples, the first one writes.

    torchrun --nproc-per-node 2 launch/evaluate.py ...        or        accelerate launch launch/evaluate.py ...

Every process loads the whole model on a device of its own. They work in turns: in each turn every process computes one
batch, then all get the records of all. Batches and their order are those of one process, and so are the numbers.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from refreshkv.machine import machine_problem
from refreshkv.settings import SettingsError

LONGEST_TURN = timedelta(days=7)
"""Most time that a process waits for the others' batches."""

Job = TypeVar("Job")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Processes:
    """This process among those of an evaluation."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Its number among the processes on this machine."""
    local_world: int = 1
    """How many processes are on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def launcher(self) -> list[str]:
        """The words before the script in the command line that a report repeats."""
        return ["python"] if self.world == 1 else ["torchrun", "--nproc-per-node", str(self.local_world)]

    def from_first(self, make: Callable[[], Found]) -> Found:
        """Calls `make` in the first process only; returns what it gave, or raises its `SettingsError`, in all."""
        if self.world == 1:
            return make()
        answers: list = [_attempt(make) if self.is_first else None]
        dist.broadcast_object_list(answers, src=0)
        return _result(answers[0])

    def from_all(self, make: Callable[[], Found]) -> list[Found]:
        """Calls `make` in every process; returns what each gave, by rank, or raises one's `SettingsError`, in all."""
        if self.world == 1:
            return [make()]
        answers: list = [None] * self.world
        dist.all_gather_object(answers, _attempt(make))
        return [_result(answer) for answer in answers]

    def turns(self, jobs: list[Job]) -> list[list[Job]]:
        """The jobs in groups of `world`, one for each process; the last group may be smaller."""
        return [jobs[start : start + self.world] for start in range(0, len(jobs), self.world)]

    def shared(self, jobs: list[Job], work: Callable[[Job], Found]) -> Iterator[tuple[Job, Found]]:
        """Divides the jobs over the processes; yields each with its result, in order, in all processes.

        All processes must have the same jobs. `work` is called for `world` of them at a time, one in each process.
        """
        for turn in self.turns(jobs):
            found = self.from_all(lambda turn=turn: work(turn[self.rank]) if self.rank < len(turn) else None)
            yield from zip(turn, found, strict=False)  # pyright: ignore[reportReturnType]  # None has no job


ALONE = Processes()
"""The only process of an evaluation."""


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Joins the processes that torchrun or `accelerate launch` has started; `ALONE` without such a launcher.

    Records go through main memory (gloo), also where the models are on GPUs.
    """
    world = _from_environment("WORLD_SIZE", 1)
    if world == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SettingsError(
            f"the environment has WORLD_SIZE={world} and no {missing[0]}: start several processes with torchrun, or "
            "unset RANK and WORLD_SIZE"
        )
    rank = _from_environment("RANK", 0)
    dist.init_process_group("gloo", timeout=LONGEST_TURN)
    local = (_from_environment("LOCAL_RANK", rank), _from_environment("LOCAL_WORLD_SIZE", world))
    try:
        yield Processes(rank, world, *local)
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _attempt(make: Callable[[], Found]) -> Found | SettingsError:
    """What `make` gives, or the error that the user or the machine caused: the other processes raise it too."""
    try:
        return make()
    except SettingsError as error:
        return error
    except Exception as error:
        problem = machine_problem(error)
        if problem is None:
            raise
        return SettingsError(problem)


def _result(answer: Found | SettingsError) -> Found:
    if isinstance(answer, SettingsError):
        raise answer
    return answer
