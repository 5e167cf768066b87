"""AdamW with 8-bit moments, by the package bitsandbytes (`training.optimizer=adamw-8bit`)."""

from collections.abc import Callable

import torch

from refreshkv.settings import SettingsError
from refreshkv.train.config import TrainingConfig


def validate_optimizer(training: TrainingConfig) -> None:
    """Raises `SettingsError` if the package of the optimizer is missing."""
    if training.optimizer == "adamw-8bit":
        _adamw_8bit()


def eight_bit_adamw(parameters: list[torch.nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW whose moments are stored in blocks of 8 bits."""
    return _adamw_8bit()(
        parameters, lr=training.learning_rate, betas=tuple(training.betas), weight_decay=training.weight_decay
    )


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError(
            "training.optimizer=adamw-8bit needs the package bitsandbytes: pip install 'refreshkv[8bit]', or set "
            "training.optimizer=adamw"
        ) from None
    return AdamW8bit
