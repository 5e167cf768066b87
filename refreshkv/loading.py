"""Loads models and tokenizers from folders or the Hub, with one-line errors that name the setting at fault."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from refreshkv.settings import SettingsError


def load_configuration(name: str, setting: str) -> PretrainedConfig:
    """The configuration in a folder or of a Hub id; `SettingsError` naming `setting` if there is none."""
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # what is raised differs by what is missing, and by where the model comes from
        raise SettingsError(f"{setting}: no model could be loaded from {_place(name)}: {_reason(error)}") from error


def load_model(name: str, setting: str, **options: Any) -> PreTrainedModel:
    """The whole decoder in a folder or of a Hub id; `options` go to `from_pretrained`.

    Raises `SettingsError` naming `setting` if none loads, or if weights are missing: those would be random.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # as above
        raise SettingsError(f"{setting}: no model could be loaded from {_place(name)}: {_reason(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise SettingsError(f"{setting}: {name} lacks {len(missing)} weights, the first being {missing[0]}")
    return model


def load_tokenizer(name: str | Path, setting: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a Hub id; `SettingsError` naming `setting` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # as above, and by the tokenizer's own library
        raise SettingsError(f"{setting}: no tokenizer could be loaded from {_place(name)}: {_reason(error)}") from error


def find_tokenizer(name: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder or of a Hub id, None if there is none."""
    try:
        return load_tokenizer(name, "")
    except SettingsError:
        return None


def _place(name: str | Path) -> str:
    return f"the folder {name}" if Path(name).is_dir() else f"{name} (no such folder; taken for a Hub id)"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
