"""Compares ways to train: each arm from the same base model on the same tokens, several times, with table and plots.

    python launch/experiment.py --config recipes [--minutes 9] [--only STUDY/ARM ...]

Every piece is a command of this folder (prepare, train, export, evaluate), printed in OUTPUT/logs; as many run at a
time as there are GPUs. What is finished stands in RESULTS/results.json and is not done again; with --minutes the rest
is saved in time, and the same command continues it. Writes RESULTS/tables.md and plots.
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
from refreshkv.settings import SettingsError, load_settings
from refreshkv.train.experiment.config import ExperimentConfig
from refreshkv.train.experiment.jobs import Outcome, run_pieces, stopped_by_sigterm
from refreshkv.train.experiment.pieces import Piece, plan
from refreshkv.train.experiment.report import write_tables
from refreshkv.train.experiment.results import Results


def main(argv: list[str]) -> None:
    args = parse(argv)
    config = load_settings(ExperimentConfig, args.config, args.overrides, folders=("experiments",))
    results = Results(config)
    pieces = chosen(plan(config, set(results.entries)), args.only)
    results.check_bases(pieces)
    if args.dry_run:
        print("\n".join(piece.name for piece in pieces) or "nothing is left to do")
        return

    def finish(piece: Piece) -> None:
        if piece.reports:
            results.add(piece)
            write_tables(config, results.entries)

    seconds = math.inf if args.minutes is None else 60 * args.minutes
    scripts, logs = Path(__file__).resolve().parent, Path(config.output, "logs")
    with alone(Path(config.output)), stopped_by_sigterm():
        outcome = run_pieces(pieces, devices(args.jobs), scripts, logs, seconds, finish)
    print(write_tables(config, results.entries))
    print(f"{config.results}: tables.md, results.json, plots")
    tell(outcome)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, or a name in configs/experiments")
    parser.add_argument("--minutes", type=float, help="time after which runs are saved and the command ends")
    parser.add_argument("--only", nargs="+", metavar="STUDY/ARM", help="patterns such as 30m-4k/*, taken in this order")
    parser.add_argument("--jobs", type=int, help="pieces at a time (default: the GPUs, or 1 without)")
    parser.add_argument("--dry-run", action="store_true", help="say what is left to do, and end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the experiment")
    args = parser.parse_intermixed_args(argv)
    if args.minutes is not None and not args.minutes > 0:
        raise SettingsError(f"--minutes must be more than 0, got {args.minutes}")
    if args.jobs is not None and args.jobs < 1:
        raise SettingsError(f"--jobs must be at least 1, got {args.jobs}")
    return args


def chosen(pieces: list[Piece], patterns: list[str] | None) -> list[Piece]:
    """The pieces that match a pattern, in the patterns' order, and before them all that they need."""
    if patterns is None:
        return pieces
    found = {pattern: {p.name for p in pieces if fnmatch.fnmatch(p.name, pattern)} for pattern in patterns}
    missing = [pattern for pattern in patterns if not found[pattern]]
    if missing:
        hint = "; key=value goes before --only" if any("=" in pattern for pattern in missing) else ""
        raise SettingsError(
            f"--only {' '.join(missing)}: nothing that is left to do is called so; --dry-run tells what is{hint}"
        )
    ordered: dict[str, Piece] = {}
    for names in found.values():
        for piece in reversed(pieces):  # what is needed stands before
            if piece.name in names:
                names |= set(piece.needs)
        ordered |= {piece.name: piece for piece in pieces if piece.name in names}
    return list(ordered.values())


def devices(jobs: int | None) -> list[str]:
    """CUDA device numbers, in turn if there are fewer than `jobs`; empty without a GPU."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        return [""] * (jobs or 1)
    count = jobs or len(numbers)
    return [numbers[i % len(numbers)] for i in range(count)]


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Nobody else works in the same output meanwhile: two would write into one run."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout:
        raise SettingsError(f"another experiment is at work in output={output}: wait, or choose another") from None


def tell(outcome: Outcome) -> None:
    if outcome.failed:
        failures = "; ".join(f"{name} (see {log})" for name, log in outcome.failed.items())
        raise SettingsError(f"failed: {failures}")
    if outcome.left:
        print(f"left for the next time: {', '.join(outcome.left)}")


if __name__ == "__main__":
    cli.run(main)
