"""Loads the model of an evaluation and places it: on one device, or spread over several GPUs."""

import argparse
from typing import Any

import torch
from transformers import PreTrainedModel

from refreshkv.evaluation.processes import Processes
from refreshkv.generation.inherited import forget_own_settings
from refreshkv.loading import load_model
from refreshkv.options import chosen_device, chosen_origin
from refreshkv.settings import SettingsError


def load_placed(path: str, options: argparse.Namespace, processes: Processes) -> PreTrainedModel:
    """Loads the model in a folder, or with a Hub id, in evaluation mode, where --device or --device-map put it.

    options: those of `add_origin`, `add_execution` and `add_device_map`. Each of several processes takes
    a GPU, or GPUs, of its own. Raises `SettingsError` if the GPUs do not hold the whole model.
    """
    spread = {} if options.device_map is None else _device_map(options, processes)
    device = own_device(options.device, processes)
    model = load_model(path, "--model", chosen_origin(options), dtype=options.dtype, **spread)
    if options.ignore_generation_config:
        forget_own_settings(model)
    if spread:
        _validate_in_memory(model)
    else:
        model.to(device)  # pyright: ignore[reportArgumentType]  # transformers' wrapper of it hides `self`
    return model.eval()


def own_device(name: str, processes: Processes) -> str:
    """The device for the value of --device; each process on a machine takes the GPU of its number."""
    device = chosen_device(name)
    if device != "cuda" or processes.world == 1:
        return device
    count = torch.cuda.device_count()
    if processes.local_world > count:
        raise SettingsError(
            f"{processes.local_world} processes share {count} GPUs: start one for each GPU (--nproc-per-node {count}), "
            "or name a device with --device"
        )
    return f"cuda:{processes.local_rank}"


def _device_map(options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The keywords of `from_pretrained` that spread a model."""
    try:
        from accelerate.utils import get_max_memory
    except ModuleNotFoundError:
        raise SettingsError("--device-map needs accelerate: pip install 'refreshkv[eval]'") from None
    if options.device != "auto":
        raise SettingsError("--device and --device-map both say where the model is: leave one out")
    room = get_max_memory()
    gpus = [gpu for gpu in room if isinstance(gpu, int)]
    own = [gpu for gpu in gpus if gpu % processes.local_world == processes.local_rank]
    if gpus and not own:
        raise SettingsError(
            f"{processes.local_world} processes share {len(gpus)} GPUs: with --device-map each needs at least one"
        )
    # without a GPU all of it goes to main memory; with GPUs nothing does, for offloaded weights cannot be told apart
    return {"device_map": options.device_map, "max_memory": {gpu: room[gpu] for gpu in own} or room}


def _validate_in_memory(model: PreTrainedModel) -> None:
    """Raises `SettingsError` if weights were left on a disk or in main memory for lack of room on the GPUs."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in places or ("cpu" in places and places != {"cpu"}):
        raise SettingsError(
            "--device-map: the GPUs do not hold all weights: start fewer processes, use more GPUs, or a smaller --dtype"
        )
