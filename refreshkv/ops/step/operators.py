"""One decoding step of one layer as an operator: everything it decides and keeps stays in device memory.

The operators are opaque to torch.compile, which therefore sees no break, and `generate` can capture them into a CUDA
graph. torch wants their arguments flat; the functions of the same names take them as structs. `refreshkv.ops.choice`
says whether the Triton kernels of `refreshkv.ops.step.launches` compute them, or `refreshkv.ops.naive.step`.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for, `N`
layers.
"""

import torch
from torch import Tensor

from refreshkv.ops import naive
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import (
    BUDGET,
    ENTRIES_USED,
    PLAIN_SOFTMAX,
    CompactState,
    Decisions,
    LayerState,
    NearState,
    SelectingState,
    SelectionOptions,
    SelectionScratch,
    SoftmaxTerms,
    StepOptions,
)

NO_SELECTING_STEPS = SelectingState(None, None, None)


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    options: StepOptions,
    scaling: float,
    chosen: SelectingState | None = None,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Appends one token to a layer's cache and attends with its query (specification, sections 2 to 4 and 10).

    Args:
        query: (B, H, 1, D), the token's.
        key, value: (B, Hkv, 1, D), the token's.
        state: the layer's state, changed in place. Its keys and values may be pinned host memory, which the kernels
            read and write over the bus. The caller makes sure that there is room; without room the output is nan.
        options: when the step is full or selecting, and what it then keeps.
        scaling: factor of the logits.
        chosen: changed in place as well; needed if `options.select_stride` is set.
        terms: what the model changes in the softmax besides.

    Returns (B, 1, H, D).
    """
    return _decode_step(query, key, value, *state, *(chosen or NO_SELECTING_STEPS), *options.flat(), scaling, *terms)


@torch.library.custom_op("refreshkv::decode_step", mutates_args=(*LayerState._fields, *SelectingState._fields))
def _decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    row_state: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    observers: Tensor,
    full_steps: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    selecting_steps: Tensor | None,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    pool_ahead: bool,
    select_stride: int | None,
    scaling: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    state = LayerState(keys, values, length, row_state, selected, ranking, mean_query, observers, full_steps)
    chosen = SelectingState(codes, scales, selecting_steps)
    selection = SelectionOptions(pool_kernel, observation_window, recent_window, sink_tokens, pool_ahead)
    options = StepOptions(stride, threshold, selection, select_stride)
    terms = SoftmaxTerms(sinks, softcap)
    if CHOICE.uses_kernels(query):
        from refreshkv.ops.step import launches  # imports Triton, which machines without a GPU may lack

        with torch.cuda.device_of(query):
            return launches.decode_step(query, key, value, state, options, scaling, chosen, terms)
    return naive.decode_step(query, key, value, state, options, scaling, chosen, terms)


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
    """A step without its attention, of a schedule without full steps: stores and counts the token, and makes the choice
    of a selecting step the selection. For caches whose keys and values are far away; not for compiled models.

    Args as in `decode_step`.
    """
    if CHOICE.uses_kernels(query):
        from refreshkv.ops.step import launches

        with torch.cuda.device_of(query):
            launches.choose_step(query, key, value, state, options, scaling, chosen)
    else:
        naive.choose_step(query, key, value, state, options, scaling, chosen)


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
    """`decode_step` of a layer whose keys and values are in host memory, of a schedule without full steps. A selecting
    step fetches the chosen tokens that the small cache lacks; all steps attend to the small cache.

    Args:
        query, key, value: as in `decode_step`.
        state: the layer's state, changed in place; its keys and values may be host memory.
        chosen: with score keys of 8 or 4 bits; changed in place.
        near: the small cache, changed in place.
        options, scaling: as in `decode_step`.

    Returns (B, 1, H, D).
    """
    return _fetching_step(query, key, value, *state, *chosen, *near, *options.flat(), scaling)


@torch.library.custom_op(
    "refreshkv::fetching_step",
    mutates_args=(*LayerState._fields, *SelectingState._fields, *(f"near_{name}" for name in NearState._fields)),
)
def _fetching_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    row_state: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    observers: Tensor,
    full_steps: Tensor,
    codes: Tensor,
    scales: Tensor,
    selecting_steps: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    near_length: Tensor,
    near_row_state: Tensor,
    near_selected: Tensor,
    near_held: Tensor,
    near_slot_of: Tensor,
    near_own: Tensor,
    near_fetched: Tensor,
    near_wanted: Tensor,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    pool_ahead: bool,
    select_stride: int | None,
    scaling: float,
) -> Tensor:
    state = LayerState(keys, values, length, row_state, selected, ranking, mean_query, observers, full_steps)
    small = (near_keys, near_values, near_length, near_row_state, near_selected)
    near = NearState(*small, near_held, near_slot_of, near_own, near_fetched, near_wanted)
    selection = SelectionOptions(pool_kernel, observation_window, recent_window, sink_tokens, pool_ahead)
    options = StepOptions(stride, threshold, selection, select_stride)
    chosen = SelectingState(codes, scales, selecting_steps)
    if CHOICE.uses_kernels(query):
        from refreshkv.ops.step import launches as form
    else:
        form = naive
    with torch.cuda.device_of(query):
        return form.fetching_step(query, key, value, state, chosen, near, options, scaling)


def attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    scratch: SelectionScratch,
    layer: int,
    options: StepOptions,
    scaling: float,
    chosen: SelectingState | None = None,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """`decode_step` of one of N layers by kernels, without the selection of full steps, which `select_step` makes for
    all of them.

    Args:
        query, key, value: as in `decode_step`.
        state: the layer's keys, values, length and observers, and the decisions of all layers, (N, ...).
        scratch: that of all layers, (N, ...); this layer writes its part.
        layer: which of the N layers this is.
        options, scaling, chosen, terms: as in `decode_step`.

    Returns (B, 1, H, D). scratch, and the decisions, which a selecting step changes, are left out of `mutates_args` on
    purpose: declared, functionalization would clone them. That is safe because only `select_step` and later steps read
    them, after every `attend_step`, for it takes the `length` that the last of them changes.
    """
    keys, values, length, row_state, selected, ranking, mean_query, observers, _ = state
    return _attend_step(
        query, key, value, keys, values, length, observers, *(chosen or NO_SELECTING_STEPS), row_state, selected,
        ranking, mean_query, list(scratch), layer, *options.flat(), scaling, *terms,
    )  # fmt: skip


@torch.library.custom_op(
    "refreshkv::attend_step", mutates_args=("keys", "values", "length", "observers", *SelectingState._fields)
)
def _attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    observers: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    selecting_steps: Tensor | None,
    row_state: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    scratch: list[Tensor],
    layer: int,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    pool_ahead: bool,
    select_stride: int | None,
    scaling: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    from refreshkv.ops.step import launches

    # an attending layer neither reads nor writes the flags of full steps: `row_state` stands in their place
    own_state = (part[layer] for part in (row_state, selected, ranking, mean_query))
    state = LayerState(keys, values, length, *own_state, observers, row_state)
    chosen = SelectingState(codes, scales, selecting_steps)
    selection = SelectionOptions(pool_kernel, observation_window, recent_window, sink_tokens, pool_ahead)
    options = StepOptions(stride, threshold, selection, select_stride)
    with torch.cuda.device_of(query):
        own = SelectionScratch(*scratch).of(layer)
        terms = SoftmaxTerms(sinks, softcap)
        return launches.attend_and_rank(query, key, value, state, own, options, scaling, chosen, terms=terms)


def select_step(scratch: SelectionScratch, length: Tensor, decisions: Decisions, options: StepOptions) -> None:
    """Ends a step of N layers: the selections of all that were full, in one launch. Of selections that selecting steps
    have made, it puts the ranks in order that drop first.

    Args:
        scratch: what `attend_step` wrote, (N, ...).
        length: () int64: the last layer's.
        decisions: those of all layers, (N, ...), changed in place.
        options: as in `decode_step`.
    """
    _select_step(list(scratch), length, *decisions, *options.flat())


@torch.library.custom_op("refreshkv::select_step", mutates_args=Decisions._fields)
def _select_step(
    scratch: list[Tensor],
    length: Tensor,
    row_state: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    full_steps: Tensor,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    pool_ahead: bool,
    select_stride: int | None,
) -> None:
    from refreshkv.ops.step import launches

    decisions = Decisions(row_state, selected, ranking, mean_query, full_steps)
    decisions = Decisions(*(tensor.flatten(0, 1) for tensor in decisions))
    selection = SelectionOptions(pool_kernel, observation_window, recent_window, sink_tokens, pool_ahead)
    with torch.cuda.device_of(selected):
        whole = SelectionScratch(*(part.flatten(0, 1) for part in scratch))
        launches.select(whole, length, decisions, StepOptions(stride, threshold, selection, select_stride))


@_select_step.register_fake
def _(*args) -> None:
    return None


@torch.library.custom_op("refreshkv::full_step", mutates_args=("keys", "values", "length"))
def full_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    row_state: Tensor,
    scaling: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Appends one token to a cache and attends to all tokens.

    Args:
        query: (B, H, 1, D), the token's.
        key, value: (B, Hkv, 1, D), the token's.
        keys, values: (B, Hkv, L, D), changed in place.
        length: () int64: tokens so far, changed in place.
        row_state: (B, 4) int64, of which the padded columns are read.
        scaling: factor of the logits.
        sinks, softcap: as in `refreshkv.ops.state.SoftmaxTerms`.

    Returns (B, 1, H, D).
    """
    terms = SoftmaxTerms(sinks, softcap)
    if CHOICE.uses_kernels(keys):
        from refreshkv.ops.step import launches

        with torch.cuda.device_of(keys):
            return launches.full_step(query, key, value, keys, values, length, row_state, scaling, terms)
    return naive.full_step(query, key, value, keys, values, length, row_state, scaling, terms)


