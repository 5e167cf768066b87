"""A micro-batch: tokens, where they stand, and which next tokens are to be learned."""

from typing import NamedTuple

import torch
from torch import Tensor

from refreshkv.attention.sequence_parallel import columns
from refreshkv.config import Simulation
from refreshkv.train.loss import answer_targets, decoded_positions, partial_positions


class Batch(NamedTuple):
    """B rows of T columns, or a rank's T / N columns of them under sequence parallelism."""

    ids: Tensor
    """(B, T) int64."""
    positions: Tensor
    """(B, T) int64: each column's place in its row."""
    targets: Tensor
    """(B, T) int64: the next token, taken before columns are split; 0 after the last one, which does not count."""
    counted: Tensor
    """(B, T) bool: whether the loss of the next token counts."""

    def columns(self, rank: int, size: int) -> "Batch":
        """What one of the `size` processes that share these rows takes."""
        return self if size == 1 else Batch(*(columns(part, rank, size) for part in self))

    def model_arguments(self, simulation: Simulation | None, split: bool) -> dict:
        """What the model of `attach_loss` takes; split: whether these are a share of the columns.

        Waits for the device, so it is called before a step's work and not in between.
        """
        arguments = {
            "input_ids": self.ids,
            "refresh": simulation,
            "use_cache": False,
            "targets": self.targets,
            "counted": self.counted.flatten().nonzero().squeeze(1),
            "partial": partial_positions(simulation, self.positions),
            "decoded": decoded_positions(simulation, self.positions),
        }
        return {**arguments, "position_ids": self.positions} if split else arguments


def make_batch(rows: dict[str, Tensor], loss_on: str, device: torch.device) -> Batch:
    """The micro-batch of some prepared rows; loss_on: `TrainingConfig.loss_on`."""
    ids = rows["input_ids"].to(device, torch.int64)
    length = ids.shape[1]
    targets = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)
    counted = torch.ones_like(ids, dtype=torch.bool)
    if loss_on == "answers":
        counted = answer_targets(rows["prompt_length"].to(device), rows["answer_length"].to(device), length)
    counted[:, -1] = False
    return Batch(ids, torch.arange(length, device=device).expand_as(ids), targets, counted)
