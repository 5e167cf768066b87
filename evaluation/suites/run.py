"""Runs a suite: every corpus and benchmark with every model, under the strategy of every table line.

Files keep finished sequences and examples, so that an interrupted run can continue.
"""

import math
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
from refreshkv.evaluation.costs import effective_stride
from refreshkv.evaluation.inputs import check_tokens, open_split
from refreshkv.evaluation.perplexity.evaluation import check_last_tokens, evaluate
from refreshkv.evaluation.perplexity.losses import SequenceRecords
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.processes import ALONE, Processes
from refreshkv.evaluation.reports import EXAMPLES_FILE, ROWS_FILE
from refreshkv.evaluation.suites.config import Corpus, Suite
from refreshkv.evaluation.tasks.scores import BatchOptions, ExampleRecords, TaskResult, evaluate_tasks, make_examples
from refreshkv.loading import PLAIN, Origin, load_tokenizer
from refreshkv.settings import SettingsError


@dataclass
class Measured:
    """All that was measured with one model."""

    path: str
    figures: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    """Line -> corpus or benchmark -> perplexity or score, effective stride, seconds, peak GiB, cache MiB."""
    strides: dict[str, dict[str, dict[int, float | None]]] = field(default_factory=dict)
    """Line -> corpus or benchmark -> refreshed layer -> decoding steps per full step."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Corpus -> perplexities."""
    tasks: dict[str, list[TaskResult]] = field(default_factory=dict)
    """Benchmark -> scores."""

    @property
    def warnings(self) -> list[str]:
        """Settings under which the figures mean less than they seem to."""
        return [f"{name}: {text}" for name, item in self.evaluations.items() for text in item.warnings]


@dataclass(frozen=True)
class Opened:
    """The corpora and tasks of a suite, opened and checked before any model is loaded."""

    rows: dict[str, tuple[Rows, Dataset]]
    tasks: dict[str, list[Task]]

    def notes(self, suite: Suite) -> list[str]:
        """The differences from the paper, one phrase each."""
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
    """Opens the corpora and builds the tasks.

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
    decoded = corpus.decoded_tokens or corpus.last_tokens
    if decoded < corpus.last_tokens:
        raise SettingsError(
            f"{name}: decoded_tokens={decoded} must be at least the {corpus.last_tokens} scored tokens (--last-tokens)"
        )
    check_last_tokens(decoded, len(split[0]["input_ids"]))
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
    processes: Processes = ALONE,
    origin: Origin = PLAIN,
) -> dict[str, Measured]:
    """Measures all that the suite's table shows; returns it by model.

    Args:
        models: name -> folder or Hub id; one is loaded at a time.
        load: returns a transformers decoder on its device, in evaluation mode.
        folder: keeps finished sequences and examples, which are not computed again.
        stepwise: decode the corpora token by token under every strategy, so that all have times and memory. None: only
            the corpora whose times or memory the table shows.
        processes: those that share the work.
        origin: of all models, as `load` takes it.

    Raises `SettingsError` for a model that the corpora or tasks do not fit.
    """
    sequence_records = SequenceRecords(folder / ROWS_FILE, processes)
    example_records = ExampleRecords(folder / EXAMPLES_FILE, processes)
    results = {}
    for name, path in models.items():
        model = enable(load(path), suite.config())
        measured = results[name] = Measured(path)
        strategies = {of: suite.strategies(of, name) for of in [*opened.rows, *opened.tasks]}
        corpora = {of: own for of, own in opened.rows.items() if strategies[of]}
        for rows, _ in corpora.values():
            check_tokens(model, path, rows, origin)
        tasks = {of: own for of, own in opened.tasks.items() if strategies[of]}
        tokenizer = load_tokenizer(path, "--model", origin) if tasks else None
        work = {}  # before the long part: some tasks may not fit the model
        if tokenizer is not None:
            work = {
                of: make_examples(model, tokenizer, own, suite.benchmarks[of].examples, progress)
                for of, own in tasks.items()
            }
        for of, (_, split) in corpora.items():
            decodes = suite.shows_costs(of) if stepwise is None else stepwise
            options = {"batch_size": batch_size, "stepwise": decodes, "records": sequence_records, "progress": progress}
            corpus = suite.corpora[of]
            decoded = corpus.decoded_tokens or corpus.last_tokens
            evaluation = evaluate(model, split, strategies[of], decoded, **options)
            _add_perplexities(measured, of, evaluation, corpus.last_tokens)
        for of, examples in work.items():
            batches = BatchOptions(batch_size)
            assert tokenizer is not None
            scores = evaluate_tasks(model, tokenizer, examples, strategies[of], example_records, batches, progress)
            _add_scores(measured, of, scores)
    return results


def _add_perplexities(measured: Measured, corpus: str, evaluation: Evaluation, last_tokens: int) -> None:
    """Adds the perplexity of the last `last_tokens` decoded tokens, and the costs of all decoded ones."""
    measured.evaluations[corpus] = evaluation
    for result in evaluation.results:
        perplexity = math.exp(fmean(result.losses[-last_tokens:]))
        measured.figures.setdefault(result.name, {})[corpus] = {"perplexity": perplexity, **_costs(result)}
        if result.effective_strides:
            measured.strides.setdefault(result.name, {})[corpus] = result.effective_strides


def _costs(result: Result) -> dict[str, float | None]:
    held = result.cache_bytes
    return {
        "effective stride": result.effective_stride,
        "seconds": result.seconds,
        "peak GiB": None if result.peak_memory is None else result.peak_memory / 2**30,
        "cache MiB": None if held is None else held / 2**20,
    }


def _add_scores(measured: Measured, benchmark: str, results: list[TaskResult]) -> None:
    measured.tasks[benchmark] = results
    for line in dict.fromkeys(result.decoding for result in results):
        own = [result for result in results if result.decoding == line]
        held = [result.cache_bytes for result in own if result.cache_bytes is not None]
        peaks = [result.peak_memory for result in own if result.peak_memory is not None]
        found = [result.effective_strides for result in own if result.effective_strides is not None]
        layers = {layer for of_task in found for layer in of_task}
        strides = {layer: effective_stride([of_task[layer] for of_task in found]) for layer in sorted(layers)}
        measured.figures.setdefault(line, {})[benchmark] = {
            "score": 100 * fmean(result.scores["score"] for result in own),
            "effective stride": effective_stride(list(strides.values())),
            "seconds": sum(result.seconds for result in own) / sum(result.examples for result in own),
            "peak GiB": max(peaks) / 2**30 if peaks else None,
            "cache MiB": max(held) / 2**20 if held else None,
        }
        if strides:
            measured.strides.setdefault(line, {})[benchmark] = strides
