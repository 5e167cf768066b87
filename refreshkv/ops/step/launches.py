"""One decoding step by Triton kernels: launches of fixed size, chosen by shapes alone; the host reads nothing.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for, `E`
entries of a compact cache.
"""

import torch
import triton
from torch import Tensor

from refreshkv.ops.selection import step as selection
from refreshkv.ops.state import (
    ENTRIES_USED,
    PARTIAL_STEPS,
    PLAIN_SOFTMAX,
    SORTED_RANKS,
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
from refreshkv.ops.step import attention, finishing, transfer
from refreshkv.ops.step import near as placing
from refreshkv.ops.step import observers as observing
from refreshkv.ops.step.finishing import Ending, Shares
from refreshkv.ops.step.selecting import bins, scoring
from refreshkv.ops.step.selecting.launches import choose_and_attend
from refreshkv.ops.step.selecting.state import Selecting, SelectingScratch
from refreshkv.ops.tiles import LOG2E, SAME_IN_ALL_THREADS, cap_of, padded_head, padded_splits, precision, sinks_of

RANKING_PROGRAMS = 1024
"""About how many programs rank the positions of all batch rows."""


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
    """`refreshkv.ops.naive.decode_step` by kernels: (B, 1, H, D)."""
    scratch = SelectionScratch.empty(query.shape[:1], *state.keys.shape[1:], query.device)
    output = attend_and_rank(query, key, value, state, scratch, options, scaling, chosen, terms=terms)
    select(scratch, state.length, state.decisions, options)
    return output


def choose_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    options: StepOptions,
    scaling: float,
    chosen: SelectingState,
) -> None:
    """`refreshkv.ops.naive.choose_step` by kernels."""
    scratch = SelectionScratch.empty(query.shape[:1], *state.keys.shape[1:], query.device)
    attend_and_rank(query, key, value, state, scratch, options, scaling, chosen, attends=False)
    select(scratch, state.length, state.decisions, options)


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
    """`refreshkv.ops.naive.fetching_step` by kernels: (B, 1, H, D)."""
    choose_step(query, key, value, state, options, scaling, chosen)
    placing.place_near(state, near)
    for source, target in ((state.keys, near.keys), (state.values, near.values)):
        transfer.gather_tokens(source, near.fetched, near.wanted, target)
    small = near.as_layer(state, query)
    scratch = SelectionScratch.empty(query.shape[:1], *near.keys.shape[1:], query.device)
    return attend_and_rank(query, key, value, small, scratch, PARTIAL_STEPS, scaling)