def compact_step(
    query: Tensor, key: Tensor, value: Tensor, state: CompactState, sink_tokens: int, heavy: bool, scaling: float
) -> Tensor:
    """One token attends to the entries of a compact cache and to itself and joins them; then one entry is dropped if
    there are more than the budget.

    Args:
        query, key, value: as in `decode_step`.
        state: the cache's state, changed in place.
        sink_tokens: entries that are never dropped, unless `heavy`.
        heavy: drops the entry with the lowest accumulated probability that is not among the last K // 2 tokens, instead
            of the oldest.
        scaling: factor of the logits.

    Returns (B, 1, H, D).
    """
    return _compact_step(query, key, value, *state, sink_tokens, heavy, scaling)


@torch.library.custom_op("refreshkv::compact_step", mutates_args=CompactState._fields)
def _compact_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    row_state: Tensor,
    slots: Tensor,
    scores: Tensor,
    positions: Tensor,
    sink_tokens: int,
    heavy: bool,
    scaling: float,
) -> Tensor:
    token = length.clone()
    if CHOICE.uses_kernels(keys):
        from refreshkv.ops.step import launches as form
    else:
        form = naive
    state = CompactState(keys, values, length, row_state, slots, scores, positions)
    with torch.cuda.device_of(keys):
        output, probabilities = form.compact_step(query, key, value, state, heavy, scaling)
    used, budgets = row_state[:, ENTRIES_USED], row_state[:, BUDGET]
    used.copy_(torch.minimum(used + 1, budgets + 1))
    following = torch.where(slots < budgets[:, None], slots + 1, sink_tokens)
    if heavy:
        scores.scatter_(2, slots.unsqueeze(-1), 0.0)
        scores += probabilities
        positions.scatter_(2, slots.unsqueeze(-1), token.expand_as(slots).unsqueeze(-1))
        recent = positions > (token - budgets // 2)[:, None, None]
        entry = torch.arange(keys.shape[2], device=keys.device)
        lasting = recent | (entry > budgets[:, None, None])
        lightest = scores.masked_fill(lasting, torch.inf).argmin(dim=-1)
        is_full = (used > budgets)[:, None]
        following = torch.where(is_full, lightest, following)
    slots.copy_(following)
    return output


@_decode_step.register_fake
@_attend_step.register_fake
@_fetching_step.register_fake
@full_step.register_fake
@_compact_step.register_fake
def _token_output(query: Tensor, *args) -> Tensor:
    """The shape of what a step returns, for torch.compile: (B, 1, H, D)."""
    batch, heads, _, head_dim = query.shape
    return query.new_empty(batch, 1, heads, head_dim)
