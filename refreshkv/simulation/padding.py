"""A data collator for trainers that pad on the right, where the refresh attention needs the padding on the left."""

from collections.abc import Callable
from typing import Any

import torch


class LeftPadding:
    """Moves the padding of another collator's batches from the right to the left.

    `trainer.data_collator = LeftPadding(trainer.data_collator)`. Every tensor (B, T) of the batch moves with its
    `attention_mask`; the others stay.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = self.collator(features)
        mask = batch.get("attention_mask")
        if mask is None or bool(mask.all()):
            return batch
        columns = torch.arange(mask.shape[1], device=mask.device)
        index = (columns + mask.sum(dim=1, keepdim=True)) % mask.shape[1]  # the column that comes to each place
        return {
            name: value.gather(1, index) if isinstance(value, torch.Tensor) and value.shape == mask.shape else value
            for name, value in batch.items()
        }
