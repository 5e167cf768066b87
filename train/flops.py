"""Model work of a training step in floating-point operations. Recomputation, the selection's scores and the states of
recurrent layers do not count; of a layer's experts those count that a token is sent to.

A multiplication with a weight takes 2 operations a token in the forward pass and 4 in the backward pass. A query and a
key that it attends to take 4 D operations per head forward and 8 D backward.

Shapes: `T` positions, `P` prompt length, `K` budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreshkv.config import Simulation
from refreshkv.layers import layer_kinds
from refreshkv.train.adapter_shape import AdapterShape
from refreshkv.train.experts import multiplied_weights

PEAKS = {
    "B200": 2250e12,
    "GH200": 990e12,
    "H200": 990e12,
    "H100": 990e12,
    "H800": 990e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations per second by a part of the GPU's name."""


@dataclass(frozen=True)
class Work:
    """What a model computes for a token, and for a query and a key that it attends to."""

    weights: int
    """Weights that a token is multiplied with, the output layer's included."""
    pair: int
    """Operations for one query and one key, over all heads of a layer, forward."""
    windows: list[int | None]
    """Each layer's sliding window, None where it attends to everything, 0 where it has no attention."""
    frozen: int = 0
    """Those of the weights that are not trained: the backward pass multiplies with them once, not twice."""


def model_work(model: PreTrainedModel, adapters: AdapterShape | None = None) -> Work:
    """The work of a transformers decoder without adapters in it, on any device ("meta" too), divided or whole.

    adapters: those that are trained beside its weights.
    """
    decoder = model.config.get_text_config(decoder=True)
    head = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    value = getattr(decoder, "v_head_dim", None) or head
    weights, pair = multiplied_weights(model), 2 * decoder.num_attention_heads * (head + value)
    windows = [kind.window if kind.attends else 0 for kind in layer_kinds(model.config)]
    if adapters is None:
        return Work(weights, pair, windows)
    return Work(weights + adapters.products, pair, windows, frozen=adapters.frozen_products)


def step_flops(
    work: Work,
    rows: int,
    length: int,
    simulation: Simulation | None,
    full_steps: Mapping[int, Tensor] = MappingProxyType({}),
    distilled: bool = False,
) -> float:
    """Operations of a step over `rows` rows of `length` tokens, forward and backward.

    Args:
        full_steps: layer -> (B, T) bool, the full steps of some of the rows under the similarity schedule; their mean
            is taken for all rows. In a layer without an entry every decision step counts as full.
        distilled: the step has a full-attention pass besides, forward only (`DistillationConfig`).
    """
    pairs, known = 0.0, {}
    for layer, window in enumerate(work.windows):
        flags = full_steps.get(layer) if window is None and simulation is not None else None
        kind = window if flags is None else f"layer {layer}"
        if kind not in known:  # most layers are alike
            known[kind] = _pairs(length, window, simulation, flags)
        pairs += known[kind]
    total = rows * (2 * (3.0 * work.weights - work.frozen) * length + 3.0 * work.pair * pairs)
    if distilled and simulation is not None:  # the teacher's forward pass
        total += step_flops(replace(work, frozen=0), rows, length, None) / 3
    return total


def _pairs(length: int, window: int | None, simulation: Simulation | None, full_steps: Tensor | None) -> float:
    """Number of (query, key) pairs in one layer of a row, of which the query attends to the key."""
    if window is not None:
        return float(torch.arange(1, length + 1).clamp(max=window).sum())
    if simulation is None:
        return length * (length + 1) / 2
    return float(visible_keys(simulation, length, full_steps).sum(dim=1).double().mean())


def visible_keys(simulation: Simulation, length: int, full_steps: Tensor | None = None) -> Tensor:
    """Number of keys that each position attends to (specification, sections 3, 4 and 10): (B, T) int64.

    full_steps: (B, T) bool; None if every decision step is full, and then B = 1.
    """
    prompt, config = simulation.prompt_length, simulation.config
    position = torch.arange(length, device=None if full_steps is None else full_steps.device)
    if full_steps is None:
        full_steps = ((position - (prompt - 1)) % config.stride == 0)[None]
    full = full_steps & (position >= prompt) | (position == prompt - 1)
    anchors = full
    if config.select_stride is not None:
        anchors = full | (position >= prompt) & ((position - (prompt - 1)) % config.select_stride == 0)
    anchor = torch.where(anchors, position, prompt - 1).cummax(dim=1).values
    budget, since = config.largest_budget(prompt), position - anchor
    selected = (anchor + 1).clamp(max=budget)
    kept = selected - (selected + since - 1 - budget).clamp(min=0)
    partial = kept.clamp(min=0) + since.clamp(max=budget + 1)
    return torch.where(full | (position < prompt), position + 1, partial)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The device's bfloat16 peak in operations per second; None if it is unknown, or the run is not in bfloat16."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
