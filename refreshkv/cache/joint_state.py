"""Layers of a cache that end their decoding steps together: one launch selects for all of them.

A selection is a search with few steps that can go at once; of one layer it leaves most of a GPU idle, and where no step
was full its launch is for nothing. Nobody needs it before the next token.

Shapes: `N` layers, `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refreshkv.ops.step.operators import Check, attend_step, select_step, uses_kernels

if TYPE_CHECKING:
    from refreshkv.cache.layer import RefreshLayer


class LayerStack:
    """N layers' `rows`, `selected`, `ranking`, `mean_query` and `full_steps`, in one tensor for all of them, (N, ...);
    the layers' own become parts of it. It knows nothing else of the layers."""

    STATE = ("rows", "selected", "ranking", "mean_query", "full_steps")

    @torch.inference_mode(False)  # it outlives the mode in which it was first wanted
    def __init__(self, layers: "list[RefreshLayer]"):
        for name in self.STATE:
            whole = torch.stack([getattr(layer, name) for layer in layers])
            setattr(self, name, whole)
            for number, layer in enumerate(layers):
                setattr(layer, name, whole[number])
        batch, *shape = layers[0].keys.shape
        self.check = Check.empty((len(layers), batch), *shape, layers[0].device)
        for number, layer in enumerate(layers):
            layer.stack, layer.number = self, number
        for tensor in (*(getattr(self, name) for name in self.STATE), *self.check):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def holds(self, layers: "list[RefreshLayer]") -> bool:
        """Whether it is these layers' stack, and their state is still part of it."""
        return len(layers) == len(self.rows) and all(
            getattr(layer, name).data_ptr() == getattr(self, name)[number].data_ptr()
            and getattr(layer, name).shape == getattr(self, name).shape[1:]
            for number, layer in enumerate(layers)
            for name in self.STATE
        )

    def step(self, layer: "RefreshLayer", query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """`RefreshLayer.step`; the last layer's selects for all."""
        config, length = layer.config, layer.cumulative_length
        output = attend_step(
            query, key, value, layer.keys, layer.values, length, layer.observers, self.rows, self.selected,
            self.mean_query, list(self.check), layer.number, config.stride, config.threshold,
            *config.selection_options().values(), scaling,
        )  # fmt: skip
        if layer.number == len(self.rows) - 1:
            state = (getattr(self, name) for name in self.STATE)
            select_step(list(self.check), length, *state, config.stride, config.threshold)
        return output


def stack_layers(layers: "Iterable[RefreshLayer]") -> None:
    """Makes a `LayerStack` of those among a cache's layers that have one device and shape, if they go by kernels."""
    groups = defaultdict(list)
    for layer in layers:
        if layer.is_initialized:
            groups[layer.device, layer.keys.shape].append(layer)
    for group in groups.values():
        if not uses_kernels(group[0].keys):
            for layer in group:
                layer.stack = None
        elif group[0].stack is None or not group[0].stack.holds(group):
            LayerStack(group)
