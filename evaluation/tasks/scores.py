"""Scores of tasks when a model generates the answers, under several strategies.

Greedy decoding through `model.generate`, in batches with left padding. Each finished example is a line of a file, so
that an interrupted evaluation can continue.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refreshkv import decode_ahead
from refreshkv.cache.keyword import as_keyword
from refreshkv.data.tasks.task import Example, Task
from refreshkv.evaluation.caches import GREEDY, Caches
from refreshkv.evaluation.costs import Meter, count_full_steps, held_bytes
from refreshkv.evaluation.inputs import vocabulary_size
from refreshkv.evaluation.records import RecordFile, record_key
from refreshkv.evaluation.strategies import Strategy
from refreshkv.generation.finite import FiniteLogits
from refreshkv.generation.inherited import refuse_own_settings, without_own_settings
from refreshkv.identity import fingerprint, tokenizer_identity
from refreshkv.prefix.fill import validate_takes_prefix
from refreshkv.prefix.recycling import Reuse, recycle, store_prompts
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError, settings_from_dict

CAPACITY_STEP = 128
"""Caches are made for a multiple of this many tokens: each other size would be compiled anew."""


@dataclass(frozen=True)
class ExampleRecord:
    """The answer to one example, with its scores and costs: a line of the file."""

    key: str
    """Hash of everything that the answer depends on."""
    task: str
    """The task's label."""
    decoding: str
    """The strategy's name."""
    index: int
    prediction: str
    scores: dict[str, float]
    """0 to 1 each; "score" is the task's own."""
    prompt_tokens: int
    new_tokens: int
    """Generated tokens, up to the end of text."""
    seconds: float
    """The batch's time for prompts and generation, divided by its examples."""
    peak_memory: int | None
    """Most bytes that the GPU held during the batch, weights included; None on a CPU."""
    full_steps: dict[int, int] | None
    """Refreshed layer -> full steps among the `new_tokens - 1` decoding steps; None if nothing is refreshed."""
    cache_bytes: float | None = None
    """Bytes of the batch's cache at the end, divided by its examples; None in files of earlier versions."""
    reuse: dict[str, Any] | None = None
    """What the prefix store gave: tokens of the prompt, bytes, and about the seconds saved (None if not known).

    Bytes and seconds are the batch's divided by its examples. None without a store.
    """


class ExampleRecords(RecordFile[ExampleRecord]):
    """The finished examples of an evaluation, in a file."""

    kind = "an evaluation of tasks"

    def parse(self, values: dict[str, Any]) -> ExampleRecord:
        return settings_from_dict(ExampleRecord, values)


@dataclass(frozen=True)
class TaskResult:
    """Scores and costs of one task under one strategy."""

    task: str
    substitutes: tuple[str, ...]
    decoding: str
    examples: int
    scores: dict[str, float]
    """Means over the examples; "score" is the task's own."""
    standard_error: float | None
    """Standard error of the mean score over examples; None for a single one."""
    seconds: float
    peak_memory: int | None
    prompt_tokens: float
    """Mean over the examples, as `new_tokens`."""
    new_tokens: float
    effective_strides: dict[int, float | None] | None
    """Refreshed layer -> decoding steps per full step; None for a layer without one, or if nothing is refreshed."""
    cache_bytes: float | None = None
    """Bytes of one example's cache at the end; mean over the examples whose records have it."""


Work = list[tuple[Task, list[Example]]]
"""Tasks with their examples."""

Prompt = tuple[Task, Example]
"""An example and its task."""


def make_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task], count: int, progress: bool = True
) -> Work:
    """Draws the first `count` examples of each task.

    Raises `SettingsError` for prompts that do not fit the model, for tasks that cannot make so many examples, and for
    generation settings in the model's files.
    """
    if count < 1:
        raise SettingsError(f"--examples must be at least 1, got {count}")
    refuse_own_settings(model)
    work = []
    for task in tqdm(tasks, "drawing examples", unit=" tasks", disable=not progress):
        work.append((task, list(task.examples(tokenizer, count))))
        _check_fits(model, *work[-1])
    return work


