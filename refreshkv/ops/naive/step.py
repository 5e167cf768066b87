"""One decoding step of one layer, in plain PyTorch (docs/specification.md, sections 2 to 4).

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens of a cache, `E` entries of a
compact one, `W` slots of a selection. Positions are columns, left padding included; -1 stands for a position that does
not exist.
"""

import torch
from torch import Tensor

from refreshkv.ops import schedule
from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.selection import ranks_left, select, selection_sizes
from refreshkv.ops.state import ENTRIES_USED, PADDING, CompactState, FullSteps, LayerState, StepOptions


@torch.no_grad()
def decode_step(
    query: Tensor, key: Tensor, value: Tensor, state: LayerState, options: StepOptions, scaling: float
) -> Tensor:
    """One decoding step of one layer, in place; arguments and result as in `refreshkv.ops.step.operators.decode_step`.

    `state.ranking` serves the kernels only and stays as it is.
    """
    position = int(state.length)
    last_full, budgets, left_padding, prompt_lengths = state.row_state.unbind(1)
    state.keys[:, :, position], state.values[:, :, position] = key[:, :, 0], value[:, :, 0]
    window = options.selection.observation_window
    state.observers[:, :, position % window] = query[:, :, 0]
    now = schedule.mean_query(query).squeeze(1)
    is_decision = (position - (prompt_lengths - 1)) % options.stride == 0
    is_full = is_decision & schedule.is_refresh(now, state.mean_query, options.threshold)
    known, contents = state.keys[:, :, : position + 1], state.values[:, :, : position + 1]
    output = decode(query, known, contents, is_full, state.row_state, state.selected.long(), scaling)
    state.length.add_(1)
    if bool(is_full.any()):
        back = torch.arange(window - 1, -1, -1, device=query.device)
        observers = state.observers[:, :, (position - back) % window]
        width = state.selected.shape[-1]
        steps = FullSteps(torch.full_like(budgets, position)[:, None], budgets, left_padding, width, droppable=width)
        best = select(observers, known, steps, options.selection, scaling).squeeze(2)
        state.selected.copy_(torch.where(is_full[:, None, None], best, state.selected))
        state.mean_query.copy_(torch.where(is_full[:, None], now, state.mean_query))
        last_full.copy_(torch.where(is_full, position, last_full))
        state.full_steps[:, position] = is_full
    return output.transpose(1, 2)


@torch.no_grad()
def full_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    row_state: Tensor,
    scaling: float,
) -> Tensor:
    """Appends one token and attends to all tokens; arguments and result: `refreshkv.ops.step.operators.full_step`."""
    position = int(length)
    keys[:, :, position], values[:, :, position] = key[:, :, 0], value[:, :, 0]
    length += 1
    exists = torch.arange(position + 1, device=keys.device) >= row_state[:, PADDING, None]
    known, contents = keys[:, :, : position + 1], values[:, :, : position + 1]
    return grouped_attention(query, known, contents, exists[:, None, None], scaling).transpose(1, 2)


@torch.no_grad()
def compact_step(
    query: Tensor, key: Tensor, value: Tensor, state: CompactState, heavy: bool, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """Attention to a compact cache's entries and to the token, which takes its slot; arguments as in
    `refreshkv.ops.step.operators.compact_step`.

    Returns (B, 1, H, D), and if `heavy` the entries' probabilities, mean over the group, (B, Hkv, E) float32.
    """
    keys, values, length, row_state, slots, *_ = state
    index = slots[..., None, None].expand(-1, -1, -1, keys.shape[-1])
    keys.scatter_(2, index, key)
    values.scatter_(2, index, value)
    length += 1
    entry = torch.arange(keys.shape[2], device=keys.device)
    visible = (entry < row_state[:, ENTRIES_USED, None, None]) | (entry == slots.unsqueeze(-1))
    output = grouped_attention(query, keys, values, visible.unsqueeze(2), scaling).transpose(1, 2)
    if not heavy:
        return output, None
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (keys.shape[1], -1)).squeeze(3).to(wide)
    logits = (grouped @ keys.to(wide).transpose(-1, -2) * scaling).masked_fill(~visible.unsqueeze(2), -torch.inf)
    return output, logits.softmax(dim=-1).mean(dim=2).float()


def decode(
    query: Tensor, key: Tensor, value: Tensor, is_full: Tensor, row_state: Tensor, selected: Tensor, scaling: float
) -> Tensor:
    """Attention of one decoding step, the token at the last column of the cache (specification, section 4).

    query (B, H, 1, D); key, value (B, Hkv, L, D), this token's included; is_full (B,) bool; row_state (B, 4) and
    selected (B, Hkv, W): those of before this step. Returns (B, H, 1, D). If no batch row is full, only the small
    caches are read.
    """
    position, columns = key.shape[2] - 1, key.shape[2]
    queue = small_cache(position, row_state, selected)
    if not bool(is_full.any()):
        index = queue.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])
        return grouped_attention(query, key.gather(2, index), value.gather(2, index), (queue >= 0)[:, :, None], scaling)
    in_queue = torch.zeros(*queue.shape[:2], columns + 1, dtype=torch.bool, device=key.device)
    in_queue = in_queue.scatter(-1, queue.masked_fill(queue < 0, columns), True)[..., :columns]
    everything = torch.arange(columns, device=key.device) >= row_state[:, PADDING, None, None]
    visible = torch.where(is_full[:, None, None], everything, in_queue)
    return grouped_attention(query, key, value, visible.unsqueeze(2), scaling)


def small_cache(position: int, row_state: Tensor, selected: Tensor) -> Tensor:
    """The positions of the queue and of the token itself, at a partial step: (B, Hkv, W + M) int64, -1 where empty.

    position: the token's; row_state (B, 4); selected (B, Hkv, W) int64. M is the longest run of recent tokens that a
    queue holds.
    """
    last_full, budgets, left_padding, _ = row_state.unbind(1)
    sizes = selection_sizes(last_full.unsqueeze(-1), budgets, left_padding)
    steps_since = (position - last_full).unsqueeze(-1)
    left = ranks_left(steps_since, sizes, budgets)
    rank = torch.arange(selected.shape[-1], device=selected.device)
    kept = selected.masked_fill(rank >= left.unsqueeze(-1), -1)
    longest = int(torch.minimum(steps_since.squeeze(-1), budgets + 1).max())
    local = torch.arange(position - longest + 1, position + 1, device=selected.device)
    oldest = torch.maximum(last_full + 1, position - budgets)
    local = local.masked_fill(local < oldest.unsqueeze(-1), -1)
    return torch.cat([kept, local.unsqueeze(1).expand(-1, selected.shape[1], -1)], dim=-1)


def copy_tokens(source: Tensor, target: Tensor, source_first: int, target_first: int, count: int) -> None:
    """As `refreshkv.ops.copy_tokens`."""
    target[:, :, target_first : target_first + count] = source[:, :, source_first : source_first + count]


def gather_tokens(source: Tensor, index: Tensor, wanted: Tensor, target: Tensor) -> None:
    """As `refreshkv.ops.gather_tokens`."""
    place = index.long().clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, source.shape[-1]).to(source.device)
    found = source.gather(2, place).to(target.device)
    there = (wanted[:, None, None] & (index >= 0)).unsqueeze(-1)
    front = target[:, :, : index.shape[-1]]
    front.copy_(torch.where(there, found, front))
