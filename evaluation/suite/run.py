"""Runs a suite: every corpus and benchmark on every model under every line's way to decode. Finished rows and examples
are kept in files, so that an interrupted run goes on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from datasets import Dataset
from transformers import PreTrainedModel

from refreshkv import enable
from refreshkv.data.rows import Rows
from refreshkv.data.tasks.registry import build_tasks
from refreshkv.data.tasks.task import Task
from refreshkv.evaluation.inputs import check_tokens, open_split
from refreshkv.evaluation.perplexity import Evaluation, Result, check_last_tokens, evaluate
from refreshkv.evaluation.report import ROWS_FILE
from refreshkv.evaluation.sequence_losses import RowRecords
from refreshkv.evaluation.suite.config import Corpus, Suite
from refreshkv.evaluation.task_report import EXAMPLES_FILE
from refreshkv.evaluation.task_scores import Records, TaskResult, evaluate_tasks, make_examples
from refreshkv.loading import load_tokenizer
from refreshkv.settings import SettingsError


@dataclass
class Measured:
    """What one model gave."""

    path: str
    figures: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    """Line -> corpus or benchmark -> perplexity or score, effective stride, seconds, peak GiB, cache MiB."""
    strides: dict[str, dict[str, dict[int, float | None]]] = field(default_factory=dict)
    """Line -> corpus or benchmark -> refreshed layer -> decoding steps per full step."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Corpus -> all about its rows."""
    tasks: dict[str, list[TaskResult]] = field(default_factory=dict)
    """Benchmark -> all about its tasks."""

    @property
    def warnings(self) -> list[str]:
        """What makes the figures mean less than they seem to."""
        return [f"{name}: {text}" for name, item in self.evaluations.items() for text in item.warnings]


@dataclass(frozen=True)
class Opened:
    """The corpora and tasks of a suite, looked at before any model is."""

    rows: dict[str, tuple[Rows, Dataset]]
    tasks: dict[str, list[Task]]

    def notes(self, suite: Suite) -> list[str]:
        """One phrase for each thing that is not the paper's."""
        notes = []
        for name, (_, split) in self.rows.items():
            length, expected = len(split[0]["input_ids"]), suite.corpora[name].row_length
            if length != expected:
                notes.append(f"{name}: rows of {length:,} tokens instead of {expected:,}")
        for tasks in self.tasks.values():
            notes += [
                f"{task.label}: {', '.join(task.family.substitutes)}" for task in tasks if task.family.substitutes
            ]
        return notes


def open_suite(suite: Suite) -> Opened:
    """Finds everything that the suite needs.

    Raises `SettingsError` that says how to make, or leave out, what is missing.
    """
    rows = {name: _open_corpus(name, corpus) for name, corpus in suite.corpora.items()}
    tasks = {}
    for name, benchmark in suite.benchmarks.items():
        try:
            tasks[name] = build_tasks(benchmark.tasks, benchmark.settings, length=benchmark.length)
        except SettingsError as error:
            raise SettingsError(f"{error}; or leave it out with --without {name}") from None
    return Opened(rows, tasks)


def _open_corpus(name: str, corpus: Corpus) -> tuple[Rows, Dataset]:
    if not Path(corpus.data).is_dir():
        raise SettingsError(
            f"{name}: there are no rows in {corpus.data}; make them with `{corpus.prepare}`, name others with "
            f"--corpus {name}=FOLDER, or leave it out with --without {name}"
        )
    rows, split = open_split(corpus.data, corpus.split, corpus.rows)
    check_last_tokens(corpus.last_tokens, len(split[0]["input_ids"]))
    return rows, split