@dataclass(frozen=True)
class BatchOptions:
    """How examples are put into batches, and when the evaluation ends. Scores differ by rounding at most."""

    batch_size: int = 1
    """Examples of one call of `generate`."""
    mix_tasks: bool = False
    """Whether a batch may hold examples of several tasks, those with the longest right answers first: fewer decoding
    steps in all. Each answer is cut to its own task's `max_new_tokens`."""
    compiles: bool = True
    """Whether decoding steps are compiled on a GPU: quicker steps, after some ten seconds for each strategy and shape.
    `seconds` are times of generation only if they are."""
    stop_after: float | None = None
    """Seconds after which no further batch is begun; None: no limit."""
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingsError(f"--batch-size must be at least 1, got {self.batch_size}")


@torch.no_grad()
def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: Work,
    strategies: list[Strategy],
    records: ExampleRecords,
    batches: BatchOptions = BatchOptions(),  # frozen
    progress: bool = True,
    store: PrefixStore | None = None,
) -> list[TaskResult]:
    """Scores all examples of each task under each strategy; examples in `records` are not computed again.

    Args:
        model: a transformers decoder after `refreshkv.enable`, in evaluation mode.
        work: what `make_examples` returned.
        records: the finished examples; several processes divide the others.
        store: keeps each prompt's keys and values for all strategies; `seconds` are then without the prompts'. One
            process only.

    Returns the results task by task; those that `batches.stop_after` left unfinished are missing.
    """
    assert store is None or records.processes.world == 1
    generator = AnswerGenerator(model, tokenizer, strategies, store, batches.compiles)
    base = [fingerprint(model), tokenizer_identity(tokenizer), generator.settings]
    drawn = [[(task, example) for example in examples] for task, examples in work]
    total, begun = len(strategies) * sum(map(len, drawn)), batches.clock()
    with tqdm(total=total, unit=" examples", disable=not (progress and records.processes.is_first)) as bar:
        for prompts in [_longest_first(sum(drawn, []))] if batches.mix_tasks else drawn:
            keys = {way.name: [_key(base, task, way, example) for task, example in prompts] for way in strategies}
            missing = _missing_batches(strategies, keys, records, batches.batch_size)
            bar.update(len(strategies) * len(prompts) - sum(len(numbers) for _, numbers in missing))
            if store is not None:  # all strategies of a prompt follow each other, while the store has it
                missing.sort(key=lambda batch: batch[1])
            answers = _Answers(generator, prompts, keys, bar)
            for turn in records.processes.turns(missing):
                if _is_late(batches, begun, records):
                    break
                for (_, numbers), _ in records.fill(turn, answers.of_batch):
                    bar.update(len(numbers))
    return _results(base, work, strategies, records)


def _longest_first(prompts: list[Prompt]) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: len(prompt[1].answer_ids), reverse=True)


def _is_late(batches: BatchOptions, begun: float, records: ExampleRecords) -> bool:
    """Whether `stop_after` has passed, by the first process' clock."""
    limit = batches.stop_after
    return limit is not None and records.processes.from_first(lambda: batches.clock() - begun >= limit)


def _results(base: list, work: Work, strategies: list[Strategy], records: ExampleRecords) -> list[TaskResult]:
    """The result of each task under each strategy, as far as all of its examples are in `records`."""
    results = []
    for task, examples in work:
        for strategy in strategies:
            found = [records.get(_key(base, task, strategy, example)) for example in examples]
            finished = [record for record in found if record is not None]
            if len(finished) == len(examples):
                results.append(_result(task, strategy, finished))
    return results


Batch = tuple[Strategy, list[int]]
"""A strategy, and the numbers of the examples that are generated together."""


