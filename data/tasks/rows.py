"""The training form of tasks: rows of tokens in which every answer begins at the same column."""

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
"""Part of the seed: no evaluation draws these problems."""


@dataclass(frozen=True)
class TaskSequence:
    """One row: the end of another example, a prompt, its answer, end of text, and the beginning of another example."""

    token_ids: list[int]
    text: str
    """The prompt and the answer."""
    answer_length: int
    """Tokens from the end of the prompt on that are the answer's, the end of text included."""


def training_tasks(values: dict[str, Any], row_length: int) -> list[Task]:
    """The tasks that `data.tasks` names, for rows of `row_length` tokens.

    Raises `SettingsError` for tasks and settings that do not exist, and for a `length` other than the rows'.
    """
    for name, settings in values.items():
        if isinstance(settings, dict) and settings.get("length", row_length) != row_length:
            raise SettingsError(f"data.tasks.{name}.length is set by data.row_length={row_length}: leave it out")
    with _named_as_data(row_length):
        return build_tasks(list(values), values, length=row_length)


@contextmanager
def _named_as_data(row_length: int) -> Iterator[None]:
    """Errors about tasks name their settings as data's; `length` is what the rows have."""
    try:
        yield
    except SettingsError as error:
        text = str(error)
        if text.startswith("tasks."):
            length = f"; `length` is data.row_length={row_length} here" if "length" in text else ""
            raise SettingsError(f"data.{text}{length}") from None
        raise SettingsError(f"data.tasks: {text}") from None


def prompt_length(tasks: list[Task], row_length: int) -> int:
    """The column at which the answers begin: room for the longest answer and an end of text is left after it."""
    answer = max(task.family.max_new_tokens for task in tasks)
    if answer + 2 > row_length:
        raise SettingsError(f"data.row_length={row_length} leaves no prompt before max_new_tokens={answer}: raise it")
    return row_length - answer - 1


def task_sequences(
    tasks: list[Task], tokenizer: PreTrainedTokenizerBase, row_length: int, count: int
) -> Iterator[TaskSequence]:
    """`count` rows of `row_length` tokens, one example each, of the tasks in turn.

    A prompt ends at `prompt_length`. What it and its answer leave of the row is filled from the example before: its end
    in front, its beginning behind. An answer that the row cannot hold, a long summary, is cut off at its end.
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
        before = _complete(next(examples), tokenizer, room)  # only fills
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
