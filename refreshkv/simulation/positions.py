"""Finds the positions of a simulated pass that predict from the small cache, and those after the prompt."""

import torch
from torch import Tensor

from refreshkv.config import Simulation


def partial_positions(simulation: Simulation | None, positions: Tensor) -> Tensor:
    """Which of `positions` (any shape, int64) predict from the small cache in every layer: bool, the same shape.

    Under the similarity schedule the layers decide differently at a decision step, so none of these counts as partial.
    """
    if simulation is None:
        return torch.zeros_like(positions, dtype=torch.bool)
    step = positions - (simulation.prompt_length - 1)
    return (step > 0) & (step % simulation.config.stride != 0)


def decoded_positions(simulation: Simulation | None, positions: Tensor) -> Tensor:
    """Which of `positions` (any shape, int64) come after the prompt: bool, the same shape."""
    if simulation is None:
        return torch.zeros_like(positions, dtype=torch.bool)
    return positions >= simulation.prompt_length
