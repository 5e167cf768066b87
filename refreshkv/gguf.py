"""GGUF files as models: transformers reads them in 4 bits and the like, and here gives back plain weights."""

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from refreshkv.settings import SettingsError


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is the path of a GGUF file."""
    return Path(name).suffix == ".gguf"


def pretrained_location(name: str | Path, setting: str) -> dict[str, str]:
    """The arguments that tell `from_pretrained` of transformers to load `name`: a folder, a Hub id or a GGUF file.

    Raises `SettingsError` naming `setting` for a GGUF file that is not there, or without the package gguf.
    """
    if not is_gguf(name):
        return {"pretrained_model_name_or_path": str(name)}
    file = Path(name).expanduser()
    if not file.is_file():
        raise SettingsError(f"{setting}: there is no file {name}")
    if importlib.util.find_spec("gguf") is None:
        raise SettingsError(f"{setting}: {name} needs the package gguf: pip install 'refreshkv[gguf]'")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def dequantize_options(name: str | Path) -> dict[str, Any]:
    """The further arguments with which a model's `from_pretrained` turns a GGUF file's weights into plain ones."""
    # Releases of transformers without GgufConfig always do that.
    if not is_gguf(name) or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def forget_quantization(model: PreTrainedModel) -> None:
    """Removes the marks of quantization from a model with plain weights: transformers would refuse to save it."""
    for owner, mark in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