@dataclass(frozen=True)
class _Answers:
    """Generates records, batch by batch."""

    generator: "AnswerGenerator"
    prompts: list[Prompt]
    keys: dict[str, list[str]]
    """Strategy -> the key of each example."""
    bar: tqdm

    def of_batch(self, batch: Batch) -> list[ExampleRecord]:
        strategy, numbers = batch
        prompts = [self.prompts[i] for i in numbers]
        labels = list(dict.fromkeys(task.label for task, _ in prompts))
        self.bar.set_description(f"{labels[0] if len(labels) == 1 else f'{len(labels)} tasks'}, {strategy.name}")
        outputs = self.generator.generate(strategy, prompts)
        own_keys = [self.keys[strategy.name][i] for i in numbers]
        return [ExampleRecord(key, **out) for key, out in zip(own_keys, outputs, strict=True)]


def _missing_batches(
    strategies: list[Strategy], keys: dict[str, list[str]], records: ExampleRecords, batch_size: int
) -> list[Batch]:
    """The indices of the examples that `records` lacks, in batches under each strategy. keys: by strategy."""
    batches = []
    for strategy in strategies:
        missing = [i for i, key in enumerate(keys[strategy.name]) if records.get(key) is None]
        batches += [(strategy, missing[i : i + batch_size]) for i in range(0, len(missing), batch_size)]
    return batches


def _key(base: list, task: Task, strategy: Strategy, example: Example) -> str:
    """base: identities of the model and its tokenizer, and the settings of generation."""
    return record_key(
        *base,
        task.label,
        strategy.name,
        strategy.settings,
        task.family.max_new_tokens,
        example.prompt_ids,
        example.references,
    )


def _check_fits(model: PreTrainedModel, task: Task, examples: list[Example]) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = max(len(example.prompt_ids) for example in examples) + task.family.max_new_tokens
    if limit is not None and tokens > limit:
        raise SettingsError(
            f"tasks.{task.name}.length={task.family.length} is more than the model's max_position_embeddings={limit}: "
            "lower it (--task-length)"
        )
    largest, size = max(max(e.prompt_ids) for e in examples), vocabulary_size(model)
    if largest >= size:
        raise SettingsError(f"--model: its tokenizer gives token {largest}, but the model has only {size}")


