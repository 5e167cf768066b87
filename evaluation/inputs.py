"""What an evaluation is of: the model with its schedule and selection, the rows, the tasks, and the device."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from refreshkv import RefreshConfig
from refreshkv.data.rows import Rows, check_same_tokens, check_tokenizer, load_rows
from refreshkv.data.tasks.registry import build_tasks
from refreshkv.data.tasks.task import Task
from refreshkv.settings import SettingsError, load_settings

DEFAULT_ROWS = 100


@dataclass
class Overrides:
    """What refresh.key=value and tasks.NAME.key=value may change."""

    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    tasks: dict[str, Any] = field(default_factory=dict)


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Options of how an evaluation is carried out: --batch-size, --dtype and --device."""
    parser.add_argument("--batch-size", type=int, default=1, help="rows per forward pass (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: the model's)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def names(text: str) -> list[str]:
    """Names separated by commas, as an option's value."""
    return [name.strip() for name in text.split(",")]


def whole_number(text: str) -> int:
    """A whole number from 1 on, as an option's value."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number >= 1 is wanted, got {text}")
    return int(text)


def whole_numbers(text: str) -> list[int]:
    """Several, separated by commas."""
    return [whole_number(part) for part in names(text)]


def check_execution(arguments: argparse.Namespace) -> None:
    """Raises `SettingsError` for values of these options that cannot work."""
    if arguments.batch_size < 1:
        raise SettingsError(f"--batch-size must be at least 1, got {arguments.batch_size}")


def model_path(name: str) -> str:
    """`name`, or the `model` folder inside it."""
    folder = Path(name)
    nested = (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file()
    return str(folder / "model") if nested else name


def own_config(model: PreTrainedModel) -> RefreshConfig:
    """The schedule and the selection saved with the model, or the paper's."""
    saved = getattr(model.config, "refreshkv", None)
    return RefreshConfig() if saved is None else RefreshConfig.from_dict(saved)


def changed_config(config: RefreshConfig, overrides: list[str], **flags: str | None) -> RefreshConfig:
    """`config` with the values of --budget and the like in it, and then those of refresh.key=value."""
    values = [f"refresh.{key}={json.dumps(value)}" for key, value in config.to_dict().items()]
    values += [f"refresh.{key}={value}" for key, value in flags.items() if value is not None]
    overrides = [override for override in overrides if not override.startswith("tasks.")]
    return load_settings(Overrides, None, [*values, *overrides]).refresh


def task_values(overrides: list[str]) -> dict[str, Any]:
    """The values of tasks.NAME.key=value, by task."""
    return load_settings(Overrides, None, [o for o in overrides if o.startswith("tasks.")]).tasks


def open_tasks(chosen: list[str], overrides: list[str], length: int | None) -> list[Task]:
    """The tasks named by --tasks with the values of tasks.NAME.key=value; `length` tokens each, None for their own."""
    common = {} if length is None else {"length": length}
    return build_tasks(chosen, task_values(overrides), **common)


def open_split(folder: str, split: str, count: int | None) -> tuple[Rows, Dataset]:
    """Prepared rows, and `count` of one split at equal distances, so that they come from many documents; None for 100
    or all. Raises `SettingsError` for rows that are not there."""
    rows = load_rows(folder)
    chosen, source = getattr(rows, split), f"the {split} split of {folder}"
    available = len(chosen)
    if available == 0:
        raise SettingsError(f"{source} has no rows: choose another --split, or prepare more documents")
    if count is not None and not 1 <= count <= available:
        raise SettingsError(f"--rows must lie between 1 and {available}, got {count}: more are not in {source}")
    count = count or min(DEFAULT_ROWS, available)
    return rows, chosen.select([i * available // count for i in range(count)])


def check_tokens(model: PreTrainedModel, path: str, rows: Rows) -> None:
    """Raises `SettingsError` if the rows' tokens are not the model's."""
    check_tokenizer(rows.info, model.get_input_embeddings().num_embeddings)
    check_same_tokens(path, rows)


def device(name: str) -> str:
    """The device for --device. Raises `SettingsError` for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no GPU; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
