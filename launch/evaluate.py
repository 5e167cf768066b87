"""Perplexity of the last tokens of rows, scores of tasks, or a table of the paper, under several ways to decode.

    python launch/evaluate.py --model DIR_OR_HUB_ID --data ROWS [--compare REPORT] [refresh.key=value ...]
    python launch/evaluate.py --model DIR_OR_HUB_ID --tasks NAME,... [refresh.key=value tasks.NAME.key=value ...]
    python launch/evaluate.py --model DIR_OR_HUB_ID --suite paper-table-1 [--corpus NAME=ROWS ...] [...]

The schedule and the selection are the model's own ("refreshkv" in its config.json), or the defaults for a model that
has none; refresh.key=value changes them. A suite has its own.

With --data it writes report.json, report.md and report.png. With --compare, the folder of an earlier report on the same
rows, they show before and after, and the share of the gap to full attention that is closed.

With --tasks (docs/tasks.md) the model generates the answers, greedily. Writes tasks.json, tasks.md, and examples.jsonl
with every answer. With --prefix-store DIR each prompt is computed once for all strategies (docs/prefix-store.md).

With --suite (docs/evaluation.md) it measures what a table or figure of the paper shows, and writes suite.json, suite.md
and, for a figure, suite.png, with the paper's numbers beside ours. --rows, --examples, --task-length, --last-tokens,
--budget and --without make it smaller, and the report says so.

An interrupted evaluation is continued with --resume.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from refreshkv import RefreshConfig, cli, enable
from refreshkv.data.rows import SPLITS
from refreshkv.evaluation.inputs import DEFAULT_ROWS, check_tokens, open_split, open_tasks
from refreshkv.evaluation.perplexity import (
    budget_warnings,
    check_last_tokens,
    default_strategies,
    evaluate,
)
from refreshkv.evaluation.report import (
    ROWS_FILE,
    build_report,
    check_comparable,
    check_output,
    load_report,
    protocol,
    text_table,
    write_report,
)
from refreshkv.evaluation.sequence_losses import RowRecords
from refreshkv.evaluation.strategies import DECODINGS, build_decodings
from refreshkv.evaluation.suite.changes import Changes, change
from refreshkv.evaluation.suite.config import load_suite, named_models
from refreshkv.evaluation.suite.report import FILES as SUITE_FILES
from refreshkv.evaluation.suite.report import build_suite_report, suite_table, write_suite_report
from refreshkv.evaluation.suite.run import open_suite, run_suite
from refreshkv.evaluation.task_report import EXAMPLES_FILE, build_task_report, task_table, write_task_report
from refreshkv.evaluation.task_report import FILES as TASK_FILES
from refreshkv.evaluation.task_scores import Records, evaluate_tasks, make_examples
from refreshkv.loading import load_model, load_tokenizer, model_folder, own_config
from refreshkv.options import (
    add_execution,
    changed_config,
    check_execution,
    chosen_device,
    comma_separated,
    task_values,
    whole_numbers,
)
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("data", "tasks", "suite")
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "split": (("data",), {"data": "test"}),
    "strides": (("data",), {}),
    "compare": (("data",), {}),
    "last_tokens": (("data", "suite"), {"data": 256}),
    "rows": (("data", "suite"), {}),
    "decode": (("data", "suite"), {"data": False}),
    "strategies": (("data", "tasks"), {}),
    "task_length": (("tasks", "suite"), {}),
    "examples": (("tasks", "suite"), {"tasks": 50}),
    "prefix_store": (("tasks",), {}),
    "prefix_store_gb": (("tasks",), {"tasks": 20.0}),
    "corpus": (("suite",), {"suite": []}),
    "without": (("suite",), {"suite": []}),
}
"""Option -> the kinds of evaluation that it means something with, and its default there; None elsewhere."""
DEFAULT_STRIDES = [5, 10, 25, 50]


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    kinds = {"data": evaluate_on_rows, "tasks": evaluate_on_tasks, "suite": evaluate_suite}
    kinds[arguments.kind](arguments, shlex.join(["python", "launch/evaluate.py", *argv]))


def evaluate_on_rows(arguments: argparse.Namespace, command: str) -> None:
    name = only_model(arguments)
    output = arguments.output or Path("reports", Path(name).resolve().name)
    before = load_earlier(arguments.compare, output) if arguments.compare else None

    rows, split = open_split(arguments.data, arguments.split, arguments.rows)
    row_length = len(split[0]["input_ids"])
    check_last_tokens(arguments.last_tokens, row_length)

    path = model_folder(name)
    model = load_model(path, "--model", dtype=arguments.dtype)
    check_tokens(model, path, rows)
    config = chosen_config(model, arguments)
    if arguments.strategies:
        strategies = build_decodings(arguments.strategies, config)
    else:
        strategies = default_strategies(config, arguments.strides or DEFAULT_STRIDES)
    if not any(strategy.is_full for strategy in strategies):
        raise SettingsError("--strategies: with --data full must be among them: all others are compared with it")
    measured = protocol(
        rows.info["fingerprint"], arguments.split, len(split), row_length, arguments.last_tokens, strategies
    )
    if before:
        check_comparable(before, measured, arguments.compare)
    enable(model, config).to(chosen_device(arguments.device)).eval()
    records = RowRecords(check_output(output, arguments.overwrite, arguments.resume) / ROWS_FILE)
    for warning in budget_warnings(strategies, row_length, arguments.last_tokens):
        print(f"warning: {warning}", file=sys.stderr)

    options = {"batch_size": arguments.batch_size, "stepwise": arguments.decode, "records": records}
    evaluation = evaluate(model, split, strategies, arguments.last_tokens, **options)

    settings = {"data": arguments.data, "refresh": config.to_dict(), **circumstances(model, arguments)}
    report = build_report(evaluation, measured, name, settings, command, before)
    write_report(output, report)
    print(text_table(report))
    print(f"{output}: report.json, report.md, report.png")


def evaluate_on_tasks(arguments: argparse.Namespace, command: str) -> None:
    name = only_model(arguments)
    output = arguments.output or Path("reports", Path(name).resolve().name)
    tasks = open_tasks(arguments.tasks, arguments.overrides, arguments.task_length)
    path = model_folder(name)
    tokenizer = load_tokenizer(path, "--model")
    model = load_model(path, "--model", dtype=arguments.dtype)
    config = chosen_config(model, arguments)
    names = arguments.strategies or ["full", "refresh", *(["similarity"] if config.threshold else []), "snapkv"]
    decodings = build_decodings(names, config)
    enable(model, config).to(chosen_device(arguments.device)).eval()
    examples = make_examples(model, tokenizer, tasks, arguments.examples)
    store = open_store(model, arguments)
    records = Records(check_output(output, arguments.overwrite, arguments.resume, TASK_FILES) / EXAMPLES_FILE)

    results = evaluate_tasks(model, tokenizer, examples, decodings, records, arguments.batch_size, store=store)

    settings = {**circumstances(model, arguments), "examples": arguments.examples}
    if store is not None:
        settings["prefix store"] = f"{arguments.prefix_store}; seconds are without the prompts'"
    report = build_task_report(results, tasks, decodings, name, settings, command)
    write_task_report(output, report)
    print(task_table(report))
    print(f"{output}: tasks.json, tasks.md, examples.jsonl")


def open_store(model: PreTrainedModel, arguments: argparse.Namespace) -> PrefixStore | None:
    if arguments.prefix_store is None:
        return None
    most = int(arguments.prefix_store_gb * 10**9)
    return PrefixStore(arguments.prefix_store, most, model, setting="--prefix-store")


def evaluate_suite(arguments: argparse.Namespace, command: str) -> None:
    suite, file = load_suite(arguments.suite, ROOT)
    output = arguments.output or Path("reports", file.stem)
    models = named_models(suite, arguments.model)
    suite, changes = change(
        suite,
        Changes(
            rows=arguments.rows,
            last_tokens=arguments.last_tokens,
            examples=arguments.examples,
            task_length=arguments.task_length,
            corpora=corpora(arguments.corpus),
            without=arguments.without,
            refresh=changed_values(arguments),
            tasks=task_values(arguments.overrides),
        ),
    )
    opened = open_suite(suite)
    place = chosen_device(arguments.device)

    def load(path: str) -> PreTrainedModel:
        return load_model(path, "--model", dtype=arguments.dtype).to(place).eval()

    folder = check_output(output, arguments.overwrite, arguments.resume, SUITE_FILES)
    results = run_suite(suite, opened, models, load, folder, arguments.batch_size, arguments.decode)

    settings = {
        "dtype": arguments.dtype,
        "device": place,
        "batch size": arguments.batch_size,
        "decode": "where the table shows times or memory" if arguments.decode is None else arguments.decode,
    }
    notes = changes + opened.notes(suite)
    shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
    report = build_suite_report(suite, file.stem, str(shown), results, notes, settings, command)
    written = write_suite_report(folder, report, suite, results)
    print(suite_table(report))
    print(f"{output}: {', '.join(written)}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        help="folder or hub id of a transformers model; with --suite also NAME=MODEL, and more than once",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="folder of rows that launch/prepare.py wrote")
    source.add_argument(
        "--tasks", type=comma_separated, help="tasks, separated by commas; ruler stands for all of RULER's"
    )
    source.add_argument("--suite", help="a table of the paper, such as paper-table-1 (configs/suites), or a YAML file")
    parser.add_argument("--split", choices=SPLITS, help="(default: test)")
    parser.add_argument("--last-tokens", type=int, help="tokens scored per row (default: 256, or the suite's)")
    parser.add_argument(
        "--rows", type=int, help=f"rows, spread over the split (default: {DEFAULT_ROWS} or all, or the suite's)"
    )
    parser.add_argument("--strides", type=whole_numbers, help="of the default strategies (default: 5,10,25,50)")
    parser.add_argument("--task-length", type=int, help="tokens of prompt and answer (default: each task's own, 4096)")
    parser.add_argument("--examples", type=int, help="examples of each task (default: 50, or the suite's)")
    parser.add_argument(
        "--strategies",
        type=comma_separated,
        help=f"ways to decode, of {', '.join(DECODINGS)}; refresh:10 and similarity:5:0.85 give stride and threshold "
        "(default: with --data full, refresh at --strides, never; with --tasks full, refresh, snapkv; both: similarity "
        "with --threshold)",
    )
    parser.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        help="decode rows token by token, also where one pass gives the same losses, for times and memory (default: "
        "with --suite those of which the table shows these)",
    )
    parser.add_argument("--corpus", action="append", help="NAME=FOLDER: other rows for one of the suite's corpora")
    parser.add_argument("--without", type=comma_separated, help="corpora and benchmarks of the suite to leave out")
    parser.add_argument(
        "--prefix-store", type=Path, help="folder of prompts' keys and values: compute each prompt once"
    )
    parser.add_argument("--prefix-store-gb", type=float, help="most GB in it (default: 20)")
    parser.add_argument("--budget", help="size of the small cache: tokens, or a fraction of the prompt such as 0.125")
    parser.add_argument("--threshold", help="evaluate the similarity schedule with this threshold as well")
    add_execution(parser)
    parser.add_argument("--compare", type=Path, help="folder of an earlier report to compare with")
    parser.add_argument("--output", type=Path, help="folder of the report (default: reports/NAME_OF_MODEL_OR_SUITE)")
    parser.add_argument("--resume", action="store_true", help="continue the evaluation in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that the folder already holds")
    parser.add_argument("overrides", nargs="*", metavar="refresh.key=value", help="schedule and selection")
    arguments = parser.parse_intermixed_args(argv)
    check_used(arguments)
    return arguments


def check_used(arguments: argparse.Namespace) -> None:
    """Refuses options of the other kinds of evaluation; gives the rest their defaults."""
    check_execution(arguments)
    if arguments.prefix_store_gb is not None and arguments.prefix_store is None:
        raise SettingsError("--prefix-store-gb needs --prefix-store")
    arguments.kind = kind = next(kind for kind in KINDS if getattr(arguments, kind) is not None)
    for name, (meaningful, defaults) in OPTIONS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, defaults.get(kind))
        elif kind not in meaningful:
            raise SettingsError(f"--{name.replace('_', '-')} means nothing with --{kind}")
    if arguments.strides and arguments.strategies:
        raise SettingsError("--strides means nothing with --strategies: write refresh:STRIDE there")
    if kind == "tasks" and not 0 < arguments.prefix_store_gb < float("inf"):
        raise SettingsError(f"--prefix-store-gb must be a number more than 0, got {arguments.prefix_store_gb}")
    if arguments.resume and arguments.overwrite:
        raise SettingsError("--resume continues an evaluation and --overwrite replaces it: choose one")
    if kind == "data" and any(override.startswith("tasks.") for override in arguments.overrides):
        raise SettingsError("tasks.NAME.key=value means nothing with --data")


def only_model(arguments: argparse.Namespace) -> str:
    if len(arguments.model) > 1:
        raise SettingsError(f"--model: only a suite takes several; --{arguments.kind} takes one")
    return arguments.model[0]


def corpora(values: list[str]) -> dict[str, str]:
    """NAME=FOLDER of --corpus, by name."""
    for value in values:
        if not all(value.partition("=")):
            raise SettingsError(f"--corpus is written NAME=FOLDER, got {value}")
    return dict(value.split("=", 1) for value in values)


def chosen_config(model: PreTrainedModel, arguments: argparse.Namespace) -> RefreshConfig:
    """The model's own settings, changed by the command line's."""
    flags = {"budget": arguments.budget, "threshold": arguments.threshold}
    return changed_config(own_config(model.config), arguments.overrides, **flags)


def changed_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line changes of the schedule and the selection."""
    flags = {"budget": arguments.budget, "threshold": arguments.threshold}
    overrides = [text for text in arguments.overrides if not text.startswith("tasks.")]
    changed = changed_config(RefreshConfig(), overrides, **flags).to_dict()
    given = [key for key, value in flags.items() if value is not None]
    given += [text.removeprefix("refresh.").partition("=")[0] for text in overrides]
    return {key: changed[key] for key in given}


def circumstances(model: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch size": arguments.batch_size,
    }


def load_earlier(folder: Path, output: Path) -> dict:
    if folder.resolve() == output.resolve():
        raise SettingsError(f"--compare and --output are the same folder, {folder}: choose another --output")
    return load_report(folder)


if __name__ == "__main__":
    cli.run(main)
