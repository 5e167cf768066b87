"""Keeps what activation checkpointing saves in the CPU's memory: each layer's input, until its turn in the backward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def layer_inputs_on_cpu(hidden_size: int) -> Iterator[None]:
    """Around a forward pass with reentrant checkpointing: hidden states (B, T, hidden_size) saved for the backward pass
    move to pinned memory and come back when they are needed; other tensors stay where they are.

    Copies are in order with the computation, so nothing is overwritten too early and nothing waits on the host.
    """

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.dim() != 3 or tensor.shape[-1] != hidden_size:
            return tensor
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, place.copy_(tensor, non_blocking=True)

    def unpack(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        device, tensor = saved
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
