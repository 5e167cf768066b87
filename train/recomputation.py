"""Activation checkpointing: which layers compute their activations again, and where their inputs wait till then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputed_layers(layers: int, share: float) -> list[bool]:
    """Of each layer, whether it recomputes: a share of them, spread evenly.

    The last one is kept, if any is: its activations are gone before the first layer recomputes.
    """
    kept = layers - round(share * layers)
    return [number * kept % layers < layers - kept for number in range(layers)]


def recompute_layers(model: PreTrainedModel, share: float, offload: bool = False) -> None:
    """Lets a share of the layers recompute (`TrainingConfig.activation_checkpointing`).

    offload: their inputs wait in the CPU's memory, those of the other layers do not.
    """
    # the reentrant form saves a layer's input as tensors are saved for a backward pass, where it can be moved
    model.gradient_checkpointing_enable({"use_reentrant": offload})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
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
    """Around reentrant checkpoints: what they save moves to pinned memory and comes back when it is needed.

    Copies are in order with the computation, so nothing is overwritten too early and nothing waits on the host.
    """

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, place.copy_(tensor, non_blocking=True)

    def unpack(saved: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = saved
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
