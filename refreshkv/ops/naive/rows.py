"""Attention of all known positions in one pass, in plain PyTorch (docs/specification.md, section 8).

Shapes: `B` batch rows, `T` positions of the query, `L` positions of the keys, `H` query heads, `Hkv` key/value heads,
`G = H / Hkv`, `D` head size, `N` full steps, `R` decoded rows (positions `P .. T-1`), `W` width of a selection,
`O` observing queries. Positions are columns, left padding included; -1 fills what does not exist.
"""

from typing import Any

import torch
from torch import Tensor

from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.selection import ranks_left, select, selection_sizes


def refresh_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_positions: Tensor,
    latest: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    *,
    prompt_length: int,
    stride: int,
    width: int,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    droppable: int,
    uniform: bool,
    scaling: float,
) -> Tensor:
    """Attention of all rows after the prompt, full and partial ones, in the parallel form (specification, section 8).

    query (B, H, Q, D): of the last Q positions, those after the prompt and the ones that observe at its end; key, value
    (B, Hkv, T, D): of the whole row; full_positions, latest (B, C) int64: the schedule;
    budgets, left_padding (B,) int64; width: the largest `min(budget, T)`; the options of the selection as in `select`;
    uniform: a promise that every check is full and no row has padding, of which the kernels may make use.
    Returns (B, R, H, D). Differentiable in query, key and value; the selection is not differentiated.
    """
    selected = select(
        query.detach(),
        key.detach(),
        full_positions,
        budgets,
        left_padding,
        width=width,
        pool_kernel=pool_kernel,
        observation_window=observation_window,
        recent_window=recent_window,
        sink_tokens=sink_tokens,
        droppable=droppable,
        scaling=scaling,
    )
    visible = visible_keys(
        full_positions,
        latest,
        selected,
        budgets,
        left_padding,
        prompt_length=prompt_length,
        stride=stride,
        columns=key.shape[2],
    )
    rows = query[:, :, query.shape[2] - (key.shape[2] - prompt_length) :]
    return grouped_attention(rows, key, value, visible, scaling).transpose(1, 2)


def whole_rows(query: Tensor, key: Tensor, value: Tensor, *plan: Tensor, prompt_length: int, **settings: Any) -> Tensor:
    """Attention of a whole row without padding: causal for the prompt, then as `refresh_rows`.

    query (B, H, T, D); key, value (B, Hkv, T, D); the others as in `refresh_rows`. Returns (B, T, H, D).
    """
    early = torch.ones(prompt_length, prompt_length, dtype=torch.bool, device=query.device).tril()
    parts = (tensor[:, :, :prompt_length] for tensor in (query, key, value))
    output = grouped_attention(*parts, early[None, None], settings["scaling"]).transpose(1, 2)
    after = refresh_rows(query, key, value, *plan, prompt_length=prompt_length, **settings)
    return torch.cat([output, after], dim=1)


def visible_keys(
    full_positions: Tensor,
    latest: Tensor,
    selected: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    *,
    prompt_length: int,
    stride: int,
    columns: int,
) -> Tensor:
    """What each row after the prompt sees (specification, section 4): (B, Hkv, R, L) bool.

    full_positions, latest (B, C) int64: the schedule; selected (B, Hkv, C, W): each full step's selection; budgets,
    left_padding (B,) int64; columns: L.
    """
    kv_heads, width = selected.shape[1], selected.shape[-1]
    device = selected.device
    position = torch.arange(prompt_length, columns, device=device)
    column = torch.arange(columns, device=device)
    segments = latest[:, (position - (prompt_length - 1)) // stride]  # (B, R): the check whose selection a row uses
    anchors = full_positions.gather(1, segments)
    sizes = selection_sizes(full_positions, budgets, left_padding).gather(1, segments)
    left = ranks_left(position - anchors, sizes, budgets)

    own = selected.gather(2, segments[:, None, :, None].expand(-1, kv_heads, -1, width))  # (B, Hkv, R, W)
    kept = (own >= 0) & (torch.arange(width, device=device) < left[:, None, :, None])
    visible = torch.zeros(*own.shape[:3], columns + 1, dtype=torch.bool, device=device)  # last column: thrown away
    visible = visible.scatter(-1, own.masked_fill(~kept, columns), True)[..., :columns]

    oldest = torch.maximum(anchors + 1, position - budgets.unsqueeze(-1))
    local = (column >= oldest.unsqueeze(-1)) & (column <= position.unsqueeze(-1))
    everything = (column >= left_padding[:, None, None]) & (column <= position.unsqueeze(-1))
    is_full = (anchors == position)[:, None, :, None]
    return torch.where(is_full, everything.unsqueeze(1), visible | local.unsqueeze(1))
