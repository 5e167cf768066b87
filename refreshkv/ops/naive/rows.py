"""Attention of all known positions in one pass, in plain PyTorch (docs/specification.md, sections 8 and 10).

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `C` decision steps, `E` steps at multiples of
the select stride, `A` anchors, `C` or `C + E`, `H` query heads, `Hkv` key/value heads, `D` head size, `W` slots of a
selection. Positions are columns, left padding included; -1 stands for a position that does not exist.
"""

import torch
from torch import Tensor

from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.score_keys import score_keys_of
from refreshkv.ops.naive.selection import ranks_left, select, selection_sizes
from refreshkv.ops.state import PLAIN_SOFTMAX, Plan, SelectionOptions, SoftmaxTerms


def refresh_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    options: SelectionOptions,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Attention of all positions after the prompt, full, selecting and partial ones, in the parallel form (section 8).

    query (B, H, Q, D): the last Q positions, at least those after the prompt and the ones that observe at its end; key
    (B, Hkv, T, D), value (B, Hkv, T, E): the whole sequence. Returns (B, R, H, E). Differentiable in query, key, value
    and the terms' sinks; the selection is not differentiated.
    """
    selected = selections(query.detach(), key.detach(), plan, options, scaling, terms)
    visible = visible_keys(plan, selected, columns=key.shape[2])
    rows = query[:, :, query.shape[2] - (key.shape[2] - plan.prompt_length) :]
    return grouped_attention(rows, key, value, visible, scaling, terms).transpose(1, 2)


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


def selections(
    query: Tensor,
    key: Tensor,
    plan: Plan,
    options: SelectionOptions,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """What the full steps keep and, after them, what the selecting steps keep: (B, Hkv, A, W) int64 by rank.

    query, key: as in `refresh_rows`.
    """
    selected = select(query, key, plan.steps, options, scaling, terms=terms)
    if plan.selecting_positions is None or plan.selecting_positions.shape[1] == 0:
        return selected
    score_key = score_keys_of(key, plan.score_bits)
    chosen = select(query, score_key, plan.selecting_steps, options, scaling, own_first=True, terms=terms)
    return torch.cat([selected, chosen], dim=2)


def visible_keys(plan: Plan, selected: Tensor, columns: int) -> Tensor:
    """The keys that each position after the prompt sees (specification, sections 4 and 10): (B, Hkv, R, columns) bool.

    selected (B, Hkv, A, W): the selection of each full step, then that of each selecting step; columns: T.
    """
    kv_heads, width = selected.shape[1], selected.shape[-1]
    device = selected.device
    position = torch.arange(plan.prompt_length, columns, device=device)
    column = torch.arange(columns, device=device)
    selecting = plan.full_positions[:, :0] if plan.selecting_positions is None else plan.selecting_positions
    all_anchors = torch.cat([plan.full_positions, selecting], dim=1)
    segments = _latest_anchor(all_anchors, plan.prompt_length, columns)
    anchors = all_anchors.gather(1, segments)
    sizes = selection_sizes(all_anchors, plan.budgets, plan.left_padding).gather(1, segments)
    left = ranks_left(position - anchors, sizes, plan.budgets)

    own = selected.gather(2, segments[:, None, :, None].expand(-1, kv_heads, -1, width))  # (B, Hkv, R, W)
    kept = (own >= 0) & (torch.arange(width, device=device) < left[:, None, :, None])
    visible = torch.zeros(*own.shape[:3], columns + 1, dtype=torch.bool, device=device)  # last column: thrown away
    visible = visible.scatter(-1, own.masked_fill(~kept, columns), True)[..., :columns]

    oldest = torch.maximum(anchors + 1, position - plan.budgets.unsqueeze(-1))
    local = (column >= oldest.unsqueeze(-1)) & (column <= position.unsqueeze(-1))
    everything = (column >= plan.left_padding[:, None, None]) & (column <= position.unsqueeze(-1))
    is_full = ((anchors == position) & (segments < plan.full_positions.shape[1]))[:, None, :, None]
    return torch.where(is_full, everything.unsqueeze(1), visible | local.unsqueeze(1))


def _latest_anchor(anchors: Tensor, prompt_length: int, columns: int) -> Tensor:
    """Which anchor was the last at or before each position after the prompt: (B, R) int64.

    anchors (B, A) int64: positions from the prompt's last on, -1 where there is none; columns: T.
    """
    steps = columns - prompt_length
    step = torch.where(anchors >= 0, anchors - (prompt_length - 1), steps + 1)  # the last column is thrown away
    number = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
    at_step = anchors.new_full((len(anchors), steps + 2), -1).scatter(1, step, number)[:, :-1]
    latest = torch.arange(steps + 1, device=anchors.device).masked_fill(at_step < 0, 0).cummax(dim=1).values
    return at_step.gather(1, latest)[:, 1:]
