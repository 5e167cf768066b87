"""Loads models, tokenizers and saved schedules from folders or the Hub; errors are one line that names the setting."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

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
from refreshkv.settings import SettingsError

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
    try:
        return AutoConfig.from_pretrained(**location, **CODE)
    except Exception as error:  # the type depends on what is missing, and on where the model comes from
        raise SettingsError(f"{setting}: no model could be loaded from {_source(name)}: {_reason(error)}") from error


def load_model(name: str, setting: str, **options: Any) -> PreTrainedModel:
    """Loads a decoder with all its weights from a folder, Hub id or GGUF file; `options` go to `from_pretrained`.

    A GGUF file's weights are dequantized. Raises `SettingsError` naming `setting` if none loads, or if weights are
    missing: transformers would draw them at random.
    """
    _validate_no_checkpoint(Path(name), setting)
    options |= pretrained_location(name, setting) | dequantize_options(name) | CODE
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(output_loading_info=True, **options)
        model, loading = loaded
    except Exception as error:  # as above
        raise SettingsError(f"{setting}: no model could be loaded from {_source(name)}: {_reason(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise SettingsError(f"{setting}: {name} lacks {len(missing)} weights, the first being {missing[0]}")
    if is_gguf(name):
        forget_quantization(model)
    return model


def load_tokenizer(name: str | Path, setting: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, Hub id or GGUF file; `SettingsError` naming `setting` if there is none."""
    location = pretrained_location(name, setting)
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
