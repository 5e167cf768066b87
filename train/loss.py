"""Next-token loss, in total and by the kind of position that predicts: full or partial."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import Simulation


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; averages are taken once all ranks' sums are known."""

    total: Tensor
    tokens: Tensor
    partial: Tensor
    partial_tokens: Tensor


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Loss of predicting each next token: logits (B, T, V), ids (B, T) -> (B, T-1) float32."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        ids.shape[0], -1
    )


def partial_positions(simulation: Simulation | None, length: int, device: torch.device) -> Tensor:
    """The positions decoded from the small cache in every layer: (length,) bool.

    Under the similarity schedule layers differ at the checks, so a check does not count as partial.
    """
    position = torch.arange(length, device=device)
    if simulation is None:
        return torch.zeros(length, dtype=torch.bool, device=device)
    step = position - (simulation.prompt_length - 1)
    return (step > 0) & (step % simulation.config.stride != 0)


def loss_sums(logits: Tensor, ids: Tensor, simulation: Simulation | None) -> LossSums:
    """Sums of the losses of ids (B, T) under logits (B, T, V); the first is differentiable."""
    losses = token_losses(logits, ids)
    partial = partial_positions(simulation, losses.shape[1], losses.device).expand_as(losses)
    tokens = losses.new_tensor(losses.numel())
    return LossSums(losses.sum(), tokens, losses.detach()[partial].sum(), partial.sum().float())
