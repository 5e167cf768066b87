"""Attention of the decoded stream of a rectified pass, in plain PyTorch (docs/specification.md, section 11).

A rectified pass computes two streams of the tokens after the prompt: D attends to D in full; S, between two full steps,
attends to what the last full step kept, taken from D, and to the tokens since, taken from S. D comes first along the
positions, S behind it.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `E` selecting steps, `H` query heads, `Hkv`
key/value heads, `D` head size, `W` slots of a selection.
"""

import torch
from torch import Tensor

from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.rows import visible_keys
from refreshkv.ops.naive.score_keys import score_keys_of
from refreshkv.ops.naive.selection import select
from refreshkv.ops.state import PLAIN_SOFTMAX, Plan, SelectionOptions, SoftmaxTerms


def rectified_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    options: SelectionOptions,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """The outputs of stream S, (B, R, H, D); arguments as in `refreshkv.ops.rectified_rows`.

    Those at full steps serve nothing: the pass takes D's there.
    """
    length = (query.shape[2] + plan.prompt_length) // 2
    dense_query, dense_key = (tensor.detach()[:, :, :length] for tensor in (query, key))
    selected = select(dense_query, dense_key, plan.steps, options, scaling, terms=terms)
    if plan.selecting:
        chosen = _chosen_by_stream(query.detach(), key.detach(), plan, options, scaling, terms)
        selected = torch.cat([selected, chosen], dim=2)
    visible = visible_keys(plan, selected, columns=length)
    is_own = _is_own_stream(plan, length, query.device)
    both = torch.cat([visible & ~is_own, (visible & is_own)[..., plan.prompt_length :]], dim=-1)
    return grouped_attention(query[:, :, length:], key, value, both, scaling, terms).transpose(1, 2)


def _is_own_stream(plan: Plan, length: int, device: torch.device) -> Tensor:
    """Which positions come after the last full step before each decoded position: (R, T) bool. S sees its own there."""
    prompt, column = plan.prompt_length, torch.arange(length, device=device)
    steps_before = column[prompt:] - prompt
    last_full = prompt - 1 + steps_before // plan.stride * plan.stride
    return column > last_full.unsqueeze(-1)


def _chosen_by_stream(
    query: Tensor, key: Tensor, plan: Plan, options: SelectionOptions, scaling: float, terms: SoftmaxTerms
) -> Tensor:
    """What the selecting steps keep, (B, Hkv, E, W) int64, -1 at those that are full: they score the keys of D up to
    the last full step and those of S after it."""
    prompt, length = plan.prompt_length, (query.shape[2] + plan.prompt_length) // 2
    assert plan.selecting_positions is not None
    steps = plan.selecting_steps
    chosen = torch.full((query.shape[0], key.shape[1], plan.selecting, plan.width), -1, device=query.device)
    for anchor in range(prompt - 1, length, plan.stride):
        end = min(anchor + plan.stride, length)
        # the fixed schedule is that of every batch row
        inside = ((steps.positions[0] > anchor) & (steps.positions[0] < end)).nonzero().squeeze(1)
        if len(inside) == 0:
            continue
        own = slice(length + anchor + 1 - prompt, length + end - prompt)
        queries, keys = (torch.cat([whole[:, :, : anchor + 1], whole[:, :, own]], dim=2) for whole in (query, key))
        here = steps._replace(positions=steps.positions[:, inside])
        scored = score_keys_of(keys, plan.score_bits)
        chosen[:, :, inside] = select(queries, scored, here, options, scaling, own_first=True, terms=terms)
    return chosen
