"""Command-line options that mean the same in every script: the model, how it is run, and refresh.key=value."""

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from refreshkv.config import RefreshConfig
from refreshkv.generation.inherited import IGNORE_OPTION
from refreshkv.loading import Origin
from refreshkv.ranges import COUNT, GIGABYTES, SECONDS, SEED, SHOWN_CHARACTERS, Range, validate_numbers
from refreshkv.settings import SettingsError, load_settings

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "sequential")
"""How accelerate spreads a model over devices."""


@dataclass
class Overrides:
    """What refresh.key=value and tasks.NAME.key=value may change."""

    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    tasks: dict[str, Any] = field(default_factory=dict)


def add_model(parser: argparse.ArgumentParser, note: str = "", **settings: Any) -> None:
    """Adds --model, required. note: what the script's help adds; settings: further arguments of `add_argument`."""
    parser.add_argument(
        "--model", required=True, type=_model_name, help=f"folder or Hub id of a transformers decoder{note}", **settings
    )
    add_origin(parser)


def add_origin(parser: argparse.ArgumentParser) -> None:
    """Adds --revision and --trust-remote-code; `chosen_origin` reads them."""
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub (default: its main branch)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the model or its tokenizer brings along, which may do anything (default: refuse it)",
    )


def chosen_origin(options: argparse.Namespace) -> Origin:
    """The value of --revision and --trust-remote-code."""
    return Origin(options.revision, options.trust_remote_code)


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


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Adds --ignore-generation-config; None if it is not given."""
    parser.add_argument(
        IGNORE_OPTION,
        action="store_true",
        default=None,
        help="leave out penalties, stop strings and the like that the model's generation_config.json sets (default: a "
        "model that sets any is refused)",
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size, --dtype and --device."""
    parser.add_argument(
        "--batch-size", type=int, default=1, help="sequences of one forward pass (default: %(default)s)"
    )
    add_device(parser)


def add_device_map(parser: argparse.ArgumentParser) -> None:
    """Adds --device-map; None if it is not given."""
    parser.add_argument(
        "--device-map",
        choices=DEVICE_MAPS,
        help="spread the model over several GPUs, in place of --device (needs accelerate): auto and balanced share the "
        "layers out evenly, sequential fills one GPU after the other",
    )


def add_budget(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """Adds --budget, which stands for refresh.budget."""
    parser.add_argument(
        "--budget", help="size of the small cache: tokens, or a fraction of the prompt such as 0.125", **settings
    )


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """Adds --stride and --threshold, which stand for refresh.stride and refresh.threshold."""
    parser.add_argument("--stride", help="decoding steps between two decision steps")
    parser.add_argument(
        "--threshold",
        type=lambda text: "null" if text.lower() == "none" else text,
        help="cosine of the similarity schedule; none: the fixed schedule",
    )


def add_overrides(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Adds refresh.key=value arguments. also: other forms that the script takes, for the help."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="refresh.key=value",
        help=f"refresh schedule and selection; refresh=recommended for a preset{also}",
    )


NUMBERS = {
    "batch_size": COUNT,
    "context": COUNT,
    "examples": COUNT,
    "generate": COUNT,
    "gpu_memory": GIGABYTES,
    "jobs": Range(1, 10_000),
    "keep": Range(0, 1, above=True, hint="it is a share of the gain"),
    "last_tokens": COUNT,
    "max_new_tokens": COUNT,
    "minutes": SECONDS,
    "prefix_store_gb": GIGABYTES,
    "ranks": Range(1, 1_000_000),
    "recompute_changed": Range(0, 1, hint="it is a share of the documents' tokens"),
    "recompute_first": COUNT,
    "rows": COUNT,
    "seed": SEED,
    "strides": COUNT,
    "task_length": COUNT,
    "temperature": Range(1e-4, 1e4, hint="leave out --sample for the likeliest token"),
    "stop_after": Range(0, SECONDS.most),
    "top_p": Range(1e-6, 1),
    "within": Range(0, 1e6, hint="it is a share of full attention's perplexity"),
}
"""Range of every option that is a number or a list of numbers."""


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises `SettingsError` for the first option whose number lies outside its range in `NUMBERS`."""
    given = {name: wanted for name, wanted in NUMBERS.items() if name in vars(arguments)}
    validate_numbers(arguments, given, "--")


def comma_separated(text: str) -> list[str]:
    """The type of an option whose value is names separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"names separated by commas are wanted, got {text!r}")
    return names


def whole_numbers(text: str) -> list[int]:
    """The type of an option whose value is whole numbers from 1 on, separated by commas."""
    numbers = [number.strip() for number in text.split(",")]
    for number in numbers:
        if not re.fullmatch("[0-9]{1,4000}", number) or int(number) == 0:
            raise argparse.ArgumentTypeError(f"a whole number >= 1 is wanted, got {number[:SHOWN_CHARACTERS]}")
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


def _model_name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a folder or a name is wanted, got nothing")
    return text


def _device_name(text: str) -> str:
    if text in ("auto", "cpu", "cuda") or re.fullmatch("cuda:[0-9]{1,4}", text):
        return text
    raise argparse.ArgumentTypeError(f"a device is auto, cpu, cuda or cuda:NUMBER, got {text}")
