"""Saves the look-ahead queries of a model in a file beside the model, and loads them from it, as `enable` does."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from refreshkv.attention.look_ahead import CONFIG_KEY, add_look_ahead, look_ahead_modules
from refreshkv.attention.look_ahead_module import CHILD
from refreshkv.reading import refuse_special_files
from refreshkv.settings import SettingsError

LOOK_AHEAD_FILE = "look_ahead.safetensors"

IN_A_MODEL = re.compile(rf"\.(\d+)\.[^.]+\.{CHILD}\.(\w+)$")
"""The end of a look-ahead weight's name in a model: layer, attention module, look-ahead module, weight."""


def look_ahead_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of all layers, by names such as layers.0.offsets."""
    return {
        f"layers.{number}.{name}": weight.detach()
        for number, module in look_ahead_modules(model).items()
        for name, weight in module.state_dict().items()
    }


def split_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a model's weights, name -> tensor, into those of the model and those of its look-ahead queries, named as
    by `look_ahead_weights`."""
    own = {}
    for name, weight in weights.items():
        if found := IN_A_MODEL.search(name):
            own["layers.{}.{}".format(*found.groups())] = weight
    return {name: weight for name, weight in weights.items() if not IN_A_MODEL.search(name)}, own


def save_look_ahead(model: PreTrainedModel, folder: str | Path) -> None:
    """Saves a model with look-ahead queries: `save_pretrained` without them, and look_ahead.safetensors beside it.

    `enable` finds the file again where the model was loaded from.
    """
    weights = look_ahead_weights(model)
    if not weights:
        raise SettingsError("the model has no look-ahead queries to save: call add_look_ahead(model) first")
    model.save_pretrained(folder, state_dict=split_weights(model.state_dict())[0])
    write_weights(weights, folder)


def write_weights(weights: dict[str, Tensor], folder: str | Path) -> None:
    """Writes the file; weights: as `look_ahead_weights` names them."""
    save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, Path(folder) / LOOK_AHEAD_FILE)


def load_look_ahead(model: PreTrainedModel, file: str | Path) -> None:
    """Adds the look-ahead queries of a file, or of the file in a folder, to an enabled model.

    Raises `SettingsError` if the file cannot be read or does not fit the model.
    """
    path = Path(file) / LOOK_AHEAD_FILE if Path(file).is_dir() else Path(file)
    refuse_special_files(path, "look-ahead")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"look-ahead: {path} cannot be read: {str(error).splitlines()[0]}") from None
    shapes = {tuple(weight.shape[1:4:2]) for name, weight in weights.items() if name.endswith(".down")}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise SettingsError(f"look-ahead: {path} holds no look-ahead queries: save them with save_look_ahead")
    queries, rank = shapes.pop()
    add_look_ahead(model, queries, rank)
    expected = look_ahead_weights(model)
    wrong = sorted(
        name
        for name in {*expected, *weights}
        if name not in expected or name not in weights or expected[name].shape != weights[name].shape
    )
    if wrong:
        raise SettingsError(f"look-ahead: {path} is of another model: {wrong[0]} does not fit this one")
    with torch.no_grad():
        for name, weight in weights.items():
            expected[name].copy_(weight)


def load_saved(model: PreTrainedModel) -> None:
    """Loads the look-ahead queries that the model's config.json announces, unless the model has them already."""
    announced: Any = getattr(model.config, CONFIG_KEY, None)
    if announced is None or look_ahead_modules(model):
        return
    source = model.config._name_or_path
    try:
        file = cached_file(source, LOOK_AHEAD_FILE)
    except (OSError, ValueError):
        file = None
    if file is None:
        raise SettingsError(
            f"config.json announces look-ahead queries ({CONFIG_KEY}), but {source or 'the model'} has no "
            f"{LOOK_AHEAD_FILE}: save models with save_look_ahead, or remove the entry to go without"
        )
    load_look_ahead(model, file)
