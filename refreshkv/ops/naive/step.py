"""One decoding step of one layer, in plain PyTorch (docs/specification.md, sections 2 to 4 and 10).

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens of a cache, `E` entries of a
compact one, `W` slots of a selection. Positions are columns, left padding included; -1 stands for a position that does
not exist.
"""

import torch
from torch import Tensor

from refreshkv.ops import schedule
from refreshkv.ops.naive.attention import attend_to_positions, grouped_attention
from refreshkv.ops.naive.score_keys import dequantize, quantize
from refreshkv.ops.naive.selection import ranks_left, select, selection_sizes
from refreshkv.ops.state import (
    ENTRIES_USED,
    LAST_FULL,
    PADDING,
    PARTIAL_STEPS,
    PLAIN_SOFTMAX,
    PROMPT_LENGTH,
    CompactState,
    FullSteps,
    LayerState,
    NearState,
    SelectingState,
    SoftmaxTerms,
    StepOptions,
)


@torch.no_grad()
def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    options: StepOptions,
    scaling: float,
    chosen: SelectingState | None = None,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
    look_ahead: Tensor | None = None,
) -> Tensor:
    """One decoding step of one layer, in place; arguments and result as in `refreshkv.ops.step.operators.decode_step`.

    `state.ranking` serves the kernels only and stays as it is. chosen: changed in place as well; needed if
    `options.select_stride` is set. look_ahead: (B, H, m, D), the step's look-ahead queries; None without any.
    """
    position = int(state.length)
    state.keys[:, :, position], state.values[:, :, position] = key[:, :, 0], value[:, :, 0]
    state.observers[:, :, position % options.selection.observation_window] = query[:, :, 0]
    now = schedule.mean_query(query).squeeze(1)
    step = position - (state.row_state[:, PROMPT_LENGTH] - 1)
    is_full = (step % options.stride == 0) & schedule.is_refresh(now, state.mean_query, options.threshold)
    known, contents = state.keys[:, :, : position + 1], state.values[:, :, : position + 1]
    output = decode(query, known, contents, is_full, state.row_state, state.selected.long(), scaling, terms)
    if options.select_stride is not None:
        assert chosen is not None and chosen.selecting_steps is not None
        _store_score_key(chosen, known[:, :, -1], position)
        is_selecting = (step % options.select_stride == 0) & ~is_full
        if bool(is_selecting.any()):
            best = _select(
                state, position, _score_keys(chosen, known), options, scaling, terms, look_ahead, own_first=True
            )
            own = attend_to_positions(query, known, contents, best, scaling, terms)
            output = torch.where(is_selecting[:, None, None, None], own, output)
            _keep(state, position, best, is_selecting)
        chosen.selecting_steps[:, position] = is_selecting
    if bool(is_full.any()):
        best = _select(state, position, known, options, scaling, terms, look_ahead, own_first=False)
        _keep(state, position, best, is_full)
        state.mean_query.copy_(torch.where(is_full[:, None], now, state.mean_query))
        state.full_steps[:, position] = is_full
    state.length.add_(1)
    return output.transpose(1, 2)


@torch.no_grad()
def choose_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    options: StepOptions,
    scaling: float,
    chosen: SelectingState,
) -> None:
    """As `refreshkv.ops.step.operators.choose_step`."""
    assert chosen.selecting_steps is not None and options.select_stride is not None
    position = int(state.length)
    state.keys[:, :, position], state.values[:, :, position] = key[:, :, 0], value[:, :, 0]
    state.observers[:, :, position % options.selection.observation_window] = query[:, :, 0]
    known = state.keys[:, :, : position + 1]
    _store_score_key(chosen, known[:, :, -1], position)
    is_selecting = (position - (state.row_state[:, PROMPT_LENGTH] - 1)) % options.select_stride == 0
    if bool(is_selecting.any()):
        best = _select(
            state, position, _score_keys(chosen, known), options, scaling, PLAIN_SOFTMAX, None, own_first=True
        )
        _keep(state, position, best, is_selecting)
    chosen.selecting_steps[:, position] = is_selecting
    state.length.add_(1)


def fetching_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    chosen: SelectingState,
    near: NearState,
    options: StepOptions,
    scaling: float,
) -> Tensor:
    """As `refreshkv.ops.step.operators.fetching_step`."""
    choose_step(query, key, value, state, options, scaling, chosen)
    place_near(state, near)
    for source, target in ((state.keys, near.keys), (state.values, near.values)):
        gather_tokens(source, near.fetched, near.wanted, target)
    return decode_step(query, key, value, near.as_layer(state, query.clone()), PARTIAL_STEPS, scaling)


