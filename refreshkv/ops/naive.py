"""The readable truth: every operation of the refresh pattern in plain PyTorch, on any device, forward and backward.

Shapes: `B` batch rows, `T` positions of the query, `L` positions of the keys, `H` query heads, `Hkv` key/value heads,
`G = H / Hkv`, `D` head size, `N` full steps, `R` decoded rows (positions `P .. T-1`), `W` width of a selection,
`O` observing queries. Positions are columns, left padding included; -1 fills what does not exist.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv import schedule

MAX_SCORES = 2**26
"""Attention scores that `select` holds at once (float32: 256 MiB); longer inputs are taken in chunks of full steps."""


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Softmax attention over the visible keys, without copying keys to all query heads.

    query (B, H, R, D); key, value (B, Hkv, L, D); visible (B, 1 or Hkv, R, L) bool, at least one key in each row.
    Returns (B, H, R, D) in the query's dtype; logits and softmax are at least float32.
    """
    kv_heads, rows = key.shape[1], query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3).to(wide)
    logits = (grouped @ key.to(wide).transpose(-1, -2) * scaling).unflatten(2, (-1, rows))
    probabilities = logits.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(dim=-1)
    output = probabilities.flatten(2, 3) @ value.to(wide)
    return output.unflatten(2, (-1, rows)).flatten(1, 2).to(query.dtype)


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


@torch.no_grad()
def select(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    *,
    width: int,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    droppable: int,
    scaling: float,
) -> Tensor:
    """The positions each full step keeps, by rank (specification, sections 3 and 5; paper section 2.2).

    query (B, H, Q, D): the queries of the last Q of L positions; key (B, Hkv, L, D); positions (B, N) int64: the full
    steps, or -1 for none; budgets, left_padding (B,) int64; width: slots of the result, at least the largest
    `min(budget, a+1)`; droppable: how many of the lowest ranks a segment can lose; other forms may leave the better
    ones in any order. Returns (B, Hkv, N, width) int64 by rank, best first, -1 past the end.
    """
    chunk = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * observation_window * key.shape[2]))
    parts = []
    for first in range(0, positions.shape[1], chunk):
        here = positions[:, first : first + chunk]
        observers = _observers(query, here - (key.shape[2] - query.shape[2]), observation_window)
        scores = _observed_scores(observers, key, here, left_padding, scaling)
        scores = _pool(scores, here, left_padding, pool_kernel)
        ranking = _ranking_keys(scores, here, left_padding, recent_window, sink_tokens)
        parts.append(_best(ranking, here, budgets, left_padding, width))
    return torch.cat(parts, dim=2)


def _observers(query: Tensor, columns: Tensor, observation_window: int) -> Tensor:
    """The queries of columns `c-O+1 .. c`: query (B, H, Q, D), columns (B, N) -> (B, H, N, O, D).

    Columns before the first get that one's query; the selection gives them no say.
    """
    back = torch.arange(observation_window - 1, -1, -1, device=query.device)
    columns = (columns.unsqueeze(-1) - back).clamp(min=0)  # (B, N, O)
    index = columns.flatten(1)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    return query.gather(2, index).unflatten(2, columns.shape[1:])


def _observed_scores(observers: Tensor, key: Tensor, positions: Tensor, left_padding: Tensor, scaling: float) -> Tensor:
    """(B, Hkv, N, L) float32: softmax probabilities, maximum over the group, mean over the observing queries."""
    (steps, observing), kv_heads = observers.shape[2:4], key.shape[1]
    wide = torch.promote_types(observers.dtype, torch.float32)
    grouped = observers.unflatten(1, (kv_heads, -1)).flatten(2, 4).to(wide)
    logits = grouped @ key.to(wide).transpose(-1, -2) * scaling
    logits = logits.unflatten(2, (-1, steps, observing))  # (B, Hkv, G, N, O, L)
    column = torch.arange(key.shape[2], device=key.device)
    observer = positions.unsqueeze(-1) - torch.arange(observing - 1, -1, -1, device=key.device)  # (B, N, O)
    start = left_padding[:, None, None]
    seen = (column >= start.unsqueeze(-1)) & (column <= observer.unsqueeze(-1))
    unseen = ~seen[:, None, None]
    probabilities = logits.masked_fill(unseen, -torch.inf).softmax(dim=-1).masked_fill(unseen, 0.0).float()
    present = (observer >= start).sum(-1).clamp(min=1)  # a row may have fewer positions than observers
    return probabilities.amax(dim=2).sum(dim=3) / present[:, None, :, None]


