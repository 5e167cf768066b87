"""What `evaluate` and `sweep` do once their options are parsed: open, load, measure, write the report, say where it is.

Each function takes the parsed options, the command line that the report repeats and the processes that share the work,
and returns the text to print.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from refreshkv import RefreshConfig, enable
from refreshkv.evaluation.continuations.generation import GREEDILY, Continuations, continue_sequences, sampled
from refreshkv.evaluation.continuations.report import FILES as GENERATION_FILES
from refreshkv.evaluation.continuations.report import (
    TEXTS_FILE,
    build_generation_report,
    generation_table,
    write_generation_report,
)
from refreshkv.evaluation.inputs import check_tokens, open_split, open_tasks, sequences_fingerprint
from refreshkv.evaluation.perplexity.evaluation import budget_warnings, check_last_tokens, evaluate
from refreshkv.evaluation.perplexity.losses import SequenceRecords
from refreshkv.evaluation.perplexity.report import FILES as PERPLEXITY_FILES
from refreshkv.evaluation.perplexity.report import (
    build_report,
    check_comparable,
    load_report,
    protocol,
    text_table,
    write_report,
)
from refreshkv.evaluation.placing import load_placed
from refreshkv.evaluation.processes import ALONE, Processes
from refreshkv.evaluation.reports import EXAMPLES_FILE, ROWS_FILE, open_output
from refreshkv.evaluation.strategies import Strategy, build_strategies, default_strategies
from refreshkv.evaluation.suites.changes import Changes, change
from refreshkv.evaluation.suites.config import load_suite, named_models
from refreshkv.evaluation.suites.report import FILES as SUITE_FILES
from refreshkv.evaluation.suites.report import build_suite_report, suite_table, write_suite_report
from refreshkv.evaluation.suites.run import open_suite, run_suite
from refreshkv.evaluation.sweep.grid import load_grid
from refreshkv.evaluation.sweep.recommendation import Sweep, sweep_strategies
from refreshkv.evaluation.sweep.report import FILES as SWEEP_FILES
from refreshkv.evaluation.sweep.report import build_sweep_report, sweep_table, write_sweep_report
from refreshkv.evaluation.tasks.report import FILES as TASK_FILES
from refreshkv.evaluation.tasks.report import build_task_report, task_table, write_task_report
from refreshkv.evaluation.tasks.scores import (
    BatchOptions,
    ExampleRecords,
    TaskResult,
    evaluate_tasks,
    generation_settings,
    make_examples,
)
from refreshkv.generation.inherited import refuse_own_settings
from refreshkv.loading import load_tokenizer, model_folder, own_config
from refreshkv.options import changed_config, chosen_device, chosen_origin, task_values
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError

DEFAULT_STRIDES = [5, 10, 25, 50]


def measure_perplexity(options: argparse.Namespace, command: str, processes: Processes = ALONE) -> str:
    """`evaluate --data`: perplexity of the last tokens of prepared sequences."""
    (name,) = options.model
    output = options.output or Path("reports", Path(name).resolve().name)
    before = _earlier_report(options.compare, output) if options.compare else None
    rows, split = open_split(options.data, options.split, options.rows)
    row_length = len(split[0]["input_ids"])
    check_last_tokens(options.last_tokens, row_length)

    path = model_folder(name, "--model")
    model = load_placed(path, options, processes)
    check_tokens(model, path, rows, chosen_origin(options))
    config = _chosen_config(model, options)
    strategies = _perplexity_strategies(config, options)
    measured = protocol(
        rows.info["fingerprint"], options.split, len(split), row_length, options.last_tokens, strategies
    )
    if before:
        check_comparable(before, measured, options.compare)
    enable(model, config)
    folder = processes.from_first(lambda: open_output(output, PERPLEXITY_FILES, options.overwrite, options.resume))
    for warning in budget_warnings(strategies, row_length, options.last_tokens) if processes.is_first else ():
        print(f"warning: {warning}", file=sys.stderr)

    records = SequenceRecords(folder / ROWS_FILE, processes)
    how = {"batch_size": options.batch_size, "stepwise": options.decode, "records": records}
    evaluation = evaluate(model, split, strategies, options.last_tokens, **how)

    settings = {"data": options.data, "refresh": config.to_dict(), **_execution(model, options, processes)}
    report = build_report(evaluation, measured, name, settings, command, before)
    written = processes.from_first(lambda: write_report(output, report))
    return f"{text_table(report)}\n{output}: {', '.join(written)}"


def measure_generation(options: argparse.Namespace, command: str, processes: Processes = ALONE) -> str:
    """`evaluate --data --generate`: what the model writes after long prompts, judged by its full attention."""
    if processes.world > 1:
        raise SettingsError("--generate runs in one process: start it without torchrun or accelerate launch")
    (name,) = options.model
    output = options.output or Path("reports", f"{Path(name).resolve().name}-generation")
    rows, split = open_split(options.data, options.split, options.rows)
    row_length, new_tokens = len(split[0]["input_ids"]), options.generate
    if new_tokens >= row_length:
        raise SettingsError(
            f"--generate must be less than the {row_length} tokens of the sequences, whose first ones are the prompt, "
            f"got {new_tokens}"
        )
    path = model_folder(name, "--model")
    model = load_placed(path, options, processes)
    check_tokens(model, path, rows, chosen_origin(options))
    refuse_own_settings(model)
    config = _chosen_config(model, options)
    strategies = _grid_or_named(options, ["full", "refresh"], config)
    enable(model, config)
    folder = open_output(output, GENERATION_FILES, options.overwrite, options.resume)

    decodings = [GREEDILY]
    if options.sample:
        decodings.append(sampled(options.temperature, options.top_p, options.seed))
    records = Continuations(folder / TEXTS_FILE)
    found = continue_sequences(model, split, strategies, decodings, new_tokens, records, options.batch_size)

    settings = {
        "data": options.data,
        "split": options.split,
        "fingerprint": sequences_fingerprint(split),
        "sequences": len(split),
        "prompt": row_length - new_tokens,
        "generated": new_tokens,
        "decoding": {decoding.name: decoding.settings for decoding in decodings},
        "strategies": {strategy.name: strategy.settings for strategy in strategies},
        **_execution(model, options, processes),
    }
    report = build_generation_report(found, name, settings, command)
    written = write_generation_report(folder, report)
    return f"{generation_table(report)}\n{output}: {', '.join(written)}"


def score_tasks(options: argparse.Namespace, command: str, processes: Processes = ALONE) -> str:
    """`evaluate --tasks`: scores of generated answers."""
    (name,) = options.model
    output = options.output or Path("reports", Path(name).resolve().name)
    tasks = open_tasks(options.tasks, options.overrides, options.task_length)
    path = model_folder(name, "--model")
    tokenizer = load_tokenizer(path, "--model", chosen_origin(options))
    model = load_placed(path, options, processes)
    config = _chosen_config(model, options)
    default = ["full", "refresh", *(["similarity"] if config.threshold else []), "snapkv"]
    strategies = _grid_or_named(options, default, config)
    enable(model, config)
    work = make_examples(model, tokenizer, tasks, options.examples, progress=processes.is_first)
    store = _open_store(model, options, processes)
    folder = processes.from_first(lambda: open_output(output, TASK_FILES, options.overwrite, options.resume))
    records = ExampleRecords(folder / EXAMPLES_FILE, processes)

    batches = BatchOptions(options.batch_size, options.mix_tasks, options.compile, options.stop_after)
    results = evaluate_tasks(model, tokenizer, work, strategies, records, batches, store=store)

    settings = {**_execution(model, options, processes), "examples": options.examples}
    if options.mix_tasks:
        settings["batches"] = "of several tasks; a task's seconds are its share of theirs"
    if not options.compile:
        settings["compiled"] = "no; seconds are not those of generation at full speed"
    settings |= generation_settings(model, tokenizer)
    if store is not None:
        settings["prefix store"] = f"{options.prefix_store}; seconds are without the prompts'"
    report = build_task_report(results, tasks, strategies, name, settings, command)
    processes.from_first(lambda: write_task_report(output, report))
    return f"{task_table(report)}\n{output}: {', '.join(TASK_FILES)}"


def measure_suite(options: argparse.Namespace, command: str, root: Path, processes: Processes = ALONE) -> str:
    """`evaluate --suite`: a table or figure of the paper. root: folder from which the report names the file."""
    suite, file = load_suite(options.suite)
    output = options.output or Path("reports", file.stem)
    models = named_models(suite, options.model)
    suite, differences = change(suite, _suite_changes(options))
    opened = open_suite(suite)
    where = _where(options, processes)

    def load(path: str) -> PreTrainedModel:
        return load_placed(path, options, processes)

    folder = processes.from_first(lambda: open_output(output, SUITE_FILES, options.overwrite, options.resume))
    how = {"progress": processes.is_first, "processes": processes, "origin": chosen_origin(options)}
    results = run_suite(suite, opened, models, load, folder, options.batch_size, options.decode, **how)

    settings = {
        "dtype": options.dtype,
        "device": chosen_device(options.device),
        **where,
        "batch size": options.batch_size,
        "decode": "where the table shows times or memory" if options.decode is None else options.decode,
    }
    notes = differences + opened.notes(suite)
    shown = file.relative_to(root) if file.is_relative_to(root) else file
    report = build_suite_report(suite, file.stem, str(shown), results, notes, settings, command)
    written = processes.from_first(lambda: write_suite_report(folder, report, suite, results))
    return f"{suite_table(report)}\n{output}: {', '.join(written)}"


def sweep_thresholds(options: argparse.Namespace, command: str, processes: Processes = ALONE) -> str:
    """`sweep`: recommends a threshold of the similarity schedule."""
    output = options.output or Path("reports", f"{Path(options.model).resolve().name}-sweep")
    rows, split = open_split(options.data, options.split, options.rows)
    check_last_tokens(options.last_tokens, len(split[0]["input_ids"]))
    path = model_folder(options.model, "--model")
    model = load_placed(path, options, processes)
    check_tokens(model, path, rows, chosen_origin(options))
    config = changed_config(own_config(model.config), options.overrides, budget=options.budget)
    strategies = sweep_strategies(config, options.strides or [config.stride], options.thresholds)
    enable(model, config)
    tokenizer, work = None, []
    if options.tasks:
        tasks = open_tasks(options.tasks, options.overrides, options.task_length)
        tokenizer = load_tokenizer(path, "--model", chosen_origin(options))
        work = make_examples(model, tokenizer, tasks, options.examples, progress=processes.is_first)
    folder = processes.from_first(lambda: open_output(output, SWEEP_FILES, options.overwrite, options.resume))

    how = {"batch_size": options.batch_size, "records": SequenceRecords(folder / ROWS_FILE, processes)}
    evaluation = evaluate(model, split, strategies, options.last_tokens, **how)
    results = []
    if tokenizer is not None:
        examples, batches = ExampleRecords(folder / EXAMPLES_FILE, processes), BatchOptions(options.batch_size)
        results = evaluate_tasks(model, tokenizer, work, strategies, examples, batches)

    sweep = Sweep(evaluation, options.keep, _mean_scores(results))
    settings = {
        "data": options.data,
        "split": options.split,
        "refresh": config.to_dict(),
        "tasks": ", ".join(task.label for task, _ in work) or "none",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **_where(options, processes),
        **({} if tokenizer is None else generation_settings(model, tokenizer)),
    }
    report = build_sweep_report(sweep, options.model, settings, command)
    written = processes.from_first(lambda: write_sweep_report(output, sweep, report))
    warnings = [f"warning: {text}" for text in evaluation.warnings]
    where = f"{output}: {', '.join(written)}"
    return "\n".join([sweep_table(sweep), *warnings, report["recommendation"]["text"], where])


def _grid_or_named(options: argparse.Namespace, default: list[str], config: RefreshConfig) -> list[Strategy]:
    """The strategies of --grid, or those that --strategies names. default: names without either."""
    if options.grid:
        return load_grid(options.grid).build_strategies()
    return build_strategies(options.strategies or default, config)


def _perplexity_strategies(config: RefreshConfig, options: argparse.Namespace) -> list[Strategy]:
    if not options.strategies:
        return default_strategies(config, options.strides or DEFAULT_STRIDES)
    strategies = build_strategies(options.strategies, config)
    if not any(strategy.is_full for strategy in strategies):
        raise SettingsError("--strategies: with --data full must be among them: all others are compared with it")
    return strategies


def _flags(options: argparse.Namespace) -> dict[str, str | None]:
    return {"budget": options.budget, "threshold": options.threshold}


def _chosen_config(model: PreTrainedModel, options: argparse.Namespace) -> RefreshConfig:
    """The model's own schedule and selection, overridden by the command line's."""
    return changed_config(own_config(model.config), options.overrides, **_flags(options))


def _suite_changes(options: argparse.Namespace) -> Changes:
    return Changes(
        rows=options.rows,
        last_tokens=options.last_tokens,
        examples=options.examples,
        task_length=options.task_length,
        corpora=_corpus_folders(options.corpus),
        without=options.without,
        refresh=_changed_values(options),
        tasks=task_values(options.overrides),
    )


def _changed_values(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `RefreshConfig` that the command line sets."""
    flags = _flags(options)
    overrides = [text for text in options.overrides if not text.startswith("tasks.")]
    changed = changed_config(RefreshConfig(), overrides, **flags).to_dict()
    if any(text.startswith("refresh=") for text in overrides):
        return changed
    given = [key for key, value in flags.items() if value is not None]
    given += [text.removeprefix("refresh.").partition("=")[0] for text in overrides]
    return {key: changed[key] for key in given}