class AnswerGenerator:
    """Generates batches of answers with one model.

    Raises `SettingsError` if the model's own files set generation settings that would change the answers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        strategies: list[Strategy],
        store: PrefixStore | None,
        compiles: bool = True,
    ) -> None:
        refuse_own_settings(model)
        self._model, self._tokenizer, self._store, self._compiles = model, tokenizer, store, compiles
        # with a store each batch has another strategy than the last
        self._caches = Caches(model, record=compiles and store is None)
        for strategy in strategies if store is not None else ():
            validate_takes_prefix(strategy.build_cache(model.config, 1))
        self.settings = generation_settings(model, tokenizer)
        self._stop = self.settings["stop tokens"]
        padding = cast("int | None", tokenizer.pad_token_id)
        self._padding = self._stop[0] if padding is None else padding

    def generate(self, strategy: Strategy, prompts: list[Prompt]) -> Iterator[dict[str, Any]]:
        """Generates the answers of one batch; yields the fields of each `ExampleRecord`, all but the key."""
        model, limit = self._model, max(task.family.max_new_tokens for task, _ in prompts)
        ids, mask = left_padded([example.prompt_ids for _, example in prompts], self._padding)
        sequences, columns = ids.shape
        if self._store is not None:
            store_prompts(self._store, ids, mask)
        capacity = math.ceil((columns + limit) / CAPACITY_STEP) * CAPACITY_STEP
        cache = self._caches.take(strategy, sequences, columns, capacity)
        meter = Meter(model)
        reuse = None if self._store is None else recycle(self._store, cache, ids, mask)
        known = 0 if reuse is None else int(cache.get_seq_length())
        finite = FiniteLogits("--model")
        with without_own_settings(model):
            output = model.generate(  # pyright: ignore[reportCallIssue]  # a mixin of the models' classes
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                **as_keyword(cache),
                custom_generate=decode_ahead,
                logits_processor=[finite],
                max_new_tokens=limit,
                eos_token_id=self._stop,
                pad_token_id=self._padding,
                disable_compile=not self._compiles,
                **GREEDY,
            )[:, columns:].tolist()  # waits for the GPU
        seconds, peak = meter.read()
        finite.validate()
        for row, ((task, example), generated) in enumerate(zip(prompts, output, strict=True)):
            tokens = _until(generated[: task.family.max_new_tokens], self._stop)
            prediction = self._tokenizer.decode(tokens, skip_special_tokens=True)
            assert isinstance(prediction, str)  # of one sequence
            yield {
                "task": task.label,
                "decoding": strategy.name,
                "index": example.index,
                "prediction": prediction,
                "scores": task.score(prediction, example.references),
                "prompt_tokens": len(example.prompt_ids),
                "new_tokens": len(tokens),
                "seconds": seconds / sequences,
                "peak_memory": peak,
                "full_steps": count_full_steps(cache, row, columns, len(tokens) - 1),
                "cache_bytes": held_bytes(cache) / sequences,
                "reuse": _share(reuse, max(0, known - columns + len(example.prompt_ids)), sequences),
            }


def _share(reuse: Reuse | None, tokens: int, examples: int) -> dict[str, Any] | None:
    """The `reuse` of one example's record."""
    if reuse is None:
        return None
    saved = None if reuse.seconds_saved is None else reuse.seconds_saved / examples
    return {"tokens": tokens, "bytes": reuse.bytes // examples, "seconds_saved": saved}


def left_padded(prompts: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Pads prompts of unequal length on the left; returns ids and mask, (B, P) int64 each."""
    columns = max(map(len, prompts))
    ids = torch.tensor([[padding] * (columns - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def generation_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings under which answers are generated, beside the number of tokens: what reports print."""
    return {"decoding": "greedy", "stop tokens": _stop_tokens(model, tokenizer)}


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The model's own end-of-text tokens, or else the tokenizer's."""
    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    if stop is None:
        raise SettingsError("--model has no end-of-text token; set eos_token_id in its generation_config.json")
    return cast(list[int], stop if isinstance(stop, list) else [stop])


def _until(tokens: list[int], stop: list[int]) -> list[int]:
    """The tokens up to the first of `stop`, that one included."""
    for i, token in enumerate(tokens):
        if token in stop:
            return tokens[: i + 1]
    return tokens


def _result(task: Task, strategy: Strategy, records: list[ExampleRecord]) -> TaskResult:
    scores = [record.scores["score"] for record in records]
    held = [record.cache_bytes for record in records if record.cache_bytes is not None]
    return TaskResult(
        task=task.label,
        substitutes=task.family.substitutes,
        decoding=strategy.name,
        examples=len(records),
        scores={name: fmean(record.scores[name] for record in records) for name in records[0].scores},
        standard_error=stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None,
        seconds=sum(record.seconds for record in records),
        peak_memory=max((record.peak_memory for record in records if record.peak_memory is not None), default=None),
        prompt_tokens=fmean(record.prompt_tokens for record in records),
        new_tokens=fmean(record.new_tokens for record in records),
        effective_strides=effective_strides(records),
        cache_bytes=fmean(held) if held else None,
    )


def effective_strides(records: list[ExampleRecord]) -> dict[int, float | None] | None:
    """Refreshed layer -> decoding steps per full step over all records; None if nothing is refreshed."""
    full_steps = [record.full_steps for record in records if record.full_steps is not None]
    if not full_steps:
        return None
    steps = sum(record.new_tokens - 1 for record in records)
    counts = {layer: sum(own[layer] for own in full_steps) for layer in full_steps[0]}
    return {layer: steps / count if count else None for layer, count in counts.items()}
