"""A micro-batch: tokens, their positions, and which next tokens are to be learned."""

from typing import NamedTuple

import torch
from torch import Tensor

from refreshkv.attention.sequence_parallel import columns
from refreshkv.config import Simulation, Trace
from refreshkv.simulation.positions import decoded_positions, partial_positions


class Batch(NamedTuple):
    """B rows of T columns, or one rank's T / N columns of them under sequence parallelism."""

    ids: Tensor
    """(B, T) int64."""
    positions: Tensor
    """(B, T) int64: each column's position in its row."""
    targets: Tensor
    """(B, T) int64: the next token, taken before the columns are split; 0 after a row's last token."""
    counted: Tensor
    """(B, T) bool: whether the loss of the next token counts. False after a row's last token."""

    def columns(self, rank: int, size: int) -> "Batch":
        """The columns of rank `rank`, one of the `size` processes that share these rows."""
        return self if size == 1 else Batch(*(columns(part, rank, size) for part in self))

    def model_arguments(self, simulation: Simulation | None, split: bool, trace: Trace | None = None) -> dict:
        """Keywords with which `CausalLossModel` computes the losses.

        split: whether this batch has only a share of the columns. trace: receives the full steps of the pass.

        The host waits here for the device (to learn how many positions count), so call it before a step's work and not
        in between.
        """
        arguments = {
            "input_ids": self.ids,
            "simulation": simulation,
            "trace": trace,
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


def answer_targets(prompt_length: Tensor, answer_length: Tensor, length: int) -> Tensor:
    """Which positions predict a token of the answer, in rows of tasks: (B,) and (B,) int64 -> (B, length) bool."""
    target = torch.arange(1, length + 1, device=prompt_length.device)
    begin, end = prompt_length[:, None], (prompt_length + answer_length)[:, None]
    return (target >= begin) & (target < end)
