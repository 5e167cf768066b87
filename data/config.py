"""The `data` section of a run: where the text comes from and how it becomes rows of tokens."""

from dataclasses import dataclass, field
from typing import Any

from refreshkv.settings import SettingsError

PYTHON_STDLIB = "python-stdlib"
"""The `path` that needs no download: the library sources of the running Python."""

PYTHON_PACKAGES = "python-packages"
"""The `path` of the library sources of the running Python and of all packages installed for it."""

NUMPY_TESTS = "numpy-tests"
"""The `path` of the test sources of the installed NumPy, which python-packages leaves out."""

GENERATED_TASKS = "tasks"
"""The `path` of rows made from generated tasks."""

BUILT_IN = (PYTHON_STDLIB, PYTHON_PACKAGES, NUMPY_TESTS, GENERATED_TASKS)

FILE_BUILDERS = ("arrow", "csv", "json", "parquet", "text", "xml")
"""Builders of `datasets` that read the user's own files and nothing else."""

SMALLEST_VOCABULARY = 257
"""A byte-level vocabulary holds the 256 bytes and the end-of-text token."""


@dataclass(frozen=True)
class HeldOut:
    """The groups of documents that are kept for validation and for testing; all others are for training."""

    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if twice := sorted(set(self.validation) & set(self.test)):
            raise SettingsError(f"data.held_out names {twice[0]} both for validation and for test")


@dataclass(frozen=True)
class DataConfig:
    """What is prepared, and where. Raises `SettingsError` for values that cannot work together.

    `tokenizer` or `train_vocabulary` is needed to prepare rows, and only then.
    """

    folder: str = "rows/python-stdlib"
    """Folder of the prepared rows: written by launch/prepare.py, read by training and evaluation."""
    path: str = PYTHON_STDLIB
    """What `datasets.load_dataset` takes first: a builder (json, text, parquet, ...), a folder, or a dataset's id on
    the hub. Or one of four that need no download: python-stdlib, the library sources of the running Python;
    python-packages, those and the sources of all installed packages, without tests; numpy-tests, the tests of the
    installed NumPy; tasks, prompts and answers of `tasks`."""
    name: str | None = None
    """The dataset's configuration, where it has several."""
    data_files: str | list[str] | dict[str, Any] | None = None
    """Files for a builder: a path or glob, a list of them, or a section split -> files."""
    split: str = "train"
    """The source's split that is read; the rows are then split 80/10/10 by each document's own hash."""
    streaming: bool = False
    """Read the source as it arrives, without a copy on disk. The rows are the same."""
    text_column: str = "text"
    """The column that holds a document's text."""
    group_column: str | None = None
    """The column that names a document's group, such as its package or its author; python-packages has `package`. All
    documents of a group fall into one split, chosen by the hash of the group's name. Without it each document's own
    hash decides."""
    held_out: HeldOut | None = None
    """With group_column: which groups are for validation and which for testing, in place of the hash."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer: the model's own."""
    train_vocabulary: int | None = None
    """Without a tokenizer: train a byte-level BPE of this many tokens on the documents of the train split (>= 257)."""
    row_length: int = 1024
    """Tokens in a row (>= 2). Documents shorter than this give no row."""
    max_documents: int | None = None
    """Read at most this many documents from the front of the source (>= 1)."""
    max_train_rows: int | None = None
    """Stop reading after the document with which the train split has this many rows (>= 1)."""
    tasks: dict[str, Any] | None = None
    """For path=tasks: each task's name (docs/tasks.md) with a section of its settings, {} for the defaults. Rows hold
    one example each, of the tasks in turn."""
    task_examples: int = 10_000
    """For path=tasks: examples, and so rows, in all splits together (>= 1)."""

    def __post_init__(self) -> None:
        for key in ("folder", "path", "split", "text_column"):
            if not getattr(self, key):
                raise SettingsError(f"data.{key} must not be empty")
        _validate_least("row_length", self.row_length, 2)
        _validate_least("max_documents", self.max_documents, 1)
        _validate_least("train_vocabulary", self.train_vocabulary, SMALLEST_VOCABULARY)
        _validate_least("max_train_rows", self.max_train_rows, 1)
        _validate_least("task_examples", self.task_examples, 1)
        if self.tasks is not None and self.path != GENERATED_TASKS:
            raise SettingsError(
                f"data.tasks means nothing for data.path={self.path}: leave it out or set data.path=tasks"
            )
        if self.held_out is not None and self.group_column is None:
            raise SettingsError("data.held_out names groups of documents: set data.group_column too")
        if self.path in BUILT_IN:
            self._validate_nothing_ignored()
        elif self.path in FILE_BUILDERS and not self.data_files:
            raise SettingsError(f"data.path={self.path} reads files of yours: name them in data.data_files")

    def _validate_nothing_ignored(self) -> None:
        unused = [("name", None), ("data_files", None), ("split", "train")]
        if self.path == GENERATED_TASKS:
            unused += [("train_vocabulary", None), ("max_documents", None), ("max_train_rows", None)]
            unused += [("group_column", None)]
            if not self.tasks:
                raise SettingsError("data.path=tasks: name the tasks in data.tasks, such as data.tasks.chain_of_key={}")
        for key, unset in unused:
            if getattr(self, key) != unset:
                raise SettingsError(
                    f"data.{key} means nothing for data.path={self.path}: leave it out or set data.path too"
                )


def _validate_least(key: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise SettingsError(f"data.{key} must be a whole number >= {least}, got {value!r}")
