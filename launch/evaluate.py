"""Measures perplexity, scores of tasks, or a table of the paper, under several strategies of decoding.

    python launch/evaluate.py --model DIR_OR_HUB_ID --data ROWS [--compare REPORT] [refresh.key=value ...]
    python launch/evaluate.py --model DIR_OR_HUB_ID --data ROWS --generate 512 [--sample] [refresh.key=value ...]
    python launch/evaluate.py --model DIR_OR_HUB_ID --tasks NAME,... [refresh.key=value tasks.NAME.key=value ...]
    python launch/evaluate.py --model DIR_OR_HUB_ID --suite paper-table-1 [--corpus NAME=ROWS ...] [...]

The schedule and the selection are the model's own ("refreshkv" in its config.json), or the paper's for a model that
has none; refresh.key=value changes them. A suite has its own.

With --data it scores the last tokens of prepared sequences and writes report.json, report.md and report.png. With
--compare, the folder of an earlier report on the same sequences, they show before and after, and the share of the gap
to full attention that is closed.

With --generate N the model continues the first tokens of each sequence by N tokens, greedily and with --sample also by
drawing, and full attention judges what it wrote: writes generation.json, generation.md, generation.png and texts.jsonl.

With --tasks (docs/tasks.md) the model generates the answers, greedily. With --grid its strategies have selections and
budgets of their own. Writes tasks.json, tasks.md, and examples.jsonl with every answer. With --prefix-store DIR each
prompt is computed once for all strategies (docs/prefix-store.md).

With --suite (docs/evaluation.md) it measures what a table or figure of the paper shows and writes suite.json, suite.md
and, for a figure, suite.png, with the paper's numbers beside the measured ones. --rows, --examples, --task-length,
--last-tokens, --budget and --without make it smaller, and the report says so.

Several processes divide the sequences and examples, each with the model on a GPU of its own:
    torchrun --nproc-per-node 2 launch/evaluate.py ...
--device-map auto spreads a model over the GPUs that it needs (docs/evaluation.md).

--resume continues an interrupted evaluation. Without matplotlib (refreshkv[eval]) reports have no figures.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from refreshkv import cli
from refreshkv.data.rows import SPLITS
from refreshkv.evaluation.commands import measure_generation, measure_perplexity, measure_suite, score_tasks
from refreshkv.evaluation.inputs import DEFAULT_ROWS
from refreshkv.evaluation.processes import joined_processes
from refreshkv.evaluation.strategies import STRATEGIES
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

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("data", "tasks", "suite")
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "split": (("data", "generate"), {"data": "test", "generate": "test"}),
    "strides": (("data",), {}),
    "compare": (("data",), {}),
    "last_tokens": (("data", "suite"), {"data": 256}),
    "rows": (("data", "generate", "suite"), {}),
    "generate": (("generate",), {}),
    "grid": (("generate", "tasks"), {}),
    "sample": (("generate",), {"generate": False}),
    "temperature": (("generate",), {"generate": 1.0}),
    "top_p": (("generate",), {"generate": 1.0}),
    "seed": (("generate",), {"generate": 0}),
    "decode": (("data", "suite"), {"data": False}),
    "strategies": (("data", "generate", "tasks"), {}),
    "task_length": (("tasks", "suite"), {}),
    "examples": (("tasks", "suite"), {"tasks": 50}),
    "mix_tasks": (("tasks",), {"tasks": False}),
    "compile": (("tasks",), {"tasks": True}),
    "stop_after": (("tasks",), {}),
    "ignore_generation_config": (("generate", "tasks", "suite"), {}),
    "prefix_store": (("tasks",), {}),
    "prefix_store_gb": (("tasks",), {"tasks": 20.0}),
    "prefix_store_shared": (("tasks",), {}),
    "corpus": (("suite",), {"suite": []}),
    "without": (("suite",), {"suite": []}),
}
"""Option -> the kinds of evaluation that take it, and its default in each; the default is None elsewhere."""


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    with joined_processes() as processes:
        command = shlex.join([*processes.launcher, "launch/evaluate.py", *arguments])
        if options.kind == "data":
            text = measure_perplexity(options, command, processes)
        elif options.kind == "generate":
            text = measure_generation(options, command, processes)
        elif options.kind == "tasks":
            text = score_tasks(options, command, processes)
        else:
            text = measure_suite(options, command, ROOT, processes)
        if processes.is_first:
            print(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser, "; with --suite also NAME=MODEL, and more than once", action="append")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="folder of sequences that launch/prepare.py wrote")
    source.add_argument(
        "--tasks", type=comma_separated, help="tasks, separated by commas; ruler stands for all of RULER's"
    )
    source.add_argument("--suite", help="a table of the paper, such as paper-table-1 (configs/suites), or a YAML file")
    parser.add_argument("--split", choices=SPLITS, help="(default: test)")
    parser.add_argument("--last-tokens", type=int, help="tokens scored in each sequence (default: 256, or the suite's)")
    parser.add_argument(
        "--rows", type=int, help=f"sequences, spread over the split (default: {DEFAULT_ROWS} or all, or the suite's)"
    )
    parser.add_argument("--generate", type=int, metavar="N", help="with --data: tokens to generate after each prompt")
    parser.add_argument(
        "--grid", help="with --generate and --tasks: strategies of a YAML file, or of a name in configs/grids"
    )
    parser.add_argument("--sample", action="store_true", default=None, help="with --generate: also draw tokens")
    parser.add_argument("--temperature", type=float, help="of --sample (default: 1)")
    parser.add_argument("--top-p", type=float, help="of --sample (default: 1)")
    parser.add_argument("--seed", type=int, help="of --sample (default: 0)")
    parser.add_argument("--strides", type=whole_numbers, help="of the default strategies (default: 5,10,25,50)")
    _add_tasks(parser)
    parser.add_argument(
        "--strategies",
        type=comma_separated,
        help=f"of {', '.join(STRATEGIES)}; refresh:10 and similarity:5:0.85 give stride and threshold, "
        "select:2:4bit select stride and score bits (default: with --data full, refresh at --strides, never; with "
        "--tasks full, refresh, snapkv; both: similarity with --threshold)",
    )
    parser.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        help="decode token by token also where one pass gives the same losses, for times and memory (default: only "
        "where the table of --suite shows these)",
    )
    parser.add_argument("--corpus", action="append", help="NAME=FOLDER: other sequences for one of the suite's corpora")
    parser.add_argument("--without", type=comma_separated, help="corpora and benchmarks of the suite to leave out")
    parser.add_argument(
        "--prefix-store", type=Path, help="folder of prompts' keys and values: compute each prompt once"
    )
    parser.add_argument("--prefix-store-gb", type=float, help="most GB in it (default: 20)")
    parser.add_argument(
        "--prefix-store-shared", action="store_true", default=None, help="other users read and write there too"
    )
    add_budget(parser)
    parser.add_argument("--threshold", help="evaluate the similarity schedule with this threshold as well")
    add_generation(parser)
    add_execution(parser)
    add_device_map(parser)
    parser.add_argument("--compare", type=Path, help="folder of an earlier report to compare with")
    add_output(parser, "reports/NAME_OF_MODEL_OR_SUITE")
    parser.add_argument("--resume", action="store_true", help="continue the evaluation in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that the folder already holds")
    add_overrides(parser, "; tasks.NAME.key=value with --tasks and --suite")
    options = parser.parse_intermixed_args(arguments)
    check_options(options)
    return options


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """Adds the options of --tasks, two of which a suite takes too."""
    parser.add_argument("--task-length", type=int, help="tokens of prompt and answer (default: each task's own, 4096)")
    parser.add_argument("--examples", type=int, help="examples of each task (default: 50, or the suite's)")
    parser.add_argument(
        "--mix-tasks",
        action="store_true",
        default=None,
        help="with --tasks: batches may hold examples of several tasks, which takes fewer decoding steps in all",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with --tasks: compile the decoding steps on a GPU, which pays for many examples (default: yes)",
    )
    parser.add_argument(
        "--stop-after",
        type=float,
        metavar="SECONDS",
        help="with --tasks: begin no batch after this time, and report what is finished",
    )


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that the chosen kind of evaluation does not take; gives the others their defaults."""
    check_numbers(options)
    for name in ("prefix_store_gb", "prefix_store_shared"):
        if getattr(options, name) is not None and options.prefix_store is None:
            raise SettingsError(f"--{name.replace('_', '-')} needs --prefix-store")
    options.kind = kind = next(kind for kind in KINDS if getattr(options, kind) is not None)
    if kind == "data" and options.generate is not None:
        options.kind = kind = "generate"
    given = {name: getattr(options, name) is not None for name in OPTIONS}
    for name, (meaningful, defaults) in OPTIONS.items():
        if getattr(options, name) is None:
            setattr(options, name, defaults.get(kind))
        elif kind not in meaningful:
            raise SettingsError(f"--{name.replace('_', '-')} means nothing with --{kind}")
    if kind == "generate":
        check_generation(options, given)
    if kind in ("generate", "tasks"):
        check_grid(options)
    if options.strides and options.strategies:
        raise SettingsError("--strides means nothing with --strategies: write refresh:STRIDE there")
    if options.resume and options.overwrite:
        raise SettingsError("--resume continues an evaluation and --overwrite replaces it: choose one")
    if kind in ("data", "generate") and any(override.startswith("tasks.") for override in options.overrides):
        raise SettingsError("tasks.NAME.key=value means nothing with --data")
    check_models(options)


def check_models(options: argparse.Namespace) -> None:
    """Refuses several models, or one revision for several, where only one is meant."""
    kind = options.kind
    if kind != "suite" and len(options.model) > 1:
        raise SettingsError(f"--model: only a suite takes several; --{kind} takes one")
    if options.revision is not None and len(options.model) > 1:
        raise SettingsError("--revision is of one model: evaluate the others of the suite in runs of their own")


def check_generation(options: argparse.Namespace, given: dict[str, bool]) -> None:
    """Refuses options of --generate that others leave without effect. given: option -> whether the user set it."""
    for name in ("temperature", "top_p", "seed"):
        if given[name] and not options.sample:
            raise SettingsError(f"--{name.replace('_', '-')} needs --sample")


def check_grid(options: argparse.Namespace) -> None:
    """Refuses options that --grid leaves without effect."""
    changes = [text for text in options.overrides if not text.startswith("tasks.")]
    if options.grid and (options.strategies or changes or options.budget or options.threshold):
        raise SettingsError("--grid has strategies, budgets and settings of its own: leave out the others")


if __name__ == "__main__":
    cli.run(main)