def _select(
    state: LayerState,
    position: int,
    key: Tensor,
    options: StepOptions,
    scaling: float,
    terms: SoftmaxTerms,
    look_ahead: Tensor | None,
    *,
    own_first: bool,
) -> Tensor:
    """What all batch rows would keep at a step at `position`, by the keys or score keys (B, Hkv, L, D): (B, Hkv, W)."""
    _, budgets, left_padding, _ = state.row_state.unbind(1)
    window, width = options.selection.observation_window, state.selected.shape[-1]
    back = torch.arange(window - 1, -1, -1, device=key.device)
    observers = state.observers[:, :, (position - back) % window]
    positions = torch.full_like(budgets, position)[:, None]
    ahead = None if look_ahead is None else look_ahead.unsqueeze(2)
    steps = FullSteps(positions, budgets, left_padding, width, droppable=width, look_ahead=ahead)
    chosen = select(observers, key, steps, options.selection, scaling, own_first=own_first, terms=terms)
    return chosen.squeeze(2)


def _keep(state: LayerState, position: int, best: Tensor, where: Tensor) -> None:
    """Makes the selection `best` (B, Hkv, W) that of the batch rows in `where` (B,) bool."""
    state.selected.copy_(torch.where(where[:, None, None], best, state.selected))
    anchors = state.row_state[:, LAST_FULL]
    anchors.copy_(torch.where(where, position, anchors))


def _store_score_key(chosen: SelectingState, key: Tensor, position: int) -> None:
    """Stores the score key of the token at `position`: key (B, Hkv, D)."""
    if chosen.codes is not None and chosen.scales is not None:
        chosen.codes[:, :, position], chosen.scales[:, :, position] = quantize(key, chosen.bits)


def _score_keys(chosen: SelectingState, known: Tensor) -> Tensor:
    """The score keys of the known keys (B, Hkv, L, D), as numbers."""
    if chosen.codes is None or chosen.scales is None:
        return known
    length = known.shape[2]
    return dequantize(chosen.codes[:, :, :length], chosen.scales[:, :, :length])


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
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Appends one token and attends to all tokens; arguments and result: `refreshkv.ops.step.operators.full_step`."""
    position = int(length)
    keys[:, :, position], values[:, :, position] = key[:, :, 0], value[:, :, 0]
    length += 1
    exists = torch.arange(position + 1, device=keys.device) >= row_state[:, PADDING, None]
    known, contents = keys[:, :, : position + 1], values[:, :, : position + 1]
    return grouped_attention(query, known, contents, exists[:, None, None], scaling, terms).transpose(1, 2)


@torch.no_grad()
def compact_step(
    query: Tensor, key: Tensor, value: Tensor, state: CompactState, heavy: bool, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """Attention to a compact cache's entries and to the token, which takes its slot; arguments as in
    `refreshkv.ops.step.operators.compact_step`.

    Returns (B, 1, H, D), and if `heavy` the entries' probabilities, maximum over the group, (B, Hkv, E) float32.
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
    return output, logits.softmax(dim=-1).amax(dim=2).float()


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_full: Tensor,
    row_state: Tensor,
    selected: Tensor,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Attention of one decoding step, the token at the last column of the cache (specification, section 4).

    query (B, H, 1, D); key, value (B, Hkv, L, D), this token's included; is_full (B,) bool; row_state (B, 4) and
    selected (B, Hkv, W): those of before this step. Returns (B, H, 1, D). If no batch row is full, only the small
    caches are read.
    """
    position, columns = key.shape[2] - 1, key.shape[2]
    queue = small_cache(position, row_state, selected)
    if not bool(is_full.any()):
        return attend_to_positions(query, key, value, queue, scaling, terms)
    in_queue = torch.zeros(*queue.shape[:2], columns + 1, dtype=torch.bool, device=key.device)
    in_queue = in_queue.scatter(-1, queue.masked_fill(queue < 0, columns), True)[..., :columns]
    everything = torch.arange(columns, device=key.device) >= row_state[:, PADDING, None, None]
    visible = torch.where(is_full[:, None, None], everything, in_queue)
    return grouped_attention(query, key, value, visible.unsqueeze(2), scaling, terms)


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


def place_chosen(selected: Tensor, sizes: Tensor, held: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Slots for newly chosen tokens, of which some are held already: those stay where they are, the others take, in
    order, the slots of tokens that are not chosen any more.

    Args:
        selected: (B, Hkv, W) int32: the chosen positions.
        sizes: (B,) int64: how many of them there are.
        held: (B, Hkv, W) int32: the position of the token in each slot, -1 for none.
        columns: more than any position.

    Returns the slot of each chosen position, and the position that each slot has to fetch, -1 for none: two
    (B, Hkv, W) int32.
    """
    width = selected.shape[-1]
    slot = torch.arange(width, device=selected.device).expand_as(selected)
    exists = slot < sizes[:, None, None]
    position = selected.long().masked_fill(~exists, columns)
    slot_of = torch.full((*selected.shape[:2], columns + 1), -1, device=selected.device)
    slot_of.scatter_(2, held.long().masked_fill(held < 0, columns), slot)
    slot_of[..., columns] = -1
    slots = slot_of.gather(2, position)
    missing = exists & (slots < 0)
    spare = torch.zeros(*selected.shape[:2], width + 1, dtype=torch.int64, device=selected.device)
    stays = spare.bool().scatter(2, slots.masked_fill(slots < 0, width), True)[..., :width]
    # the n-th missing token takes the n-th free slot
    free = spare.scatter(2, ((~stays).cumsum(-1) - 1).masked_fill(stays, width), slot)
    slots = torch.where(missing, free.gather(2, (missing.cumsum(-1) - 1).clamp(min=0)), slots)
    fetched = (spare - 1).scatter(2, slots.masked_fill(~missing, width), position)[..., :width]
    return slots.int(), fetched.int()


