"""Compares ways to train: every arm continues the same base model on the same tokens, with several seeds.

    python launch/experiment.py --config recipes [--minutes 9] [--only STUDY/ARM ...]

Every job runs commands of this folder (prepare, train, export, evaluate), which OUTPUT/logs shows; as many jobs run at
a time as there are GPUs. RESULTS/results.json has the finished figures, which are not computed again. With --minutes,
runs save a checkpoint in time, and the same command continues them. Writes RESULTS/tables.md and, with matplotlib
(refreshkv[eval]), plots.
"""

import argparse
import fnmatch
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from refreshkv import cli
from refreshkv.folders import make_folder, validate_folder
from refreshkv.options import check_numbers
from refreshkv.settings import SettingsError, load_settings
from refreshkv.train.experiment.config import ExperimentConfig
from refreshkv.train.experiment.jobs import Job, plan, validate_runs
from refreshkv.train.experiment.report import write_tables
from refreshkv.train.experiment.results import Results
from refreshkv.train.experiment.running import Outcome, run_jobs, stopped_by_sigterm


def main(argv: list[str]) -> None:
    args = parse(argv)
    config = load_settings(ExperimentConfig, args.config, args.overrides, folders=("experiments",))
    validate_folder(config.results, "results")
    results = Results(config)
    jobs = chosen(plan(config, set(results.entries)), args.only)
    results.check_bases(jobs)
    validate_runs(jobs)
    if args.dry_run:
        print("\n".join(job.name for job in jobs) or "nothing is left to do")
        return

    def finish(job: Job) -> None:
        if job.reports:
            results.add(job)
            write_tables(config, results.entries)

    seconds = math.inf if args.minutes is None else 60 * args.minutes
    scripts, logs = Path(__file__).resolve().parent, Path(config.output, "logs")
    with alone(Path(config.output)), stopped_by_sigterm():
        outcome = run_jobs(jobs, devices(args.jobs), scripts, logs, seconds, finish)
    print(write_tables(config, results.entries))
    print(f"{config.results}: tables.md, results.json, plots")
    tell(outcome)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, or a name in configs/experiments")
    parser.add_argument("--minutes", type=float, help="time after which runs are saved and the command ends")
    parser.add_argument("--only", nargs="+", metavar="STUDY/ARM", help="patterns such as 30m-4k/*, taken in this order")
    parser.add_argument("--jobs", type=int, help="jobs at a time (default: the GPUs, or 1 without)")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs that are left, and end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the experiment")
    args = parser.parse_intermixed_args(argv)
    check_numbers(args)
    return args


def chosen(jobs: list[Job], patterns: list[str] | None) -> list[Job]:
    """The jobs that match a pattern, in the patterns' order, each after the jobs that it needs."""
    if patterns is None:
        return jobs
    found = {pattern: {p.name for p in jobs if fnmatch.fnmatch(p.name, pattern)} for pattern in patterns}
    missing = [pattern for pattern in patterns if not found[pattern]]
    if missing:
        hint = "; key=value goes before --only" if any("=" in pattern for pattern in missing) else ""
        raise SettingsError(
            f"--only {' '.join(missing)}: no job that is left to do has this name; --dry-run lists them{hint}"
        )
    ordered: dict[str, Job] = {}
    for names in found.values():
        for job in reversed(jobs):  # a needed job comes earlier in the list
            if job.name in names:
                names |= set(job.needs)
        ordered |= {job.name: job for job in jobs if job.name in names}
    return list(ordered.values())


def devices(jobs: int | None) -> list[str]:
    """A CUDA device number for each of `jobs` jobs, in turn if there are fewer; "" without a GPU."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        return [""] * (jobs or 1)
    count = jobs or len(numbers)
    return [numbers[i % len(numbers)] for i in range(count)]


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Locks the output folder: two experiments would write into the same run."""
    make_folder(output, "output")
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout:
        raise SettingsError(f"another experiment is running in output={output}: wait, or choose another") from None


def tell(outcome: Outcome) -> None:
    if outcome.failed:
        failures = "; ".join(f"{name} (see {log})" for name, log in outcome.failed.items())
        raise SettingsError(f"failed: {failures}")
    if outcome.left:
        print(f"left for the next time: {', '.join(outcome.left)}")


if __name__ == "__main__":
    cli.run(main)
