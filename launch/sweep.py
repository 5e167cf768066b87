"""Recommends a threshold of the similarity schedule for a model (the paper's appendix A.4).

    python launch/sweep.py --model DIR_OR_HUB_ID --data ROWS [--thresholds 0.7,0.8,0.9] [refresh.key=value ...]

Measures the perplexity of the last tokens of prepared sequences and the effective stride, for each threshold and for
fixed schedules. Recommends the threshold that saves most full steps among those that keep the share --keep of what
refreshing gains. With --tasks the report also shows their mean score under each schedule. Writes sweep.json, sweep.md
and, with matplotlib (refreshkv[eval]), sweep.png. --resume continues an interrupted sweep.
"""

import argparse
import shlex

from refreshkv import cli
from refreshkv.data.rows import SPLITS
from refreshkv.evaluation.commands import sweep_thresholds
from refreshkv.evaluation.sweep.recommendation import THRESHOLDS
from refreshkv.options import (
    add_budget,
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


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    print(sweep_thresholds(options, shlex.join(["python", "launch/sweep.py", *arguments])))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--data", required=True, help="folder of sequences that launch/prepare.py wrote")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, help="sequences, spread over the split (default: 100 or all)")
    parser.add_argument(
        "--last-tokens", type=int, default=256, help="tokens scored in each sequence (default: %(default)s)"
    )
    parser.add_argument("--thresholds", type=cosines, default=THRESHOLDS, help="(default: 0.3 to 0.98)")
    parser.add_argument("--tasks", type=comma_separated, help="tasks to score as well, separated by commas")
    parser.add_argument("--task-length", type=int, help="tokens of prompt and answer (default: each task's own, 4096)")
    parser.add_argument("--examples", type=int, help=f"examples of each task (default: {DEFAULT_EXAMPLES})")
    parser.add_argument(
        "--strides", type=whole_numbers, help="steps between two decision steps (default: the model's own)"
    )
    parser.add_argument("--keep", type=float, default=0.9, help="share of the gain to keep (default: %(default)s)")
    add_budget(parser)
    add_generation(parser)
    add_execution(parser)
    add_output(parser, "reports/NAME_OF_THE_MODEL-sweep")
    parser.add_argument("--resume", action="store_true", help="continue the sweep in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace a sweep that the folder already holds")
    add_overrides(parser, "; tasks.NAME.key=value with --tasks")
    options = parser.parse_intermixed_args(arguments)
    check_numbers(options)
    if options.resume and options.overwrite:
        raise SettingsError("--resume continues a sweep and --overwrite replaces it: choose one")
    of_tasks = [options.examples, options.task_length, *(text.startswith("tasks.") for text in options.overrides)]
    if not options.tasks and any(of_tasks):
        raise SettingsError("--examples, --task-length and tasks.NAME.key=value mean nothing without --tasks")
    if not options.tasks and options.ignore_generation_config:
        raise SettingsError("--ignore-generation-config means nothing without --tasks")
    options.examples = DEFAULT_EXAMPLES if options.examples is None else options.examples
    return options


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
