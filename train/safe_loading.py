"""Loads files of `torch.save` that may come from strangers: tensors and plain values only, never code.

A pickle can name any function and call it while it is read. With `weights_only` torch calls none but those on its list
of safe ones; `_classes` are DeepSpeed's own that a checkpoint of ours holds besides.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, every `torch.load` of this process and of those it starts takes `weights_only`, whatever its caller says:
    DeepSpeed's loaders ask for the opposite."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_classes()):
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def find_code(file: Path) -> str | None:
    """What in a file of `torch.save` is neither a tensor nor a plain value; None if `tensors_only` can load it.

    Nothing is loaded. Raises an error of torch's or pickle's for a file of another kind.
    """
    with torch.serialization.safe_globals(_classes()):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return f"{file.name} names {', '.join(sorted(names)[:3])}" if names else None


def _classes() -> list[Any]:
    """The classes of plain numbers in DeepSpeed's optimizer states."""
    # imported late: DeepSpeed takes seconds, and an experiment's own process needs none of it
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