def place_near(state: LayerState, near: NearState) -> None:
    """Prepares the small cache for the attention of a step that `choose_step` has counted (`NearState`): at a selecting
    step, it gives the chosen tokens their slots and names those to be fetched."""
    position, width = int(state.length) - 1, near.selected.shape[-1]
    anchors, budgets, padding, _ = state.row_state.unbind(1)
    kept = torch.minimum(anchors + 1 - padding, budgets)
    selecting = anchors == position
    rank, slot = near.own.unbind(-1)
    returns = (rank >= 0) & (anchors == position - 1)[:, None]
    rank = rank.long().clamp(min=0).unsqueeze(-1)
    near.selected.scatter_(2, rank, torch.where(returns, slot, near.selected.gather(2, rank).squeeze(-1)).unsqueeze(-1))
    near.wanted.copy_(selecting)
    if bool(selecting.any()):
        slots, fetched = place_chosen(state.selected, kept, near.held, state.keys.shape[2])
        own = (state.selected == position) & (torch.arange(width, device=slots.device) < kept[:, None, None])
        rank = own.int().argmax(-1, keepdim=True)
        last = slots.gather(2, (kept - 1)[:, None, None].expand(-1, slots.shape[1], 1))
        where = selecting[:, None, None]
        near.selected.copy_(torch.where(where, slots.scatter(2, rank, last), near.selected))
        near.own.copy_(torch.where(where, torch.cat([rank, slots.gather(2, rank)], -1), near.own))
        near.fetched.copy_(torch.where(where, fetched, -1))
        near.held.copy_(torch.where(near.fetched >= 0, near.fetched, near.held))
        hold_positions(near)
    near.length.copy_(torch.where(selecting, width, width + position - anchors - 1).amax())
    last = torch.full_like(kept, width - 1)
    first = width - kept + selecting.long()
    near.row_state.copy_(torch.stack([last, budgets, first, torch.zeros_like(kept)], dim=1))


def hold_positions(near: NearState) -> None:
    """Makes `slot_of` the inverse of `held`."""
    slot = torch.arange(near.held.shape[-1], dtype=torch.int32, device=near.held.device).expand_as(near.held)
    places = torch.where(near.held >= 0, near.held, near.slot_of.shape[-1]).long()
    spare = near.slot_of.new_full((*near.slot_of.shape[:2], near.slot_of.shape[-1] + 1), -1)
    near.slot_of.copy_(spare.scatter_(2, places, slot)[..., :-1])


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


def move_tokens(buffer: Tensor, source: Tensor, target: Tensor) -> None:
    """As `refreshkv.ops.move_tokens`, for one buffer (B, Hkv, L, D)."""
    source, target = (
        part[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3]) for part in (source, target)
    )
    buffer.scatter_(2, target, buffer.gather(2, source))
