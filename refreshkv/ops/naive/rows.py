"""Attention of all known positions in one pass, in plain PyTorch (docs/specification.md, section 8).

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `C` decision steps, `H` query heads, `Hkv`
key/value heads, `D` head size, `W` slots of a selection. Positions are columns, left padding included; -1 stands for a
position that does not exist.
"""

import torch
from torch import Tensor

from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.selection import ranks_left, select, selection_sizes
from refreshkv.ops.state import Plan, SelectionOptions


def refresh_rows(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
) -> Tensor:
    """Attention of all positions after the prompt, full and partial ones, in the parallel form (section 8).

    query (B, H, Q, D): the last Q positions, at least those after the prompt and the ones that observe at its end; key,
    value (B, Hkv, T, D): the whole sequence. Returns (B, R, H, D). Differentiable in query, key and value; the
    selection is not differentiated.
    """
    selected = select(query.detach(), key.detach(), plan.steps, options, scaling)
    visible = visible_keys(plan, selected, columns=key.shape[2])
    rows = query[:, :, query.shape[2] - (key.shape[2] - plan.prompt_length) :]
    return grouped_attention(rows, key, value, visible, scaling).transpose(1, 2)


def whole_sequence(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
) -> Tensor:
    """Attention of a whole sequence without padding: causal in the prompt, then as `refresh_rows`.

    query (B, H, T, D); key, value (B, Hkv, T, D). Returns (B, T, H, D).
    """
    prompt = plan.prompt_length
    early = torch.ones(prompt, prompt, dtype=torch.bool, device=query.device).tril()
    queries, keys, values = (tensor[:, :, :prompt] for tensor in (query, key, value))
    output = grouped_attention(queries, keys, values, early[None, None], scaling).transpose(1, 2)
    return torch.cat([output, refresh_rows(query, key, value, plan, options, scaling)], dim=1)


def visible_keys(plan: Plan, selected: Tensor, columns: int) -> Tensor:
    """The keys that each position after the prompt sees (specification, section 4): (B, Hkv, R, columns) bool.

    selected (B, Hkv, C, W): the selection of each full step; columns: T.
    """
    kv_heads, width = selected.shape[1], selected.shape[-1]
    device = selected.device
    position = torch.arange(plan.prompt_length, columns, device=device)
    column = torch.arange(columns, device=device)
    # (B, R): the decision step whose selection a position uses
    segments = plan.latest[:, (position - (plan.prompt_length - 1)) // plan.stride]
    anchors = plan.full_positions.gather(1, segments)
    sizes = selection_sizes(plan.full_positions, plan.budgets, plan.left_padding).gather(1, segments)
    left = ranks_left(position - anchors, sizes, plan.budgets)

    own = selected.gather(2, segments[:, None, :, None].expand(-1, kv_heads, -1, width))  # (B, Hkv, R, W)
    kept = (own >= 0) & (torch.arange(width, device=device) < left[:, None, :, None])
    visible = torch.zeros(*own.shape[:3], columns + 1, dtype=torch.bool, device=device)  # last column: thrown away
    visible = visible.scatter(-1, own.masked_fill(~kept, columns), True)[..., :columns]

    oldest = torch.maximum(anchors + 1, position - plan.budgets.unsqueeze(-1))
    local = (column >= oldest.unsqueeze(-1)) & (column <= position.unsqueeze(-1))
    everything = (column >= plan.left_padding[:, None, None]) & (column <= position.unsqueeze(-1))
    is_full = (anchors == position)[:, None, :, None]
    return torch.where(is_full, everything.unsqueeze(1), visible | local.unsqueeze(1))
