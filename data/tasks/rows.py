"""Training sequences of tasks: every answer begins at the same column."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from refreshkv.data.tasks.registry import build_tasks
from refreshkv.data.tasks.task import Example, Task
from refreshkv.settings import SettingsError

PURPOSE = "training"
"""Part of the seed, so that no evaluation draws these problems."""


@dataclass(frozen=True)
class TaskSequence:
    """One example in a sequence of `row_length` tokens; the example before fills what is left on both sides."""

    token_ids: list[int]
    """The end of the example before, a prompt, its answer, end of text, and the beginning of the example before."""
    text: str
    """The prompt and the answer."""
    answer_length: int
    """Tokens of the answer, its end of text included."""


def training_tasks(values: dict[str, Any], row_length: int) -> list[Task]:
    """The tasks that `data.tasks` names, with `length = row_length`.

    Raises `SettingsError` for tasks and settings that do not exist, and for a `length` other than `row_length`.
    """
    for name, settings in values.items():
        if isinstance(settings, dict) and settings.get("length", row_length) != row_length:
            raise SettingsError(f"data.tasks.{name}.length is set by data.row_length={row_length}: leave it out")
    with _named_as_data(row_length):
        return build_tasks(list(values), values, length=row_length)


@contextmanager
def _named_as_data(row_length: int) -> Iterator[None]:
    """Puts `data.` before the settings that errors about tasks name; `length` is `data.row_length`."""
    try:
        yield
    except SettingsError as error:
        text = str(error)
        if text.startswith("tasks."):
            length = f"; `length` is data.row_length={row_length} here" if "length" in text else ""
            raise SettingsError(f"data.{text}{length}") from None
        raise SettingsError(f"data.tasks: {text}") from None


def prompt_length(tasks: list[Task], row_length: int) -> int:
    """The column at which all answers begin; behind it fit the longest answer and an end of text.

    Raises `SettingsError` if no prompt of at least one token is left.
    """
    answer = max(task.family.max_new_tokens for task in tasks)
    if answer + 2 > row_length:
        raise SettingsError(f"data.row_length={row_length} leaves no prompt before max_new_tokens={answer}: raise it")
    return row_length - answer - 1


def task_sequences(
    tasks: list[Task], tokenizer: PreTrainedTokenizerBase, row_length: int, count: int
) -> Iterator[TaskSequence]:
    """Yields `count` sequences of `row_length` tokens, one example each; the tasks take turns.

    Each prompt ends before column `prompt_length`. The end of the example before fills the columns in front of the
    prompt, its beginning those behind the answer. An answer that does not fit, such as a long summary, loses its end.
    """
    prompt = prompt_length(tasks, row_length)
    each = -(-(count + 1) // len(tasks))
    streams = [
        task.examples(tokenizer, each, PURPOSE, prompt_tokens=prompt, answer_tokens=task.family.max_new_tokens)
        for task in tasks
    ]
    examples = islice((next(stream) for stream in cycle(streams)), count + 1)
    room = row_length - prompt
    with _named_as_data(row_length):
        before = _complete(
            next(examples), tokenizer, room
        )  # the first example is only used to fill the second one's sequence
    while (example := _next(examples, row_length)) is not None:
        complete = _complete(example, tokenizer, room)
        front = prompt - len(example.prompt_ids)
        back = row_length - front - len(complete)
        yield TaskSequence(
            token_ids=[*_end(before, front), *complete, *_beginning(before, back)],
            text=example.prompt + example.answer,
            answer_length=len(complete) - len(example.prompt_ids),
        )
        before = complete


def _next(examples: Iterator[Example], row_length: int) -> Example | None:
    with _named_as_data(row_length):
        return next(examples, None)


def _complete(example: Example, tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    return [*example.prompt_ids, *[*example.answer_ids, tokenizer.eos_token_id][:room]]


def _end(token_ids: list[int], count: int) -> list[int]:
    repeated = token_ids * -(-count // len(token_ids))
    return repeated[len(repeated) - count :]


def _beginning(token_ids: list[int], count: int) -> list[int]:
    return list(islice(cycle(token_ids), count))
