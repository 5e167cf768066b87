"""Keeps weights that are not trained out of checkpoints."""

from typing import Any

from torch import nn


def drop_frozen(model: nn.Module, weights: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A hook of `state_dict`: keeps the trained weights alone.

    The scales of 4-bit weights go with them, which belong to no parameter's name.
    """
    trained = {name for name, part in model.named_parameters(remove_duplicate=False) if part.requires_grad}
    for name in [name for name in weights if name.removeprefix(prefix) not in trained]:
        del weights[name]
