"""The launches of a selecting step between the first and the last of every step: fixed size, chosen by shapes alone.

The host reads nothing. Programs of batch rows for which the step is not a selecting one end at once.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `M` shares of the chosen positions.
"""

import triton
from torch import Tensor

from refreshkv.ops.state import PLAIN_SOFTMAX, LayerState, SelectionOptions, SoftmaxTerms
from refreshkv.ops.step.attention import tile_of
from refreshkv.ops.step.selecting import attention, bins, ranking, shares, threshold
from refreshkv.ops.step.selecting.state import SelectingScratch
from refreshkv.ops.tiles import LOG2E, SAME_IN_ALL_THREADS, cap_of, padded_head, precision, sinks_of


def choose_and_attend(
    query: Tensor,
    state: LayerState,
    scratch: SelectingScratch,
    options: SelectionOptions,
    scaling: float,
    *,
    attends: bool = True,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> None:
    """Three launches: ranks the positions by their logits, finds the threshold, and attends to the chosen ones.

    Args:
        query: (B, H, 1, D), the token's; its last dimension is contiguous.
        state: the layer's state, which holds the token already.
        scratch: what the first launch of the step wrote; afterwards the choice, and the shares of the attention.
        options: how positions rank.
        scaling: factor of the logits.
        attends: whether to attend to them, or only to list them.
        terms: the softmax's.
    """
    rank(state, scratch, options, terms=terms)
    find_threshold(state, scratch, options)
    attend(query, state, scratch, scaling, attends=attends, terms=terms)


def rank(
    state: LayerState,
    scratch: SelectingScratch,
    options: SelectionOptions,
    warps: int = 4,
    *,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> None:
    """The second launch of a step: writes the rankings of all positions, and counts them.

    Args:
        state, scratch, options, terms: as in `choose_and_attend`.
        warps: of each program.
    """
    batch, kv_heads, rows, room = scratch.logits.shape
    splits, group = scratch.highest.shape[3], rows // options.observation_window
    parts = shares.parts_of(
        batch * kv_heads, state.keys.shape[2], options.pool_kernel, shares.RANKED, shares.RANK_PROGRAMS
    )
    ranking._rank[parts, batch * kv_heads](
        scratch.logits, scratch.highest, scratch.total, state.row_state, scratch.selecting, scratch.scores,
        scratch.rankings, scratch.histogram, kv_heads, room, splits, options.recent_window, options.sink_tokens,
        float(group * options.pool_kernel), sinks_of(terms),
        G=group, MP=triton.next_power_of_2(rows), NP=max(2, triton.next_power_of_2(splits)),
        OBSERVERS=options.observation_window, POOL=options.pool_kernel, BEFORE=options.pooled_before,
        BLOCK=shares.RANKED, BINS=bins.BINS, FINE=bins.FINE, BIN_BITS=bins.BIN_BITS,
        KEEPS=options.pool_kernel > ranking.COMPUTED_ANEW, num_warps=warps, **SAME_IN_ALL_THREADS,
    )  # fmt: skip


def find_threshold(
    state: LayerState, scratch: SelectingScratch, options: SelectionOptions, warps: int | None = None
) -> None:
    """The third launch of a step: writes which positions are chosen.

    Args:
        state, scratch, options: as in `choose_and_attend`.
        warps: of each program; by the number of candidates if None.
    """
    batch, kv_heads, room = scratch.rankings.shape
    candidates, group = scratch.candidates.shape[3], scratch.logits.shape[2] // options.observation_window
    capacity = state.keys.shape[2]
    tile = shares.collected_of(capacity)
    parts = shares.parts_of(batch * kv_heads, capacity, 1, tile, shares.THRESHOLD_PROGRAMS)
    threshold._find_threshold[parts, batch * kv_heads](
        state.row_state, scratch.selecting, scratch.rankings, scratch.histogram, scratch.counters, scratch.candidates,
        scratch.choices, kv_heads, room, float(group * options.pool_kernel),
        BINS=bins.BINS, FINE=bins.FINE, BIN_BITS=bins.BIN_BITS, CANDIDATES=candidates, BLOCK=tile,
        SEARCHED=threshold.SEARCHED, num_warps=warps or threshold.warps_of(candidates),
    )  # fmt: skip


def attend(
    query: Tensor,
    state: LayerState,
    scratch: SelectingScratch,
    scaling: float,
    *,
    attends: bool = True,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> None:
    """The fourth launch of a step: lists the chosen positions and attends to them, in shares.

    Args as in `choose_and_attend`.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = state.keys.shape[1:3]
    splits, list_room = scratch.listed.shape[2:]
    group = heads // kv_heads
    attention._attend_to_chosen[splits, batch * kv_heads](
        query, state.keys, state.values, state.row_state, scratch.selecting, scratch.rankings, scratch.choices,
        scratch.listed, scratch.counts, scratch.partial, scratch.chosen_highest, scratch.chosen_total,
        *query.stride()[:2], kv_heads, capacity, scratch.rankings.shape[2], list_room, scaling * LOG2E,
        G=group, D=head_dim, DP=padded_head(head_dim), MP=max(16, triton.next_power_of_2(group)), RUN=shares.RUN,
        LISTED=min(attention.MOST_LISTED, triton.next_power_of_2(list_room)), LIST_STAGES=attention.LIST_STAGES,
        PRECISION=precision(query), ATTENDS=attends, CAP=cap_of(terms), **tile_of(query),
    )  # fmt: skip
