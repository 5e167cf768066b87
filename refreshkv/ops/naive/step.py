"""One decoding step of one layer, in plain PyTorch (docs/specification.md, sections 2 to 4).

Shapes: `B` batch rows, `T` positions of the query, `L` positions of the keys, `H` query heads, `Hkv` key/value heads,
`G = H / Hkv`, `D` head size, `N` full steps, `R` decoded rows (positions `P .. T-1`), `W` width of a selection,
`O` observing queries. Positions are columns, left padding included; -1 fills what does not exist.
"""

import torch
from torch import Tensor

from refreshkv.ops import schedule
from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.selection import ranks_left, select, selection_sizes


@torch.no_grad()
def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    observers: Tensor,
    full_steps: Tensor,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    scaling: float,
) -> Tensor:
    """One decoding step of one layer, in place; arguments and result as in `refreshkv.ops.step.operators.decode_step`.

    `ranking` serves the kernels only.
    """
    position = int(length)
    anchors, budgets, left_padding, prompts = rows.unbind(1)
    keys[:, :, position], values[:, :, position] = key[:, :, 0], value[:, :, 0]
    observers[:, :, position % observation_window] = query[:, :, 0]
    now = schedule.mean_query(query).squeeze(1)
    is_check = (position - (prompts - 1)) % stride == 0
    is_full = is_check & schedule.is_refresh(now, mean_query, threshold)
    known = keys[:, :, : position + 1]
    output = decode(
        query, known, values[:, :, : position + 1], is_full, anchors, selected.long(), budgets, left_padding, scaling
    )
    length += 1
    if bool(is_full.any()):
        back = torch.arange(observation_window - 1, -1, -1, device=query.device)
        best = select(
            observers[:, :, (position - back) % observation_window],
            known,
            torch.full_like(left_padding, position).unsqueeze(-1),
            budgets,
            left_padding,
            width=selected.shape[-1],
            pool_kernel=pool_kernel,
            observation_window=observation_window,
            recent_window=recent_window,
            sink_tokens=sink_tokens,
            droppable=selected.shape[-1],
            scaling=scaling,
        ).squeeze(2)
        selected.copy_(torch.where(is_full[:, None, None], best, selected))
        mean_query.copy_(torch.where(is_full[:, None], now, mean_query))
        anchors.copy_(torch.where(is_full, position, anchors))
        full_steps[:, position] = is_full
    return output.transpose(1, 2)


@torch.no_grad()
def full_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    scaling: float,
) -> Tensor:
    """Appends one token and attends to all of the row's; as `refreshkv.ops.step.operators.full_step`."""
    position = int(length)
    keys[:, :, position], values[:, :, position] = key[:, :, 0], value[:, :, 0]
    length += 1
    exists = torch.arange(position + 1, device=keys.device) >= rows[:, 2, None]
    known, contents = keys[:, :, : position + 1], values[:, :, : position + 1]
    return grouped_attention(query, known, contents, exists[:, None, None], scaling).transpose(1, 2)


@torch.no_grad()
def compact_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    slots: Tensor,
    heavy: bool,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """Attention to a compact cache's entries and the token, which takes its slot; arguments as in
    `refreshkv.ops.step.operators.compact_step`.

    Returns (B, 1, H, D), and if `heavy` the entries' probabilities, mean over the group, (B, Hkv, C) float32.
    """
    index = slots[..., None, None].expand(-1, -1, -1, keys.shape[-1])
    keys.scatter_(2, index, key)
    values.scatter_(2, index, value)
    length += 1
    entry = torch.arange(keys.shape[2], device=keys.device)
    visible = (entry < rows[:, 0, None, None]) | (entry == slots.unsqueeze(-1))
    output = grouped_attention(query, keys, values, visible.unsqueeze(2), scaling).transpose(1, 2)
    if not heavy:
        return output, None
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (keys.shape[1], -1)).squeeze(3).to(wide)
    logits = (grouped @ keys.to(wide).transpose(-1, -2) * scaling).masked_fill(~visible.unsqueeze(2), -torch.inf)
    return output, logits.softmax(dim=-1).mean(dim=2).float()


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_full: Tensor,
    anchors: Tensor,
    selected: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    scaling: float,
) -> Tensor:
    """One decoding step, the token at the last column of the cache, in the sequential form (specification, section 4).

    query (B, H, 1, D); key, value (B, Hkv, L, D), this token's included; is_full (B,) bool; anchors (B,): last full
    position before this step; selected (B, Hkv, W): its selection; budgets, left_padding (B,). Returns (B, H, 1, D).
    Rows that are all partial read only their small caches.
    """
    position = key.shape[2] - 1
    queue = small_cache(position, anchors, selected, budgets, left_padding)
    if not bool(is_full.any()):
        index = queue.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])
        return grouped_attention(query, key.gather(2, index), value.gather(2, index), (queue >= 0)[:, :, None], scaling)
    columns = key.shape[2]
    in_queue = torch.zeros(*queue.shape[:2], columns + 1, dtype=torch.bool, device=key.device)
    in_queue = in_queue.scatter(-1, queue.masked_fill(queue < 0, columns), True)[..., :columns]
    everything = torch.arange(columns, device=key.device) >= left_padding[:, None, None]
    visible = torch.where(is_full[:, None, None], everything, in_queue)
    return grouped_attention(query, key, value, visible.unsqueeze(2), scaling)


def small_cache(position: int, anchors: Tensor, selected: Tensor, budgets: Tensor, left_padding: Tensor) -> Tensor:
    """The positions of the queue and of the token itself, at a partial step: (B, Hkv, W + M) int64, -1 where empty.

    position: the token's; the others as in `decode`. M is the longest run of recent tokens that a queue holds.
    """
    sizes = selection_sizes(anchors.unsqueeze(-1), budgets, left_padding)
    steps_since = (position - anchors).unsqueeze(-1)
    left = ranks_left(steps_since, sizes, budgets)
    rank = torch.arange(selected.shape[-1], device=selected.device)
    kept = selected.masked_fill(rank >= left.unsqueeze(-1), -1)
    longest = int(torch.minimum(steps_since.squeeze(-1), budgets + 1).max())
    local = torch.arange(position - longest + 1, position + 1, device=selected.device)
    oldest = torch.maximum(anchors + 1, position - budgets)
    local = local.masked_fill(local < oldest.unsqueeze(-1), -1)
    return torch.cat([kept, local.unsqueeze(1).expand(-1, selected.shape[1], -1)], dim=-1)


def copy_rows(source: Tensor, target: Tensor, source_first: int, target_first: int, count: int) -> None:
    """target (B, Hkv, M, D) from `target_first` on becomes `count` tokens of source (B, Hkv, L, D) from `source_first`
    on; pinned host memory or on the device."""
    target[:, :, target_first : target_first + count] = source[:, :, source_first : source_first + count]


def gather_rows(source: Tensor, index: Tensor, wanted: Tensor, target: Tensor) -> None:
    """The first W tokens of target (B, Hkv, M, D) become those of source (B, Hkv, L, D) at index (B, Hkv, W) int32.

    Only in the rows `wanted` (B,) bool, and where the index is not negative. source: pinned host memory or as target.
    """
    place = index.long().clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, source.shape[-1]).to(source.device)
    found = source.gather(2, place).to(target.device)
    there = (wanted[:, None, None] & (index >= 0)).unsqueeze(-1)
    front = target[:, :, : index.shape[-1]]
    front.copy_(torch.where(there, found, front))
