"""Activation checkpointing: which layers are recomputed in the backward pass, and where their inputs are kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputed_layers(layers: int, share: float) -> list[bool]:
    """Whether each layer is recomputed: a share of them, spread evenly.

    If any layer is not, the last one is not: its activations are released before the first recomputation.
    """
    kept = layers - round(share * layers)
    return [number * kept % layers < layers - kept for number in range(layers)]


def recompute_layers(model: PreTrainedModel, share: float, offload: bool = False) -> None:
    """Turns recomputation on for a share of the layers (`TrainingConfig.activation_checkpointing`).

    offload: the inputs of these layers are kept in the CPU's memory until the backward pass.
    """
    # the reentrant form saves a layer's input by the autograd hooks, through which the input can be moved
    model.gradient_checkpointing_enable({"use_reentrant": offload})
    # any: torch annotates every attribute of a module as a tensor or a module
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer, recomputes in zip(layers, recomputed_layers(len(layers), share), strict=True):
        layer.gradient_checkpointing = recomputes
        if offload:
            layer._gradient_checkpointing_func = _inputs_on_cpu(layer._gradient_checkpointing_func)


def _inputs_on_cpu(checkpoint: Callable) -> Callable:
    @wraps(checkpoint)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with saved_on_cpu():
            return checkpoint(*args, **kwargs)

    return offloaded


@contextmanager
def saved_on_cpu() -> Iterator[None]:
    """Moves what a reentrant checkpoint saves inside to pinned CPU memory, and back when the backward pass needs it.

    The copies run in order with the computation, so no tensor is overwritten before it is copied, and the host never
    waits.
    """

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, place.copy_(tensor, non_blocking=True)

    def unpack(saved: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = saved
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
