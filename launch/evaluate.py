"""Perplexity of the last tokens of rows, or scores of tasks: full attention, refreshed, never refreshed.

    python launch/evaluate.py --model DIR_OR_HUB_ID --data ROWS [--compare REPORT] [refresh.key=value ...]
    python launch/evaluate.py --model DIR_OR_HUB_ID --tasks NAME,... [refresh.key=value tasks.NAME.key=value ...]

The schedule and the selection are the model's own ("refreshkv" in its config.json), or the defaults for a model that
has none; refresh.key=value changes them.

With --data it writes report.json, report.md and report.png. With --compare, the folder of an earlier report on the same
rows, they show before and after, and the share of the gap to full attention that is closed.

With --tasks (docs/tasks.md) the model generates the answers, greedily. Writes tasks.json, tasks.md, and examples.jsonl
with every answer; an interrupted evaluation is continued with --resume. With --prefix-store DIR each prompt is computed
once for all strategies (docs/prefix-store.md).
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from refreshkv import RefreshConfig, cli, enable
from refreshkv.data.rows import SPLITS, check_tokenizer, load_rows
from refreshkv.data.tasks.registry import build_tasks
from refreshkv.loading import load_model, load_tokenizer
from refreshkv.prefix_store import PrefixStore
from refreshkv.settings import SettingsError, load_settings
from refreshkv.train.decoding import DECODINGS, build_decodings
from refreshkv.train.evaluation import budget_warnings, check_last_tokens, default_strategies, evaluate
from refreshkv.train.model import check_same_tokens
from refreshkv.train.report import (
    build_report,
    check_comparable,
    check_output,
    load_report,
    protocol,
    text_table,
    write_report,
)
from refreshkv.train.task_evaluation import Records, evaluate_tasks, make_examples
from refreshkv.train.task_report import build_task_report, open_folder, task_table, write_task_report

DEFAULT_ROWS = 100
DATA_DEFAULTS = {"split": "test", "last_tokens": 256, "rows": None, "strides": [5, 10, 25, 50], "compare": None}
"""Options that mean something with --data only; no task can have them."""
TASK_DEFAULTS = {"task_length": None, "examples": 50, "strategies": None, "resume": False}
"""Options that mean something with --tasks only."""
TASK_DEFAULTS |= {"prefix_store": None, "prefix_store_gb": 20.0}


@dataclass
class Overrides:
    """What refresh.key=value and tasks.NAME.key=value may change."""

    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    tasks: dict[str, Any] = field(default_factory=dict)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    output = arguments.output or Path("reports", Path(arguments.model).resolve().name)
    if arguments.tasks:
        return evaluate_on_tasks(arguments, output, argv)
    before = load_earlier(arguments.compare, output) if arguments.compare else None

    rows = load_rows(arguments.data)
    split = spread(getattr(rows, arguments.split), arguments.rows, f"the {arguments.split} split of {arguments.data}")
    row_length = len(split[0]["input_ids"])
    check_last_tokens(arguments.last_tokens, row_length)

    path = model_path(arguments.model)
    model = load_model(path, "--model", dtype=arguments.dtype)
    check_tokenizer(rows.info, model.get_input_embeddings().num_embeddings)
    check_same_tokens(path, rows)
    config = refresh_config(model, arguments)
    strategies = default_strategies(config, arguments.strides)
    measured = protocol(
        rows.info["fingerprint"], arguments.split, len(split), row_length, arguments.last_tokens, strategies
    )
    if before:
        check_comparable(before, measured, arguments.compare)
    enable(model, config).to(device(arguments.device)).eval()
    check_output(output, arguments.overwrite)
    for warning in budget_warnings(strategies, row_length, arguments.last_tokens):
        print(f"warning: {warning}", file=sys.stderr)

    evaluation = evaluate(model, split, strategies, arguments.last_tokens, arguments.batch_size)

    settings = {
        "data": arguments.data,
        "refresh": config.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch size": arguments.batch_size,
    }
    command = shlex.join(["python", "launch/evaluate.py", *argv])
    report = build_report(evaluation, measured, arguments.model, settings, command, before)
    write_report(output, report)
    print(text_table(report))
    print(f"{output}: report.json, report.md, report.png")


def evaluate_on_tasks(arguments: argparse.Namespace, output: Path, argv: list[str]) -> None:
    values = load_settings(Overrides, None, [o for o in arguments.overrides if o.startswith("tasks.")]).tasks
    common = {} if arguments.task_length is None else {"length": arguments.task_length}
    tasks = build_tasks(arguments.tasks, values, **common)
    path = model_path(arguments.model)
    tokenizer = load_tokenizer(path, "--model")
    model = load_model(path, "--model", dtype=arguments.dtype)
    config = refresh_config(model, arguments)
    names = arguments.strategies or ["full", "refresh", *(["similarity"] if config.threshold else []), "snapkv"]
    decodings = build_decodings(names, config)
    enable(model, config).to(device(arguments.device)).eval()
    examples = make_examples(model, tokenizer, tasks, arguments.examples)
    store = open_store(model, arguments)
    records = Records(open_folder(output, arguments.resume, arguments.overwrite))

    results = evaluate_tasks(model, tokenizer, examples, decodings, records, arguments.batch_size, store=store)

    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch size": arguments.batch_size,
        "examples": arguments.examples,
    }
    if store is not None:
        settings["prefix store"] = f"{arguments.prefix_store}; seconds are without the prompts'"
    command = shlex.join(["python", "launch/evaluate.py", *argv])
    report = build_task_report(results, tasks, decodings, arguments.model, settings, command)
    write_task_report(output, report)
    print(task_table(report))
    print(f"{output}: tasks.json, tasks.md, examples.jsonl")


def open_store(model: PreTrainedModel, arguments: argparse.Namespace) -> PrefixStore | None:
    if arguments.prefix_store is None:
        return None
    most = int(arguments.prefix_store_gb * 10**9)
    return PrefixStore(arguments.prefix_store, most, model, setting="--prefix-store")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a transformers model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="folder of rows that launch/prepare.py wrote")
    source.add_argument("--tasks", type=names, help="tasks, separated by commas; ruler stands for all of RULER's")
    parser.add_argument("--split", choices=SPLITS, help="(default: test)")
    parser.add_argument("--last-tokens", type=int, help="tokens scored per row (default: 256)")
    parser.add_argument("--rows", type=int, help=f"rows, spread over the split (default: {DEFAULT_ROWS} or all)")
    parser.add_argument("--strides", type=strides, help="(default: 5,10,25,50)")
    parser.add_argument("--task-length", type=int, help="tokens of prompt and answer (default: each task's own, 4096)")
    parser.add_argument("--examples", type=int, help="examples of each task (default: 50)")
    parser.add_argument(
        "--strategies",
        type=names,
        help=f"ways to decode, of {', '.join(DECODINGS)}; refresh:10 and similarity:5:0.85 give stride and threshold "
        "(default: full,refresh,snapkv, and similarity with --threshold)",
    )
    parser.add_argument("--resume", action="store_true", default=None, help="continue the tasks in --output")
    parser.add_argument(
        "--prefix-store", type=Path, help="folder of prompts' keys and values: compute each prompt once"
    )
    parser.add_argument("--prefix-store-gb", type=float, help="most GB in it (default: 20)")
    parser.add_argument("--budget", help="size of the small cache: tokens, or a fraction of the prompt such as 0.125")
    parser.add_argument("--threshold", help="evaluate the similarity schedule with this threshold as well")
    parser.add_argument("--batch-size", type=int, default=1, help="rows per forward pass (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: the model's)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--compare", type=Path, help="folder of an earlier report to compare with")
    parser.add_argument("--output", type=Path, help="folder of the report (default: reports/NAME_OF_THE_MODEL)")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that the folder already holds")
    parser.add_argument("overrides", nargs="*", metavar="refresh.key=value", help="schedule and selection")
    arguments = parser.parse_intermixed_args(argv)
    check_used(arguments)
    return arguments


def check_used(arguments: argparse.Namespace) -> None:
    """Refuses options of the other kind of evaluation; gives the rest their defaults."""
    on_tasks = bool(arguments.tasks)
    if arguments.prefix_store_gb is not None and arguments.prefix_store is None:
        raise SettingsError("--prefix-store-gb needs --prefix-store")
    kind = "--tasks" if on_tasks else "--data"
    for unused, defaults in ((on_tasks, DATA_DEFAULTS), (not on_tasks, TASK_DEFAULTS)):
        for name, default in defaults.items():
            if unused and getattr(arguments, name) is not None:
                raise SettingsError(f"--{name.replace('_', '-')} means nothing with {kind}")
            if getattr(arguments, name) is None:
                setattr(arguments, name, default)
    if on_tasks and not 0 < arguments.prefix_store_gb < float("inf"):
        raise SettingsError(f"--prefix-store-gb must be a number more than 0, got {arguments.prefix_store_gb}")
    if arguments.resume and arguments.overwrite:
        raise SettingsError("--resume continues an evaluation and --overwrite replaces it: choose one")
    if not on_tasks and any(override.startswith("tasks.") for override in arguments.overrides):
        raise SettingsError("tasks.NAME.key=value means nothing with --data")


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def strides(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"strides must be whole numbers >= 1, got {text}")
    return values


def load_earlier(folder: Path, output: Path) -> dict:
    if folder.resolve() == output.resolve():
        raise SettingsError(f"--compare and --output are the same folder, {folder}: choose another --output")
    return load_report(folder)


def spread(rows: Dataset, count: int | None, source: str) -> Dataset:
    """`count` rows at equal distances, so that they come from many documents."""
    available = len(rows)
    if available == 0:
        raise SettingsError(f"{source} has no rows: choose another --split, or prepare more documents")
    if count is not None and not 1 <= count <= available:
        raise SettingsError(f"--rows must lie between 1 and {available}, got {count}: more are not in {source}")
    count = count or min(DEFAULT_ROWS, available)
    return rows.select([i * available // count for i in range(count)])


def model_path(name: str) -> str:
    """`name`, or the `model` folder inside it."""
    folder = Path(name)
    nested = (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file()
    return str(folder / "model") if nested else name


def refresh_config(model: PreTrainedModel, arguments: argparse.Namespace) -> RefreshConfig:
    """The model's own settings, changed by the command line's."""
    saved = getattr(model.config, "refreshkv", None)
    config = RefreshConfig() if saved is None else RefreshConfig.from_dict(saved)
    values = [f"refresh.{key}={json.dumps(value)}" for key, value in config.to_dict().items()]
    flags = {"budget": arguments.budget, "threshold": arguments.threshold}
    values += [f"refresh.{key}={value}" for key, value in flags.items() if value is not None]
    overrides = [override for override in arguments.overrides if not override.startswith("tasks.")]
    return load_settings(Overrides, None, [*values, *overrides]).refresh


def device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no GPU; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


if __name__ == "__main__":
    cli.run(main)