def attend_and_rank(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    scratch: SelectionScratch,
    options: StepOptions,
    scaling: float,
    chosen: SelectingState | None = None,
    *,
    attends: bool = True,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """A step without the selection of full steps, which `select` makes from what this writes into `scratch`:
    (B, 1, H, D). A selecting step makes its own; unless it `attends`, its output has no meaning."""
    query, key, value = _unit_stride(query, key, value)
    selecting = None
    if options.select_stride is not None:
        assert chosen is not None
        selecting = Selecting(chosen, SelectingScratch.empty(state.keys, state.observers, options), options)
    kind = {"options": options, "scratch": scratch, "selecting": selecting, "attends": attends}
    shares = attend(query, key, value, state, scaling, terms=terms, **kind)
    scores = shares.logits
    if options.selection.observation_window > 1:
        scores = _observed_scores(state, scratch.full, shares.splits, scaling, terms)
    output = query.new_empty(query.shape[0], 1, *query.shape[1::2])
    if selecting is None:
        finish(shares, output, state, scores, options.selection, scratch, sinks=sinks_of(terms))
    else:
        ending = Ending(shares, scratch, scores, output)
        choose_and_attend(query, state, selecting, ending, scaling, attends=attends, terms=terms)
    return output


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
    """`refreshkv.ops.naive.full_step` by kernels: (B, 1, H, D)."""
    query, key, value = _unit_stride(query, key, value)
    state = _undecided(keys, values, length, row_state)
    shares = attend(query, key, value, state, scaling, terms=terms)
    output = query.new_empty(query.shape[0], 1, *query.shape[1::2])
    finish(shares, output, state, shares.total, sinks=sinks_of(terms))
    return output


def compact_step(
    query: Tensor, key: Tensor, value: Tensor, compact: CompactState, heavy: bool, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """`refreshkv.ops.naive.compact_step` by kernels: (B, 1, H, D), and the entries' probabilities,
    maximum over the group, (B, Hkv, E)."""
    query, key, value = _unit_stride(query, key, value)
    state, slots = _undecided(*compact[:4]), compact.slots
    shares = attend(query, key, value, state, scaling, slots=slots, store=heavy)
    output = query.new_empty(query.shape[0], 1, *query.shape[1::2])
    finish(shares, output, state, shares.total)
    if not heavy:
        return output, None
    top = shares.highest.amax(dim=-1, keepdim=True)
    lse = top + (shares.total * torch.exp2(shares.highest - top)).sum(-1, keepdim=True).log2()
    entry = torch.arange(state.keys.shape[2], device=state.keys.device)
    visible = (entry < state.row_state[:, ENTRIES_USED, None, None]) | (entry == slots.unsqueeze(-1))
    probabilities = torch.exp2(shares.logits - lse).unflatten(1, (state.keys.shape[1], -1)).amax(dim=2)
    return output, probabilities.masked_fill(~visible, 0.0)


def _undecided(keys: Tensor, values: Tensor, length: Tensor, row_state: Tensor) -> LayerState:
    """The state of a cache that never selects; the kernels do not read what stands in the other fields."""
    unread = {"selected": row_state, "ranking": row_state, "mean_query": row_state, "full_steps": row_state}
    return LayerState(keys, values, length, row_state, observers=keys, **unread)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    scaling: float,
    *,
    options: StepOptions | None = None,
    scratch: SelectionScratch | None = None,
    slots: Tensor | None = None,
    store: bool = False,
    selecting: Selecting | None = None,
    attends: bool = True,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Shares:
    """The first launch of a step. A cache that refreshes comes with `options` and `scratch`, and with `selecting` if it
    has selecting steps; unless it `attends`, its other steps only store the token. A compact one comes with `slots`
    (B, Hkv) int64, the entries that the token takes, and with `store` if it wants the logits; another is read whole."""
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = state.keys.shape[1], state.keys.shape[2]
    group = heads // kv_heads
    splits = attention.splits_of(batch * kv_heads, query.device)
    mode, stride, threshold, observers = attention.FULL if slots is None else attention.COMPACT, 1, None, 1
    if options is not None:
        mode, stride, threshold, observers = attention.REFRESH, *options[:2], options.selection.observation_window
        store = observers == 1 and (selecting is None or options.has_full_steps)
    if selecting is not None:
        logits = selecting.scratch.logits
    else:
        logits = query.new_empty(batch, heads, capacity, dtype=torch.float32) if store else None
    bits = 16 if selecting is None else selecting.state.bits
    shares = Shares(query, splits, logits)
    full, arrived, now = (shares.total,) * 3 if scratch is None else (scratch.full, scratch.arrived, scratch.now)
    attention._attend[splits, batch * kv_heads](
        query, key, value, state.keys, state.values, state.length, state.row_state,
        state.row_state if slots is None else slots, state.selected, state.mean_query, state.observers,
        full, now, arrived, shares.logits, shares.partial, shares.highest, shares.total,
        *_score_buffers(selecting, state.keys, shares.total),
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], kv_heads, capacity, shares.logits.shape[-1],
        state.selected.shape[-1], stride, options.select_stride or 1 if options else 1, threshold or 0.0,
        scaling * LOG2E,
        G=group, H=heads, D=head_dim, HP=triton.next_power_of_2(heads), DP=padded_head(head_dim),
        MP=max(16, triton.next_power_of_2(group)), OBSERVERS=observers,
        MODE=mode.value, SIMILARITY=threshold is not None, STORE=store, PRECISION=precision(query),
        SELECTS=selecting is not None, BITS=bits, BINS=bins.BINS, ASM=scoring.takes_ptx(query), ATTENDS=attends,
        CAP=cap_of(terms), **scoring.tile_of(query, bits, group * observers), **attention.tile_of(query),
    )  # fmt: skip
    return shares


def _score_buffers(selecting: Selecting | None, keys: Tensor, unused: Tensor) -> tuple[Tensor, ...]:
    """The buffers of the score keys and of what `_attend` writes for the launches of a selecting step."""
    if selecting is None:
        return (unused,) * 8
    codes, scales, _ = selecting.state
    scratch = selecting.scratch
    stored = (keys if codes is None else codes, unused if scales is None else scales)
    written = (scratch.selecting, scratch.histogram, scratch.counters, scratch.middle, scratch.highest, scratch.total)
    return (*stored, *written)


def finish(
    shares: Shares,
    output: Tensor,
    state: LayerState,
    scores: Tensor,
    options: SelectionOptions | None = None,
    scratch: SelectionScratch | None = None,
    sinks: Tensor | None = None,
) -> None:
    """The last launch of a step of a cache without selecting steps: merges the shares into output (B, 1, H, D) and
    counts the token. With `options` and `scratch` it ranks the positions of full batch rows, from the logits (B, H, L)
    of a single observer, or from the `scores` (B, Hkv, L) of several. sinks: (H,), of the softmax."""
    batch, kv_heads, capacity, head_dim = state.keys.shape
    group = output.shape[2] // kv_heads
    full, rankings = (shares.total,) * 2 if scratch is None else (scratch.full, scratch.rankings)
    options = options or SelectionOptions(1, 1, 0, 0)
    programs = min(triton.cdiv(capacity, finishing.RANKED), max(1, RANKING_PROGRAMS // (batch * kv_heads)))
    finishing._finish[group + (0 if scratch is None else programs), batch * kv_heads](
        shares.partial, shares.highest, shares.total, output, state.length, state.row_state, full, shares.logits,
        scores, rankings, sinks, kv_heads, capacity, shares.logits.shape[-1], shares.splits, options.recent_window,
        options.sink_tokens,
        G=group, GP=triton.next_power_of_2(group), D=head_dim, DP=padded_head(head_dim),
        NP=padded_splits(shares.splits), POOL=options.pool_kernel, BEFORE=options.pooled_before,
        RANK=scratch is not None, OBSERVED=options.observation_window > 1, BLOCK=finishing.RANKED,
        num_warps=4, **SAME_IN_ALL_THREADS,
    )  # fmt: skip


def select(scratch: SelectionScratch, length: Tensor, decisions: Decisions, options: StepOptions) -> None:
    """The last launch of a step: the selections of the batch rows, of one layer or of several, that were full."""
    row_state, selected, ranking, mean_query, full_steps = decisions
    batch, kv_heads, capacity = scratch.rankings.shape
    head_dim, device = mean_query.shape[1], selected.device
    parts = selection.parts_of(batch * kv_heads, capacity)
    sizes = selection.sizes_of(capacity, selected.shape[2], parts)
    candidates = torch.empty(batch, kv_heads, parts, 2, sizes["CANDIDATES"], dtype=torch.int32, device=device)
    # a part begins with a whole block, in which the row's first position may lie
    room = triton.cdiv(triton.cdiv(capacity + sizes["BLOCK"], parts), sizes["BLOCK"]) * sizes["BLOCK"]
    stage = torch.empty(batch, kv_heads, parts, 2, room, dtype=torch.int32, device=device) if parts > 1 else candidates
    counts = torch.empty(batch, kv_heads, parts, 2, dtype=torch.int32, device=device) if parts > 1 else candidates
    selection._select[batch * kv_heads, parts](  # many layers and rows: more than the other dimensions take
        scratch.rankings, candidates, stage, counts, scratch.arrived, selected, ranking, row_state, length,
        scratch.full, full_steps, scratch.now, mean_query,
        kv_heads, capacity, selected.shape[2], room, selection.MARGIN,
        D=head_dim, DP=padded_head(head_dim), SIMILARITY=options.threshold is not None, SORTED_RANKS=SORTED_RANKS,
        LAST_RANKS=options.last_ranks, SELECTS=options.select_stride is not None, num_warps=selection.WARPS, **sizes,
    )  # fmt: skip


def _observed_scores(state: LayerState, full: Tensor, splits: int, scaling: float, terms: SoftmaxTerms) -> Tensor:
    """Mean over the observing queries of their group's highest probability: (B, Hkv, L) float32, at full steps."""
    observers, keys, row_state = state.observers, state.keys, state.row_state
    batch, heads, window, head_dim = observers.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    group, pairs = heads // kv_heads, batch * kv_heads
    highest = torch.empty(batch, heads, window, splits, dtype=torch.float32, device=observers.device)
    total = torch.empty_like(highest)
    scores = torch.empty(batch, kv_heads, capacity, dtype=torch.float32, device=observers.device)
    shared = {"G": group, "D": head_dim, "DP": padded_head(head_dim), "PRECISION": precision(keys)}
    shared["CAP"] = cap_of(terms)
    small = keys.element_size() * padded_head(head_dim) > 256
    tile = min(16 if small else 64, max(16, triton.next_power_of_2(window * group)))
    observing._observer_sums[splits, triton.cdiv(window * group, tile), pairs](
        observers, keys, row_state, full, highest, total, kv_heads, capacity, scaling * LOG2E,
        OBSERVERS=window, BLOCK_M=tile, BLOCK_N=32 if small else 64, **shared,
    )  # fmt: skip
    programs = min(triton.cdiv(capacity, 128), max(1, RANKING_PROGRAMS // pairs))
    observing._observer_scores[programs, pairs](
        observers, keys, row_state, full, highest, total, scores, kv_heads, capacity, splits, scaling * LOG2E,
        sinks_of(terms),
        GP=max(16, triton.next_power_of_2(group)), NP=padded_splits(splits), OBSERVERS=window,
        BLOCK_N=32 if small else 128, **shared, **SAME_IN_ALL_THREADS,
    )  # fmt: skip
    return scores


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
