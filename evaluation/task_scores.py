"""Scores of tasks when a model generates the answers, under several ways to decode.

Greedy decoding through `model.generate`, in batches with left padding. Each finished example is a line of a file, so an
interrupted evaluation goes on where it stopped.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refreshkv import RefreshCache, decode_ahead
from refreshkv.data.tasks.task import Example, Task
from refreshkv.evaluation.caches import GREEDY, Caches
from refreshkv.evaluation.records import RecordFile, numbered_layers
from refreshkv.evaluation.stepwise import Meter, held_bytes
from refreshkv.evaluation.strategies import Decoding
from refreshkv.identity import fingerprint
from refreshkv.prefix.fill import validate_takes_prefix
from refreshkv.prefix.recycling import Reuse, recycle, store_prompts
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError

ROOM_STEP = 128
"""A cache has room for a multiple of so many tokens: each other size would be compiled anew."""


@dataclass(frozen=True)
class Record:
    """What came of one example: a line of the file."""

    key: str
    """Hash of everything that the prediction depends on."""
    task: str
    """The task's label."""
    decoding: str
    index: int
    prediction: str
    scores: dict[str, float]
    """0 to 1 each; "score" is the task's own."""
    prompt_tokens: int
    new_tokens: int
    """Generated tokens, up to the end of text."""
    seconds: float
    """The batch's time, prompt and generation, over its examples."""
    peak_memory: int | None
    """Most bytes that the GPU held during the batch, weights included; None on a CPU."""
    full_steps: dict[int, int] | None
    """Refreshed layer -> full steps among the `new_tokens - 1` decoding steps; None if nothing is refreshed."""
    cache_bytes: float | None = None
    """What the batch's cache held at the end, over its examples; None in files of earlier versions."""
    reuse: dict[str, Any] | None = None
    """What was taken from the prefix store: tokens of the prompt, bytes, and about the seconds it saved (None if not
    known), the last two as shares of the batch's; None without a store."""


class Records(RecordFile[Record]):
    """The finished examples."""

    kind = "an evaluation of tasks"

    def parse(self, values: dict[str, Any]) -> Record:
        return Record(**{**values, "full_steps": numbered_layers(values["full_steps"])})


@dataclass(frozen=True)
class TaskResult:
    """One task under one way to decode."""

    task: str
    substitutes: tuple[str, ...]
    decoding: str
    examples: int
    scores: dict[str, float]
    """Means over the examples; "score" is the task's own."""
    standard_error: float | None
    """Of the mean score, over examples; None for a single one."""
    seconds: float
    peak_memory: int | None
    prompt_tokens: float
    """Mean over the examples, and so the next."""
    new_tokens: float
    effective_strides: dict[int, float | None] | None
    """Refreshed layer -> decoding steps per full step; None for a layer without one, or if nothing is refreshed."""
    cache_bytes: float | None = None
    """Of one example's cache at the end, mean over the examples that tell."""


Work = list[tuple[Task, list[Example]]]
"""Tasks with their examples."""


def make_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task], count: int, progress: bool = True
) -> Work:
    """The first `count` examples of each task.

    Raises `SettingsError` for prompts that do not fit the model, and for tasks that cannot make so many examples.
    """
    if count < 1:
        raise SettingsError(f"--examples must be at least 1, got {count}")
    work = []
    for task in tqdm(tasks, "drawing examples", unit=" tasks", disable=not progress):
        work.append((task, list(task.examples(tokenizer, count))))
        _check_fits(model, *work[-1])
    return work


@torch.no_grad()
def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: Work,
    decodings: list[Decoding],
    records: Records,
    batch_size: int = 1,
    progress: bool = True,
    store: PrefixStore | None = None,
) -> list[TaskResult]:
    """All examples of each task under each way to decode; those in `records` are not computed again.

    Args:
        model: a transformers decoder after `refreshkv.enable`, in evaluation mode.
        work: of `make_examples`.
        batch_size: examples of one call of `generate`.
        store: with one, each prompt is computed once for all ways to decode, and not within their seconds.
    """
    if batch_size < 1:
        raise SettingsError(f"--batch-size must be at least 1, got {batch_size}")
    weights, results = fingerprint(model), []
    caches = Caches(model, record=store is None)  # with a store each batch has another way to decode than the last
    if store is not None:
        for way in decodings:
            validate_takes_prefix(way.build_cache(model.config, 1))
    total = len(decodings) * sum(len(examples) for _, examples in work)
    with tqdm(total=total, unit=" examples", disable=not progress) as bar:
        for task, examples in work:
            keys = {way.name: [_key(weights, task, way, example) for example in examples] for way in decodings}
            jobs = []
            for decoding in decodings:
                missing = [i for i, key in enumerate(keys[decoding.name]) if records.get(key) is None]
                bar.update(len(examples) - len(missing))
                jobs += [
                    (decoding, missing[start : start + batch_size]) for start in range(0, len(missing), batch_size)
                ]
            if store is not None:  # all ways to decode a prompt follow each other, while the store has it
                jobs.sort(key=lambda job: job[1])
            for decoding, batch in jobs:
                bar.set_description(f"{task.label}, {decoding.name}")
                chosen = [examples[i] for i in batch]
                outputs = _generate(model, tokenizer, task, decoding, chosen, caches, store)
                records.add([Record(keys[decoding.name][i], **out) for i, out in zip(batch, outputs, strict=True)])
                bar.update(len(batch))
            results += [_result(task, way, [records.get(key) for key in keys[way.name]]) for way in decodings]
    return results