def _exists(columns: int, positions: Tensor, left_padding: Tensor) -> Tensor:
    """(B, 1, N, L) bool: the columns `left_padding .. a`."""
    column = torch.arange(columns, device=positions.device)
    exists = (column >= left_padding[:, None, None]) & (column <= positions.unsqueeze(-1))
    return exists.unsqueeze(1)


def _pool(scores: Tensor, positions: Tensor, left_padding: Tensor, kernel: int) -> Tensor:
    """Maximum over neighbouring positions, centred; positions that do not exist take no part."""
    exists = _exists(scores.shape[-1], positions, left_padding)
    scores = scores.masked_fill(~exists, -torch.inf)
    pooled = F.max_pool1d(scores.flatten(0, 1), kernel, stride=1, padding=kernel // 2)
    return pooled.unflatten(0, scores.shape[:2])


def _ranking_keys(
    scores: Tensor, positions: Tensor, left_padding: Tensor, recent_window: int, sink_tokens: int
) -> Tensor:
    """(B, Hkv, N, L) int64, all different: window and sink positions first, then the score, then the lower position.

    A float32 >= 0 orders like its bits, so the three criteria fit into one integer: 1 + 31 + 31 bits.
    """
    columns = scores.shape[-1]
    column = torch.arange(columns, device=scores.device)
    exists = _exists(columns, positions, left_padding)
    recent = column > (positions - recent_window).unsqueeze(-1)
    sink = column - left_padding[:, None, None] < sink_tokens
    preferred = (recent | sink).unsqueeze(1).long()
    bits = scores.clamp(min=0.0).contiguous().view(torch.int32).long()
    ranking = (preferred << 62) + (bits << 31) + (columns - 1 - column)
    return ranking.masked_fill(~exists, -1)


def _best(ranking: Tensor, positions: Tensor, budgets: Tensor, left_padding: Tensor, width: int) -> Tensor:
    """(B, Hkv, N, width): the columns of the `min(K, a+1)` highest keys, highest first, -1 past the end."""
    order = ranking.topk(min(width, ranking.shape[-1]), dim=-1).indices
    order = F.pad(order, (0, width - order.shape[-1]), value=-1)
    kept = selection_sizes(positions, budgets, left_padding)  # (B, N)
    rank = torch.arange(width, device=ranking.device)
    return order.masked_fill(rank >= kept[:, None, :, None], -1)


def selection_sizes(positions: Tensor, budgets: Tensor, left_padding: Tensor) -> Tensor:
    """`n_sel = min(K, real tokens up to a)` of each full step: (B, N) int64, 0 where there is no step."""
    context = positions + 1 - left_padding.unsqueeze(-1)
    return torch.minimum(context, budgets.unsqueeze(-1)).clamp(min=0)


def _ranks_left(steps_since: Tensor, selected_sizes: Tensor, budgets: Tensor) -> Tensor:
    """How many ranks of the selection the queue still holds, `steps_since >= 1` steps after it was made: (B, R)."""
    dropped = (selected_sizes + steps_since - 1 - budgets.unsqueeze(-1)).clamp(min=0)
    return selected_sizes - dropped


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
    left = _ranks_left(position - anchors, sizes, budgets)

    own = selected.gather(2, segments[:, None, :, None].expand(-1, kv_heads, -1, width))  # (B, Hkv, R, W)
    kept = (own >= 0) & (torch.arange(width, device=device) < left[:, None, :, None])
    visible = torch.zeros(*own.shape[:3], columns + 1, dtype=torch.bool, device=device)  # last column: thrown away
    visible = visible.scatter(-1, own.masked_fill(~kept, columns), True)[..., :columns]

    oldest = torch.maximum(anchors + 1, position - budgets.unsqueeze(-1))
    local = (column >= oldest.unsqueeze(-1)) & (column <= position.unsqueeze(-1))
    everything = (column >= left_padding[:, None, None]) & (column <= position.unsqueeze(-1))
    is_full = (anchors == position)[:, None, :, None]
    return torch.where(is_full, everything.unsqueeze(1), visible | local.unsqueeze(1))


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
    """One decoding step of one layer, in place; arguments and result as in `refreshkv.ops.decode.decode_step`.

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
    """Appends one token and attends to all of the row's; as `refreshkv.ops.decode.full_step`."""
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
    `refreshkv.ops.decode.compact_step`.

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
    left = _ranks_left(steps_since, sizes, budgets)
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