def _corpus_folders(values: list[str]) -> dict[str, str]:
    """Corpus -> folder, from --corpus NAME=FOLDER."""
    for value in values:
        if not all(value.partition("=")):
            raise SettingsError(f"--corpus is written NAME=FOLDER, got {value}")
    return dict(value.split("=", 1) for value in values)


def _execution(model: PreTrainedModel, options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **_where(options, processes),
        "batch size": options.batch_size,
    }


def _where(options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """What reports say of several processes and devices, of a revision and of code; nothing of the defaults."""
    found = {"processes": processes.world if processes.world > 1 else None, "device map": options.device_map}
    found |= chosen_origin(options).settings()
    return {name: value for name, value in found.items() if value is not None}


def _earlier_report(folder: Path, output: Path) -> dict[str, Any]:
    if folder.resolve() == output.resolve():
        raise SettingsError(f"--compare and --output are the same folder, {folder}: choose another --output")
    return load_report(folder)


def _open_store(model: PreTrainedModel, options: argparse.Namespace, processes: Processes) -> PrefixStore | None:
    if options.prefix_store is None:
        return None
    if processes.world > 1:
        raise SettingsError("--prefix-store computes each prompt once in one process: leave it out, or start one")
    capacity = int(options.prefix_store_gb * 10**9)
    shared = bool(options.prefix_store_shared)
    return PrefixStore(options.prefix_store, capacity, model, setting="--prefix-store", shared=shared)


def _mean_scores(results: list[TaskResult]) -> dict[str, float]:
    """Strategy -> mean score over all tasks."""
    names = dict.fromkeys(result.decoding for result in results)
    return {name: fmean(r.scores["score"] for r in results if r.decoding == name) for name in names}