def _key(weights: str, task: Task, decoding: Decoding, example: Example) -> str:
    parts = [
        weights,
        task.label,
        decoding.name,
        decoding.settings,
        task.family.max_new_tokens,
        example.prompt_ids,
        example.references,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _check_fits(model: PreTrainedModel, task: Task, examples: list[Example]) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = max(len(example.prompt_ids) for example in examples) + task.family.max_new_tokens
    if limit is not None and tokens > limit:
        raise SettingsError(
            f"tasks.{task.name}.length={task.family.length} is more than the model's max_position_embeddings={limit}: "
            "lower it (--task-length)"
        )
    largest, size = max(max(e.prompt_ids) for e in examples), model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise SettingsError(f"--model: its tokenizer gives token {largest}, but the model has only {size}")


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    decoding: Decoding,
    examples: list[Example],
    caches: Caches,
    store: PrefixStore | None,
) -> Iterator[dict[str, Any]]:
    """Generates one batch; gives each example's fields of a `Record`, all but the key."""
    stop = _stop_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
    ids, mask = left_padded([example.prompt_ids for example in examples], padding)
    rows, columns = ids.shape
    if store is not None:
        store_prompts(store, ids, mask)
    room = math.ceil((columns + task.family.max_new_tokens) / ROOM_STEP) * ROOM_STEP
    cache = caches.take(decoding, rows, columns, room)
    meter = Meter(model.device)
    reuse = None if store is None else recycle(store, cache, ids, mask)
    known = 0 if reuse is None else int(cache.get_seq_length())
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=cache,
        custom_generate=decode_ahead,
        max_new_tokens=task.family.max_new_tokens,
        eos_token_id=stop,
        pad_token_id=padding,
        **GREEDY,
    )[:, columns:].tolist()  # waits for the GPU
    seconds, peak = meter.read()
    for row, (example, generated) in enumerate(zip(examples, output, strict=True)):
        tokens = _until(generated, stop)
        prediction = tokenizer.decode(tokens, skip_special_tokens=True)
        yield {
            "task": task.label,
            "decoding": decoding.name,
            "index": example.index,
            "prediction": prediction,
            "scores": task.score(prediction, example.references),
            "prompt_tokens": len(example.prompt_ids),
            "new_tokens": len(tokens),
            "seconds": seconds / len(examples),
            "peak_memory": peak,
            "full_steps": _full_steps(cache, row, columns, len(tokens) - 1),
            "cache_bytes": held_bytes(cache) / len(examples),
            "reuse": _share(reuse, max(0, known - columns + len(example.prompt_ids)), len(examples)),
        }


def _share(reuse: Reuse | None, tokens: int, examples: int) -> dict[str, Any] | None:
    """What one of the examples of a batch took from the store."""
    if reuse is None:
        return None
    saved = None if reuse.seconds_saved is None else reuse.seconds_saved / examples
    return {"tokens": tokens, "bytes": reuse.bytes // examples, "seconds_saved": saved}


def left_padded(prompts: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Prompts of unequal length as ids and mask, (B, P) int64 each, padded in front."""
    columns = max(map(len, prompts))
    ids = torch.tensor([[padding] * (columns - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The model's own end-of-text tokens, or else the tokenizer's."""
    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    if stop is None:
        raise SettingsError("--model has no end-of-text token; set eos_token_id in its generation_config.json")
    return stop if isinstance(stop, list) else [stop]


def _until(tokens: list[int], stop: list[int]) -> list[int]:
    """The tokens up to the first of `stop`, that one included."""
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[: place + 1]
    return tokens


def _full_steps(cache: Any, row: int, columns: int, steps: int) -> dict[int, int] | None:
    if not isinstance(cache, RefreshCache):
        return None
    counts = cache.full_steps[:, row, columns : columns + steps].sum(-1).tolist()
    return {layer: count for layer, count in enumerate(counts) if not cache.is_sliding[layer]}


def _result(task: Task, decoding: Decoding, records: list[Record]) -> TaskResult:
    scores = [record.scores["score"] for record in records]
    held = [record.cache_bytes for record in records if record.cache_bytes is not None]
    return TaskResult(
        task=task.label,
        substitutes=task.family.substitutes,
        decoding=decoding.name,
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


def effective_strides(records: list[Record]) -> dict[int, float | None] | None:
    """Refreshed layer -> decoding steps per full step over all records; None if nothing is refreshed."""
    if records[0].full_steps is None:
        return None
    steps = sum(record.new_tokens - 1 for record in records)
    counts = {layer: sum(record.full_steps[layer] for record in records) for layer in records[0].full_steps}
    return {layer: steps / count if count else None for layer, count in counts.items()}
