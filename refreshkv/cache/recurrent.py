"""Empties transformers' recurrent layers in our caches, and changes their batch rows.

transformers' own class has no method that selects or repeats batch rows, and its `reset` keeps autograd graphs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

STATES = ("conv_states", "recurrent_states")
"""The layer's dictionaries of tensors whose first dimension is the batch."""


def forget(layer: LinearAttentionLayer) -> None:
    """Empties the layer. Its states keep their addresses, unless they are part of an autograd graph."""
    if any(state.requires_grad for state in _states(layer)):
        _remake(layer)
    else:
        with torch.no_grad():
            layer.reset()


def forget_other_batch(layer: Any, rows: int) -> None:
    """Drops the states of an empty layer that were made for another number of batch rows."""
    is_empty = not any(layer.has_previous_state.values())
    if is_empty and any(len(state) != rows for state in _states(layer)):
        _remake(layer)


def change_batch(layer: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Applies `change` to each state of the layer."""
    for name in STATES:
        states = getattr(layer, name)
        for number, state in states.items():
            if state is not None:
                states[number] = change(state)


def _states(layer: LinearAttentionLayer) -> Iterator[Tensor]:
    for name in STATES:
        yield from (state for state in getattr(layer, name).values() if state is not None)


def _remake(layer: LinearAttentionLayer) -> None:
    vars(layer).update(vars(type(layer)(number_of_states=layer.number_of_states)))
