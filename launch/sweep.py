"""Recommends settings for a model: a threshold of the similarity schedule (the paper's appendix A.4), or, with --grid,
stride, select stride, score bits and budget.

    python launch/sweep.py --model DIR_OR_HUB_ID --data ROWS [--thresholds 0.7,0.8,0.9] [refresh.key=value ...]
    python launch/sweep.py --model DIR_OR_HUB_ID --data ROWS --grid recommend [--within 0.02] [--data MORE_ROWS]

Measures the perplexity of the last tokens of prepared sequences and the effective stride, for each threshold and for
fixed schedules. Recommends the threshold that saves most full steps among those that keep the share --keep of what
refreshing gains. With --tasks the report also shows their mean score under each schedule. Writes sweep.json, sweep.md
and, with matplotlib (refreshkv[eval]), sweep.png. --resume continues an interrupted sweep.

With --grid, a YAML file or a name such as recommend or selections (configs/grids), it measures all strategies of
the file on each text, and recommends the one that reads the fewest bytes of those whose perplexity is at most --within
above full attention's on every text. Writes tradeoff.json, tradeoff.md and tradeoff.png. --stop-after SECONDS begins no
further strategy then, and reports what is measured.

Several processes divide the sequences, as in evaluate: torchrun --nproc-per-node 2 launch/sweep.py ...
"""

import argparse
import shlex

from refreshkv import cli
from refreshkv.data.rows import SPLITS
from refreshkv.evaluation.commands import sweep_thresholds
from refreshkv.evaluation.processes import joined_processes
from refreshkv.evaluation.sweep.command import sweep_grid
from refreshkv.evaluation.sweep.recommendation import THRESHOLDS
from refreshkv.options import (
    add_budget,
    add_device_map,
    add_execution,
    add_generation,
    add_model,
    add_output,
    add_overrides,
    check_numbers,
    comma_separated,
    whole_numbers,
)
from refreshkv.settings import SettingsError

DEFAULT_EXAMPLES = 20
DEFAULT_KEEP = 0.9
DEFAULT_WITHIN = 0.02
OF_THRESHOLDS = ("thresholds", "strides", "keep", "tasks", "task_length", "examples", "budget", "overrides")
"""Options that mean nothing with --grid, which has all settings in its file."""
OF_GRIDS = ("within", "stop_after")
"""Options that mean nothing without --grid."""


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    sweep = sweep_grid if options.grid else sweep_thresholds
    with joined_processes() as processes:
        text = sweep(options, shlex.join([*processes.launcher, "launch/sweep.py", *arguments]), processes)
        if processes.is_first:
            print(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        help="folder of sequences that launch/prepare.py wrote; with --grid also several, each after a --data",
    )
    parser.add_argument("--grid", help="YAML file, or name in configs/grids, of the strategies to measure")
    parser.add_argument(
        "--within", type=float, help=f"with --grid: largest loss against full attention (default: {DEFAULT_WITHIN})"
    )
    parser.add_argument("--stop-after", type=float, help="with --grid: seconds after which no strategy is begun")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, help="sequences, spread over the split (default: 100 or all)")
    parser.add_argument(
        "--last-tokens", type=int, default=256, help="tokens scored in each sequence (default: %(default)s)"
    )
    parser.add_argument("--thresholds", type=cosines, help="(default: 0.3 to 0.98)")
    parser.add_argument("--tasks", type=comma_separated, help="tasks to score as well, separated by commas")
    parser.add_argument("--task-length", type=int, help="tokens of prompt and answer (default: each task's own, 4096)")
    parser.add_argument("--examples", type=int, help=f"examples of each task (default: {DEFAULT_EXAMPLES})")
    parser.add_argument(
        "--strides", type=whole_numbers, help="steps between two decision steps (default: the model's own)"
    )
    parser.add_argument("--keep", type=float, help=f"share of the gain to keep (default: {DEFAULT_KEEP})")
    add_budget(parser)
    add_generation(parser)
    add_execution(parser)
    add_device_map(parser)
    add_output(parser, "reports/NAME_OF_THE_MODEL-sweep")
    parser.add_argument("--resume", action="store_true", help="continue the sweep in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace a sweep that the folder already holds")
    add_overrides(parser, "; tasks.NAME.key=value with --tasks")
    options = parser.parse_intermixed_args(arguments)
    check_numbers(options)
    if options.resume and options.overwrite:
        raise SettingsError("--resume continues a sweep and --overwrite replaces it: choose one")
    check_kind(options)
    of_tasks = [options.examples, options.task_length, *(text.startswith("tasks.") for text in options.overrides)]
    if not options.tasks and any(of_tasks):
        raise SettingsError("--examples, --task-length and tasks.NAME.key=value mean nothing without --tasks")
    if not options.tasks and options.ignore_generation_config:
        raise SettingsError("--ignore-generation-config means nothing without --tasks")
    options.examples = DEFAULT_EXAMPLES if options.examples is None else options.examples
    return options


def check_kind(options: argparse.Namespace) -> None:
    """Refuses options that the chosen kind of sweep does not take; gives the others their defaults."""
    for name in OF_THRESHOLDS if options.grid else OF_GRIDS:
        if getattr(options, name) not in (None, []):
            option = "refresh.key=value" if name == "overrides" else f"--{name.replace('_', '-')}"
            raise SettingsError(f"{option} means nothing with{'' if options.grid else 'out'} --grid")
    if not options.grid:
        if len(options.data) > 1:
            raise SettingsError("--data: only --grid takes several folders; a sweep of thresholds takes one")
        (options.data,) = options.data
    options.thresholds = options.thresholds or THRESHOLDS
    options.keep = DEFAULT_KEEP if options.keep is None else options.keep
    options.within = DEFAULT_WITHIN if options.within is None else options.within


def cosines(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(-1 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"thresholds are cosines from -1 to 1, separated by commas, got {text}")
    return values


if __name__ == "__main__":
    cli.run(main)
