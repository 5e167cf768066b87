"""Opens the prepared sequences and the tasks of an evaluation, and checks that they fit the model."""

from typing import cast

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from refreshkv.data.content import SplitDigest
from refreshkv.data.rows import Rows, load_rows, validate_same_tokens, validate_token_ids
from refreshkv.data.tasks.registry import build_tasks
from refreshkv.data.tasks.task import Task
from refreshkv.loading import Origin
from refreshkv.options import task_values
from refreshkv.settings import SettingsError

DEFAULT_ROWS = 100
"""Sequences of a split that are taken without --rows."""


def open_tasks(chosen: list[str], overrides: list[str], length: int | None) -> list[Task]:
    """Builds the tasks that --tasks names, with the values of tasks.NAME.key=value.

    length: tokens of prompt and answer; None keeps each task's own.
    """
    common = {} if length is None else {"length": length}
    return build_tasks(chosen, task_values(overrides), **common)


def open_split(folder: str, split: str, count: int | None) -> tuple[Rows, Dataset]:
    """Opens a folder of prepared sequences; returns it, and `count` sequences of one split.

    These lie at equal distances, so that they come from many documents. count: None takes 100, or all if there are
    fewer. Raises `SettingsError` if the folder or so many sequences are not there.
    """
    rows = load_rows(folder)
    chosen, source = getattr(rows, split), f"the {split} split of {folder}"
    available = len(chosen)
    if available == 0:
        raise SettingsError(f"{source} has no rows: choose another --split, or prepare more documents")
    if count is not None and not 1 <= count <= available:
        raise SettingsError(f"--rows must lie between 1 and {available}, got {count}: more are not in {source}")
    count = count or min(DEFAULT_ROWS, available)
    return rows, chosen.select([i * available // count for i in range(count)])


def sequences_fingerprint(sequences: Dataset) -> str:
    """SHA-256, in hex, of all tokens of these sequences in order: the same wherever else their folder has others."""
    digest = SplitDigest()
    for start in range(0, len(sequences), DEFAULT_ROWS):
        digest.add_tokens(np.asarray(sequences[start : start + DEFAULT_ROWS]["input_ids"]))
    return digest.tokens


def check_tokens(model: PreTrainedModel, path: str, rows: Rows, origin: Origin) -> None:
    """Raises `SettingsError` if the sequences have other tokens than the model."""
    validate_token_ids(rows.info, vocabulary_size(model))
    validate_same_tokens(path, rows, origin)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of tokens that the model has an embedding of."""
    return cast(int, model.get_input_embeddings().num_embeddings)
