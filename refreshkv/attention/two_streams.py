"""A rectified simulation: the tokens after the prompt go through the model twice, in two streams, in one pass.

Stream D is the model under full attention. Stream S decodes from the small caches that D's full steps select, and
begins again from D at every full step (docs/specification.md, section 11). The decoder's input is the T tokens,
followed by a copy of the R tokens after the prompt with the same positions. The output joins both streams: D's states
in the prompt and at full steps, S's at all other positions.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `E` hidden size, `H` query heads, `Hkv` key/value
heads, `D` head size.
"""

from typing import Any

import torch
from torch import Tensor

from refreshkv import ops
from refreshkv.attention.dense import DenseAttention
from refreshkv.config import Simulation, Trace
from refreshkv.ops.schedule import position_flags
from refreshkv.settings import SettingsError

OTHER_LAYERS = "rectify=True needs full attention in every layer, and this model has others: set rectify=False"


def streams_length(columns: int, prompt_length: int) -> int:
    """T, the length of one stream, from the number of columns of the layers, T + R."""
    return (columns + prompt_length) // 2


def add_stream(inputs: dict[str, Any], simulation: Simulation) -> dict[str, Any]:
    """A decoder's inputs by name, with the tokens after the prompt added once more, at the same positions.

    Raises `SettingsError` if the prompt is longer than the tokens.
    """
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    tokens, prompt = inputs[name], simulation.prompt_length
    rows, length = tokens.shape[:2]
    if prompt > length:
        raise SettingsError(f"prompt_length={prompt} is outside the row of {length} tokens")
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None:
        positions = torch.arange(length, device=tokens.device).unsqueeze(0)
    if mask is None:  # without one transformers would take the second stream for a packed sequence
        mask = torch.ones(rows, length, dtype=torch.int64, device=tokens.device)
    if positions.ndim != 2 or mask.ndim != 2:
        raise ValueError("rectify=True takes position_ids and an attention_mask of two dimensions: (B, T)")
    doubled = {name: tokens, "position_ids": positions, "attention_mask": mask}
    doubled = {key: torch.cat([whole, whole[:, prompt:]], dim=1) for key, whole in doubled.items()}
    return {**inputs, **doubled, "use_cache": False}


def join_streams(states: Tensor, simulation: Simulation) -> tuple[Tensor, Tensor]:
    """The last hidden states (B, T + R, E) of both streams -> those of the pass and those of full attention, both
    (B, T, E)."""
    prompt = simulation.prompt_length
    length = streams_length(states.shape[1], prompt)
    column = torch.arange(length, device=states.device)
    step = column - (prompt - 1)
    is_partial = (step > 0) & (step % simulation.config.stride != 0)
    index = torch.where(is_partial, column + length - prompt, column)
    return states[:, index], states[:, :length]


def simulate_streams(
    dense: DenseAttention, query: Tensor, key: Tensor, value: Tensor, simulation: Simulation, trace: Trace | None
) -> Tensor:
    """Attention of one layer in both streams: query (B, H, T + R, D), key and value (B, Hkv, T + R, D) -> (B, T + R, H,
    D)."""
    config, prompt = simulation.config, simulation.prompt_length
    length = streams_length(query.shape[2], prompt)
    first = tuple(tensor[:, :, :length] for tensor in (query, key, value))
    plan = config.plan(first[0], prompt, dense.left_padding)
    if trace is not None:
        trace.full_steps[dense.module.layer_idx] = position_flags(plan.full_positions, length)
        if plan.selecting_positions is not None:
            trace.selecting_steps[dense.module.layer_idx] = position_flags(plan.selecting_positions, length)
    output = dense(*first)
    if prompt == length:
        return output
    decoded = ops.rectified_rows(query, key, value, plan, config.selection_options(), dense.scaling, dense.terms)
    return torch.cat([output, decoded], dim=1)
