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


def answer_targets(prompt_length: Tensor, answer_length: Tensor, length: int) -> Tensor:
    """Which next tokens belong to the answers of rows of tasks: (B,) and (B,) int64 -> (B, length - 1) bool."""
    target = torch.arange(1, length, device=prompt_length.device)
    begin, end = prompt_length[:, None], (prompt_length + answer_length)[:, None]
    return (target >= begin) & (target < end)


def loss_sums(logits: Tensor, ids: Tensor, simulation: Simulation | None, counted: Tensor | None = None) -> LossSums:
    """Sums of the losses of ids (B, T) under logits (B, T, V); the first is differentiable.

    counted (B, T-1) bool: the next tokens whose losses count; None for all.
    """
    losses = token_losses(logits, ids)
    if counted is None:
        counted = torch.ones_like(losses, dtype=torch.bool)
    partial = partial_positions(simulation, losses.shape[1], losses.device) & counted
    total = losses.masked_fill(~counted, 0.0).sum()
    return LossSums(total, counted.sum().float(), losses.detach()[partial].sum(), partial.sum().float())