def run_suite(
    suite: Suite,
    opened: Opened,
    models: dict[str, str],
    load: Callable[[str], PreTrainedModel],
    folder: Path,
    batch_size: int = 1,
    stepwise: bool | None = None,
    progress: bool = True,
) -> dict[str, Measured]:
    """Measures all that the suite's table needs, by model.

    Args:
        models: name -> folder or hub id; they are loaded one after the other.
        load: gives a transformers decoder on its device, in evaluation mode.
        folder: finished rows and examples are kept here; what is there already is not computed again.
        stepwise: decode the corpora token by token under every strategy, so that all have times and memory. None: those
            of which the table shows these.

    Raises `SettingsError` for a model that the rows or tasks do not fit.
    """
    row_records, example_records = RowRecords(folder / ROWS_FILE), Records(folder / EXAMPLES_FILE)
    results = {}
    for name, path in models.items():
        model = enable(load(path), suite.config())
        measured = results[name] = Measured(path)
        decodings = {of: suite.decodings(of, name) for of in [*opened.rows, *opened.tasks]}
        corpora = {of: own for of, own in opened.rows.items() if decodings[of]}
        for rows, _ in corpora.values():
            check_tokens(model, path, rows)
        tasks = {of: own for of, own in opened.tasks.items() if decodings[of]}
        tokenizer = load_tokenizer(path, "--model") if tasks else None
        work = {  # all of it before the long part: some may not fit the model
            of: make_examples(model, tokenizer, own, suite.benchmarks[of].examples, progress)
            for of, own in tasks.items()
        }
        for of, (_, split) in corpora.items():
            decodes = suite.shows_costs(of) if stepwise is None else stepwise
            options = {"batch_size": batch_size, "stepwise": decodes, "records": row_records, "progress": progress}
            _add_rows(measured, of, evaluate(model, split, decodings[of], suite.corpora[of].last_tokens, **options))
        for of, examples in work.items():
            options = {"batch_size": batch_size, "progress": progress}
            found = evaluate_tasks(model, tokenizer, examples, decodings[of], example_records, **options)
            _add_tasks(measured, of, found)
    return results


def _add_rows(measured: Measured, corpus: str, evaluation: Evaluation) -> None:
    measured.evaluations[corpus] = evaluation
    for result in evaluation.results:
        measured.figures.setdefault(result.name, {})[corpus] = {"perplexity": result.perplexity, **_row_costs(result)}
        if result.effective_strides:
            measured.strides.setdefault(result.name, {})[corpus] = result.effective_strides


def _row_costs(result: Result) -> dict[str, float | None]:
    held = result.cache_bytes
    return {
        "effective stride": result.effective_stride,
        "seconds": result.seconds,
        "peak GiB": None if result.peak_memory is None else result.peak_memory / 2**30,
        "cache MiB": None if held is None else held / 2**20,
    }


def _add_tasks(measured: Measured, benchmark: str, results: list[TaskResult]) -> None:
    measured.tasks[benchmark] = results
    for line in dict.fromkeys(result.decoding for result in results):
        own = [result for result in results if result.decoding == line]
        held = [result.cache_bytes for result in own if result.cache_bytes is not None]
        peaks = [result.peak_memory for result in own if result.peak_memory is not None]
        layers = {layer for result in own for layer in result.effective_strides or {}}
        strides = {layer: _mean_stride([result.effective_strides[layer] for result in own]) for layer in sorted(layers)}
        measured.figures.setdefault(line, {})[benchmark] = {
            "score": 100 * fmean(result.scores["score"] for result in own),
            "effective stride": _mean_stride(list(strides.values())),
            "seconds": sum(result.seconds for result in own) / sum(result.examples for result in own),
            "peak GiB": max(peaks) / 2**30 if peaks else None,
            "cache MiB": max(held) / 2**20 if held else None,
        }
        if strides:
            measured.strides.setdefault(line, {})[benchmark] = strides


def _mean_stride(strides: list[float | None]) -> float | None:
    """Steps per full step where each of the strides had as many steps; None if no step was full."""
    rates = [1 / stride if stride else 0.0 for stride in strides]
    return len(rates) / sum(rates) if any(rates) else None
