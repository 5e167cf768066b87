"""Recommends a threshold of the similarity schedule for a model (the paper's appendix A.4).

    python launch/sweep.py --model DIR_OR_HUB_ID --data ROWS [--thresholds 0.7,0.8,0.9] [refresh.key=value ...]

Measures the perplexity of rows' last tokens and the effective stride for each threshold, beside fixed schedules, and
recommends the threshold that saves most full steps among those that keep --keep of what refreshing gains. With --tasks
their mean score under each schedule stands beside it. Writes sweep.json, sweep.md and sweep.png; an interrupted sweep
is continued with --resume.
"""

import argparse
import shlex
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refreshkv import cli, enable
from refreshkv.data.rows import SPLITS
from refreshkv.evaluation.inputs import check_tokens, open_split, open_tasks
from refreshkv.evaluation.perplexity import check_last_tokens, evaluate
from refreshkv.evaluation.report import ROWS_FILE, check_output
from refreshkv.evaluation.sequence_losses import RowRecords
from refreshkv.evaluation.sweep.recommendation import THRESHOLDS, Sweep, sweep_strategies
from refreshkv.evaluation.sweep.report import FILES, build_sweep_report, sweep_table, write_sweep_report
from refreshkv.evaluation.task_report import EXAMPLES_FILE
from refreshkv.evaluation.task_scores import Records, TaskResult, Work, evaluate_tasks, make_examples
from refreshkv.loading import load_model, load_tokenizer, model_folder, own_config
from refreshkv.options import (
    add_execution,
    changed_config,
    check_execution,
    chosen_device,
    comma_separated,
    whole_numbers,
)
from refreshkv.settings import SettingsError

DEFAULT_EXAMPLES = 20


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    output = arguments.output or Path("reports", f"{Path(arguments.model).resolve().name}-sweep")
    rows, split = open_split(arguments.data, arguments.split, arguments.rows)
    check_last_tokens(arguments.last_tokens, len(split[0]["input_ids"]))
    path = model_folder(arguments.model)
    model = load_model(path, "--model", dtype=arguments.dtype)
    check_tokens(model, path, rows)
    config = changed_config(own_config(model.config), arguments.overrides, budget=arguments.budget)
    strategies = sweep_strategies(config, arguments.strides or [config.stride], arguments.thresholds)
    enable(model, config).to(chosen_device(arguments.device)).eval()
    tokenizer, work = draw_tasks(model, path, arguments) if arguments.tasks else (None, [])
    folder = check_output(output, arguments.overwrite, arguments.resume, FILES)

    options = {"batch_size": arguments.batch_size, "records": RowRecords(folder / ROWS_FILE)}
    evaluation = evaluate(model, split, strategies, arguments.last_tokens, **options)
    options["records"] = Records(folder / EXAMPLES_FILE)
    results = evaluate_tasks(model, tokenizer, work, strategies, **options) if work else []

    sweep = Sweep(evaluation, arguments.keep, mean_scores(results))
    settings = {
        "data": arguments.data,
        "split": arguments.split,
        "refresh": config.to_dict(),
        "tasks": ", ".join(task.label for task, _ in work) or "none",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    command = shlex.join(["python", "launch/sweep.py", *argv])
    report = build_sweep_report(sweep, arguments.model, settings, command)
    write_sweep_report(output, sweep, report)
    print("\n".join([sweep_table(sweep), *(f"warning: {text}" for text in evaluation.warnings)]))
    print(report["recommendation"]["text"])
    print(f"{output}: sweep.json, sweep.md, sweep.png")


def draw_tasks(
    model: PreTrainedModel, path: str, arguments: argparse.Namespace
) -> tuple[PreTrainedTokenizerBase, Work]:
    tasks = open_tasks(arguments.tasks, arguments.overrides, arguments.task_length)
    tokenizer = load_tokenizer(path, "--model")
    return tokenizer, make_examples(model, tokenizer, tasks, arguments.examples)


def mean_scores(results: list[TaskResult]) -> dict[str, float]:
    """Of all tasks, by strategy."""
    names = dict.fromkeys(result.decoding for result in results)
    return {name: fmean(r.scores["score"] for r in results if r.decoding == name) for name in names}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a transformers model")
    parser.add_argument("--data", required=True, help="folder of rows that launch/prepare.py wrote")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, help="rows, spread over the split (default: 100 or all)")
    parser.add_argument("--last-tokens", type=int, default=256, help="tokens scored per row (default: %(default)s)")
    parser.add_argument("--thresholds", type=cosines, default=THRESHOLDS, help="(default: 0.3 to 0.98)")
    parser.add_argument("--tasks", type=comma_separated, help="tasks to score as well, separated by commas")
    parser.add_argument("--task-length", type=int, help="tokens of prompt and answer (default: each task's own, 4096)")
    parser.add_argument("--examples", type=int, help=f"examples of each task (default: {DEFAULT_EXAMPLES})")
    parser.add_argument("--strides", type=whole_numbers, help="check strides (default: the model's own)")
    parser.add_argument("--keep", type=float, default=0.9, help="share of the gain to keep (default: %(default)s)")
    parser.add_argument("--budget", help="size of the small cache: tokens, or a fraction of the prompt such as 0.125")
    add_execution(parser)
    parser.add_argument("--output", type=Path, help="folder of the report (default: reports/NAME_OF_THE_MODEL-sweep)")
    parser.add_argument("--resume", action="store_true", help="continue the sweep in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace a sweep that the folder already holds")
    parser.add_argument("overrides", nargs="*", metavar="refresh.key=value", help="selection; tasks.NAME.key=value")
    arguments = parser.parse_intermixed_args(argv)
    check_execution(arguments)
    if arguments.resume and arguments.overwrite:
        raise SettingsError("--resume continues a sweep and --overwrite replaces it: choose one")
    of_tasks = [arguments.examples, arguments.task_length, *(text.startswith("tasks.") for text in arguments.overrides)]
    if not arguments.tasks and any(of_tasks):
        raise SettingsError("--examples, --task-length and tasks.NAME.key=value mean nothing without --tasks")
    arguments.examples = DEFAULT_EXAMPLES if arguments.examples is None else arguments.examples
    if not 0 < arguments.keep <= 1:
        raise SettingsError(f"--keep is a share, more than 0 and at most 1, got {arguments.keep}")
    return arguments


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
