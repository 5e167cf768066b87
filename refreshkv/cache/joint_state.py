"""The joint state of a cache's layers: one launch selects for all of them at the end of a decoding step.

A selection is a search in a few dependent stages. For one layer alone it leaves most of a GPU idle, and a launch for a
layer whose step was not full is wasted. No layer needs its selection before the next token.

Shapes: `N` layers, `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import PLAIN_SOFTMAX, Decisions, LayerState, SelectingState, SelectionScratch, SoftmaxTerms
from refreshkv.ops.step.operators import attend_step, select_step


class JoinableLayer(Protocol):
    """The attributes of a `RefreshLayer` that a `JointState` reads and writes, besides the tensors named by
    `Decisions`."""

    config: RefreshConfig
    device: torch.device
    is_initialized: bool
    keys: Tensor
    values: Tensor
    cumulative_length: Tensor
    observers: Tensor
    joint: "JointState | None"
    number: int

    @property
    def has_operator(self) -> bool: ...

    def selecting_state(self) -> SelectingState | None: ...


class JointState:
    """The `Decisions` of N layers, one tensor (N, ...) for each field.

    The layers' own tensors become slices of these.
    """

    row_state: Tensor
    selected: Tensor
    ranking: Tensor
    mean_query: Tensor
    full_steps: Tensor

    @torch.inference_mode(False)  # it outlives the mode in which it was first needed
    def __init__(self, layers: list[JoinableLayer]):
        for name in Decisions._fields:
            whole = torch.stack([getattr(layer, name) for layer in layers])
            setattr(self, name, whole)
            for number, layer in enumerate(layers):
                setattr(layer, name, whole[number])
        batch, kv_heads, capacity, head_dim = layers[0].keys.shape
        self.scratch = SelectionScratch.empty((len(layers), batch), kv_heads, capacity, head_dim, layers[0].device)
        for number, layer in enumerate(layers):
            layer.joint, layer.number = self, number
        for tensor in (*(getattr(self, name) for name in Decisions._fields), *self.scratch):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def holds(self, layers: list[JoinableLayer]) -> bool:
        """Whether the state of exactly these layers is still a slice of this one."""
        return len(layers) == len(self.row_state) and all(
            getattr(layer, name).data_ptr() == getattr(self, name)[number].data_ptr()
            and getattr(layer, name).shape == getattr(self, name).shape[1:]
            for number, layer in enumerate(layers)
            for name in Decisions._fields
        )

    def step(
        self,
        layer: JoinableLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        terms: SoftmaxTerms = PLAIN_SOFTMAX,
    ) -> Tensor:
        """`RefreshLayer.step` of one layer; the last layer's step selects for all."""
        decisions = Decisions(*(getattr(self, name) for name in Decisions._fields))
        options, length = layer.config.step_options(), layer.cumulative_length
        buffers = {"keys": layer.keys, "values": layer.values, "length": length, "observers": layer.observers}
        state = LayerState(**buffers, **decisions._asdict())
        chosen = layer.selecting_state()
        place = (self.scratch, layer.number)
        output = attend_step(query, key, value, state, *place, options, scaling, chosen=chosen, terms=terms)
        if layer.number == len(self.row_state) - 1:
            select_step(self.scratch, length, decisions, options)
        return output


def join_layers(layers: Iterable[JoinableLayer]) -> None:
    """Gives all layers of one device and shape a `JointState`, if kernels compute them."""
    groups = defaultdict(list)
    for layer in layers:
        if layer.is_initialized:
            groups[layer.device, layer.keys.shape].append(layer)
    for group in groups.values():
        if not (group[0].has_operator and CHOICE.uses_kernels(group[0].keys)):
            for layer in group:
                layer.joint = None
        elif group[0].joint is None or not group[0].joint.holds(group):
            JointState(group)
