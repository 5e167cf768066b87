"""Command-line options that mean the same in every script: the model, how it is run, and refresh.key=value."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from refreshkv.config import RefreshConfig
from refreshkv.settings import SettingsError, load_settings

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Overrides:
    """What refresh.key=value and tasks.NAME.key=value may change."""

    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    tasks: dict[str, Any] = field(default_factory=dict)


def add_model(parser: argparse.ArgumentParser, note: str = "", **settings: Any) -> None:
    """Adds --model, required. note: what the script's help adds; settings: further arguments of `add_argument`."""
    parser.add_argument("--model", required=True, help=f"folder or Hub id of a transformers decoder{note}", **settings)


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --output. default: how the help names the folder that is taken without it."""
    parser.add_argument("--output", type=Path, help=f"folder to write to (default: {default})")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype and --device."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: the one the model was saved in)"
    )
    parser.add_argument(
        "--device", type=_device_name, default="auto", help="cpu, cuda or cuda:1 (default: a GPU if there is one)"
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size, --dtype and --device."""
    parser.add_argument(
        "--batch-size", type=int, default=1, help="sequences of one forward pass (default: %(default)s)"
    )
    add_device(parser)


def add_budget(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """Adds --budget, which stands for refresh.budget."""
    parser.add_argument(
        "--budget", help="size of the small cache: tokens, or a fraction of the prompt such as 0.125", **settings
    )


def add_overrides(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Adds refresh.key=value arguments. also: other forms that the script takes, for the help."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="refresh.key=value",
        help=f"refresh schedule and selection; refresh=recommended for a preset{also}",
    )


def check_execution(arguments: argparse.Namespace) -> None:
    """Raises `SettingsError` for a batch size below 1."""
    if arguments.batch_size < 1:
        raise SettingsError(f"--batch-size must be at least 1, got {arguments.batch_size}")


def comma_separated(text: str) -> list[str]:
    """The type of an option whose value is names separated by commas."""
    return [name.strip() for name in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    """The type of an option whose value is whole numbers from 1 on, separated by commas."""
    numbers = comma_separated(text)
    for number in numbers:
        if not number.isdecimal() or int(number) == 0:
            raise argparse.ArgumentTypeError(f"a whole number >= 1 is wanted, got {number}")
    return [int(number) for number in numbers]


def changed_config(config: RefreshConfig, overrides: list[str], **flags: str | None) -> RefreshConfig:
    """`config` with the values of flags such as budget="0.25", then those of refresh.key=value overrides.

    An override refresh=NAME replaces all of `config` by a preset; flags and other overrides change that. Overrides of
    tasks are passed over. Raises `SettingsError` for unknown keys, presets and impossible values.
    """
    presets = [text for text in overrides if text.startswith("refresh=")]
    overrides = [text for text in overrides if text not in presets]
    values = presets or [f"refresh.{key}={json.dumps(value)}" for key, value in config.to_dict().items()]
    values += [f"refresh.{key}={value}" for key, value in flags.items() if value is not None]
    overrides = [override for override in overrides if not override.startswith("tasks.")]
    return load_settings(Overrides, None, [*values, *overrides]).refresh


def task_values(overrides: list[str]) -> dict[str, Any]:
    """The values of tasks.NAME.key=value overrides, by task; others are passed over."""
    return load_settings(Overrides, None, [text for text in overrides if text.startswith("tasks.")]).tasks


def chosen_device(name: str) -> str:
    """The torch device for the value of --device. Raises `SettingsError` for a GPU that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"--device {name}: torch sees no GPU; use --device cpu")
    number = name.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        raise SettingsError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs, numbered from 0")
    return name


def _device_name(text: str) -> str:
    if text in ("auto", "cpu", "cuda") or (text.startswith("cuda:") and text[5:].isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"a device is auto, cpu, cuda or cuda:NUMBER, got {text}")
