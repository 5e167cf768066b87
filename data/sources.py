"""Where documents come from: anything `datasets.load_dataset` opens, or the library of the running Python."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetNotFoundError

from refreshkv.data.config import FILE_BUILDERS, PYTHON_STDLIB, DataConfig
from refreshkv.settings import SettingsError

SKIPPED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})

BUILD_RECORDS = ("_sysconfigdata", "config-")
"""Begin the names of files and directories that record how this Python was built: they differ between machines."""


def load_documents(config: DataConfig) -> Dataset | IterableDataset:
    """The source's documents in a fixed order, one per row, with `config.text_column` as the only column.

    Raises `SettingsError`, naming the setting, for a source that cannot be opened, lacks the column, or is empty.
    """
    with _blaming_settings(config):
        documents = _open_source(config)
        columns = documents.column_names or list(next(iter(documents), {}))
        if columns and config.text_column not in columns:
            raise SettingsError(
                f"data.text_column={config.text_column}: the source has no such column; it has {', '.join(columns)}"
            )
        documents = documents.select_columns([config.text_column]) if columns else documents
        if next(iter(documents), None) is None:
            raise SettingsError(f"{_source(config)} holds no documents")
        return _first(documents, config.max_documents)


def document_texts(documents: Dataset | IterableDataset, config: DataConfig) -> Iterator[str]:
    """The text of each document; a missing text (null) is an empty document.

    Raises `SettingsError` for a column that holds anything else, and for sources that turn out unreadable on the way.
    """
    with _blaming_settings(config):
        for document in documents:
            text = document[config.text_column]
            if text is not None and not isinstance(text, str):
                raise SettingsError(f"data.text_column={config.text_column} holds {type(text).__name__}, not text")
            yield text or ""


def stdlib_documents() -> Iterator[dict[str, str]]:
    """The running Python's library, one document per directory: {"text": ..., "path": the directory}.

    A document is the directory's own .py files, each below a heading with its name. Tests, installed packages, caches
    and the records of this Python's own build are left out. The order depends only on the names.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(
            name for name in subdirectories if name not in SKIPPED_DIRECTORIES and not name.startswith(BUILD_RECORDS)
        )
        files = sorted(
            Path(directory, name) for name in names if name.endswith(".py") and not name.startswith(BUILD_RECORDS)
        )
        if files:
            parts = [f"# {file.relative_to(root).as_posix()}\n{_read_python(file)}\n" for file in files]
            yield {"text": "".join(parts), "path": Path(directory).relative_to(root).as_posix()}


def _read_python(file: Path) -> str:
    try:
        with tokenize.open(file) as source:
            return source.read()
    except (SyntaxError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8", errors="replace")


def _open_source(config: DataConfig) -> Dataset | IterableDataset:
    if config.path == PYTHON_STDLIB:
        return Dataset.from_list(list(stdlib_documents()))
    if Path(config.path).is_file():
        raise SettingsError(
            f"data.path={config.path} is a file: set data.path to its kind ({', '.join(FILE_BUILDERS)}) and "
            f"data.data_files={config.path}"
        )
    return datasets.load_dataset(
        config.path, config.name, data_files=config.data_files, split=config.split, streaming=config.streaming
    )


def _first(documents: Dataset | IterableDataset, count: int | None) -> Dataset | IterableDataset:
    if count is None or (isinstance(documents, Dataset) and len(documents) <= count):
        return documents
    return documents.take(count)


@contextmanager
def _blaming_settings(config: DataConfig) -> Iterator[None]:
    """Any failure to read the source becomes a `SettingsError` that names the setting most likely at fault."""
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:  # builders let everything through, down to a StopIteration for files that are empty
        raise SettingsError(_explanation(config, error)) from error


def _explanation(config: DataConfig, error: Exception) -> str:
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    if isinstance(error, StopIteration):
        return f"{_source(config)}: no such file, or nothing in it"
    if isinstance(error, (DatasetNotFoundError, ConnectionError)):
        return (
            f"data.path={config.path} is neither a builder ({', '.join(FILE_BUILDERS)}, ...) nor a folder here nor a "
            f"dataset that the hub gives out: {reason}"
        )
    if isinstance(error, ValueError) and "split" in reason:
        return f"data.split={config.split}: {reason}"
    if isinstance(error, ValueError) and ("Config name" in reason or "BuilderConfig" in reason):
        return f"data.name={config.name}: {reason}"
    return f"{_source(config)} cannot be read: {reason}"


def _source(config: DataConfig) -> str:
    return f"data.data_files={config.data_files}" if config.data_files else f"data.path={config.path}"
