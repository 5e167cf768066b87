"""What a launcher tells a process about its job, by environment variables."""

import os

from refreshkv.settings import SettingsError

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


def job_size() -> int:
    """The number of processes of this job: 1 if no launcher has started this process.

    Raises `SettingsError` for variables that are missing beside others, or that contradict each other.
    """
    if not any(name in os.environ for name in ("RANK", "WORLD_SIZE")):
        return 1
    missing = [name for name in (*NUMBERS, *ADDRESS) if not os.environ.get(name)]
    if missing:
        there = ", ".join(name for name in NUMBERS if name in os.environ)
        raise SettingsError(
            f"the environment has {there} and no {missing[0]}: a launcher (deepspeed, torchrun) sets RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset all of them to train on one process"
        )
    for name in (*NUMBERS, "MASTER_PORT"):
        if not os.environ[name].isdecimal() or len(os.environ[name]) > 9:
            raise SettingsError(f"the environment has {name}={os.environ[name][:60]}: it must be a whole number")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not rank < world:
        raise SettingsError(f"the environment has RANK={rank} and WORLD_SIZE={world}: ranks are numbered from 0")
    return world
