"""Loads models, tokenizers and saved schedules from folders or the Hub; errors are one line that names the setting."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from refreshkv.cache.refresh import saved_config
from refreshkv.config import RefreshConfig
from refreshkv.gguf import dequantize_options, forget_quantization, is_gguf, pretrained_location
from refreshkv.ranges import LARGEST_COUNT, show
from refreshkv.reading import refuse_special_files
from refreshkv.settings import SettingsError

LARGEST_SIZES = {
    "num_hidden_layers": 10_000,
    "vocab_size": 100_000_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 100_000_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "max_position_embeddings": LARGEST_COUNT,
}
"""Numbers of a model's configuration, and the largest that a machine could hold."""
CODE: dict[str, Any] = {"trust_remote_code": False}
"""No code that a model or a tokenizer brings along is ever run."""

CHECKPOINT_FILES, RUN_FILES = ("manifest.json", "state.json"), ("run.yaml", "checkpoints")
"""What a checkpoint of training, and a run with checkpoints, hold and no model does."""


def model_folder(name: str) -> str:
    """The folder of a model inside an experiment's folder (`name`/model), or else `name` itself.

    Raises `SettingsError` for a checkpoint of training.
    """
    folder = Path(name)
    _validate_no_checkpoint(folder, "--model")
    nested = (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file()
    return str(folder / "model") if nested else name


def _validate_no_checkpoint(folder: Path, setting: str) -> None:
    if any(all((folder / name).exists() for name in names) for names in (CHECKPOINT_FILES, RUN_FILES)):
        raise SettingsError(
            f"{setting}: {folder} holds checkpoints of training, and no model; make one: launch/export.py {folder} OUT"
        )


def load_configuration(name: str, setting: str) -> PretrainedConfig:
    """Loads a model's configuration from a folder, Hub id or GGUF file.

    Raises `SettingsError` naming `setting` if there is none.
    """
    _validate_no_checkpoint(Path(name), setting)
    location = pretrained_location(name, setting)
    refuse_special_files(name, setting)
    try:
        config = AutoConfig.from_pretrained(**location, **CODE)
    except Exception as error:  # the type depends on what is missing, and on where the model comes from
        raise SettingsError(f"{setting}: no model could be loaded from {_source(name)}: {_reason(error)}") from error
    validate_sizes(config, f"{setting}: the model {name}")
    return config


def validate_sizes(config: PretrainedConfig, whose: str) -> None:
    """Raises `SettingsError` for layers, heads or sizes that are no whole numbers, or that no machine holds.

    whose: how the error begins. Building such a model would take all memory, or hours, before it fails.
    """
    decoder = config.get_text_config(decoder=True)
    for name, most in LARGEST_SIZES.items():
        value = getattr(decoder, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise SettingsError(f"{whose} has {name}={show(value)}: it must be a whole number from 1 to {most}")
    heads, groups = (getattr(decoder, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and groups and heads % groups:
        raise SettingsError(f"{whose} has {heads} heads: they must be a multiple of num_key_value_heads={groups}")


def load_model(name: str, setting: str, **options: Any) -> PreTrainedModel:
    """Loads a decoder with all its weights from a folder, Hub id or GGUF file; `options` go to `from_pretrained`.

    A GGUF file's weights are dequantized. Raises `SettingsError` naming `setting` if none loads, or if weights are
    missing: transformers would draw them at random.
    """
    if not is_gguf(name):
        load_configuration(name, setting)
    options |= pretrained_location(name, setting) | dequantize_options(name) | CODE
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(output_loading_info=True, **options)
        model, loading = loaded
    except Exception as error:  # as above
        raise SettingsError(f"{setting}: no model could be loaded from {_source(name)}: {_reason(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise SettingsError(f"{setting}: {name} lacks {len(missing)} weights, the first being {missing[0]}")
    if broken := _first_not_finite(model):
        raise SettingsError(f"{setting}: {name} has weights that are not finite, the first in {broken}: copy it again")
    if is_gguf(name):
        forget_quantization(model)
    return model


def _first_not_finite(model: PreTrainedModel) -> str | None:
    """The name of the first weight that holds NaN or infinity; None if there is none."""
    for name, weight in model.named_parameters():
        is_here = weight.numel() > 0 and weight.device.type != "meta"  # at ZeRO stage 3 other ranks have it
        if is_here and weight.is_floating_point() and weight.element_size() > 1:
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            # the sum reads the weight once and makes no copy; large weights that overflow in it are looked at again
            if not weight.detach().sum(dtype=wide).isfinite() and not weight.detach().isfinite().all():
                return name
    return None


def load_tokenizer(name: str | Path, setting: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, Hub id or GGUF file; `SettingsError` naming `setting` if there is none."""
    location = pretrained_location(name, setting)
    refuse_special_files(name, setting)
    try:
        return AutoTokenizer.from_pretrained(**location, **CODE)
    except Exception as error:  # as above, and on the tokenizer's own library
        raise SettingsError(
            f"{setting}: no tokenizer could be loaded from {_source(name)}: {_reason(error)}"
        ) from error


def find_tokenizer(name: str | Path) -> PreTrainedTokenizerBase | None:
    """Loads a tokenizer from a folder or Hub id; None if there is none."""
    try:
        return load_tokenizer(name, "")
    except SettingsError:
        return None


def own_config(model_config: PretrainedConfig) -> RefreshConfig:
    """The refresh schedule and selection saved in a model's config.json, or the paper's defaults if it has none."""
    if getattr(model_config, "refreshkv", None) is None:
        return RefreshConfig()
    return saved_config(model_config)


def _source(name: str | Path) -> str:
    return f"the folder {name}" if Path(name).is_dir() else f"{name} (no such folder; taken for a Hub id)"


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own, which may do anything and is not run"
    if "weights_only" in str(error).lower() or isinstance(error, UnpicklingError):
        return "its weights are a pickle with more in it than tensors, which could run code and is not loaded"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
