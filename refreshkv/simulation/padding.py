"""A data collator for trainers that pad on the right: the refresh attention needs padding on the left."""

from collections.abc import Callable
from typing import Any

import torch


class LeftPadding:
    """Moves the padding of another collator's batches from the right to the left.

    `trainer.data_collator = LeftPadding(trainer.data_collator)`. It moves every tensor of the batch that has the shape
    (B, T) of `attention_mask`; others stay.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = self.collator(features)
        mask = batch.get("attention_mask")
        if mask is None or bool(mask.all()):
            return batch
        columns = torch.arange(mask.shape[1], device=mask.device)
        index = (columns + mask.sum(dim=1, keepdim=True)) % mask.shape[1]  # the source of each column
        return {
            name: value.gather(1, index) if isinstance(value, torch.Tensor) and value.shape == mask.shape else value
            for name, value in batch.items()
        }
