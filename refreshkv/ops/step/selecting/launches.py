"""What a selecting step launches between the first and the last launch of every step: fixed size, chosen by shapes
alone.

The host reads nothing. Programs of batch rows for which the step is not a selecting one end at once.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

import torch
import triton
from torch import Tensor

from refreshkv.ops.state import PLAIN_SOFTMAX, LayerState, SelectionOptions, SoftmaxTerms
from refreshkv.ops.step.attention import tile_of
from refreshkv.ops.step.selecting import attention, bins, ranking, shares, threshold
from refreshkv.ops.step.selecting.state import SelectingScratch
from refreshkv.ops.tiles import LOG2E, SAME_IN_ALL_THREADS, cap_of, padded_head, precision, sinks_of

WARPS, REGISTERS, SHARED_MEMORY = 4, 128, 56 * 1024
"""Warps of a program that does all stages, the registers of a thread, and most bytes of shared memory: so
PROGRAMS_PER_PROCESSOR of them run at once on a multiprocessor of Hopper GPUs. `_choose_and_attend` needs no more for
16-bit caches, heads up to 128 and groups up to LARGEST_GROUP."""

LARGEST_GROUP = 32
"""Query heads of a group."""


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
    """Ranks the positions by their logits, finds the best ones and attends to them: one launch where all its programs
    run at once, else one for each stage.

    Args:
        query: (B, H, 1, D), the token's; its last dimension is contiguous.
        state: the layer's state, which holds the token already.
        scratch: what the first launch of the step wrote; afterwards the choice, and the shares of the attention.
        options: how positions rank.
        scaling: factor of the logits.
        attends: whether to attend to them, or only to list them.
        terms: the softmax's.
    """
    stages = [stage.value for stage in (attention.RANK, attention.LIST, attention.NARROW, attention.ATTEND)]
    spans = [(stage, stage) for stage in stages]
    if run_at_once(query, state.keys.shape[1]):
        spans = [(stages[0], stages[-1])]
    for first, last in spans:
        launch(query, state, scratch, options, scaling, first, last, attends=attends, terms=terms)


def run_at_once(query: Tensor, kv_heads: int) -> bool:
    """True if all programs of `_choose_and_attend` run at once, so that they can wait for each other."""
    if not isinstance(attention._choose_and_attend, triton.JITFunction):
        return False  # Triton's interpreter runs one after the other
    if not query.is_cuda or torch.version.hip is not None or query.element_size() != 2 or query.shape[-1] > 128:
        return False
    if query.shape[1] // kv_heads > LARGEST_GROUP:
        return False
    properties = torch.cuda.get_device_properties(query.device)
    memory = attention.PROGRAMS_PER_PROCESSOR * SHARED_MEMORY
    return properties.major >= 9 and properties.shared_memory_per_multiprocessor >= memory


def launch(
    query: Tensor,
    state: LayerState,
    scratch: SelectingScratch,
    options: SelectionOptions,
    scaling: float,
    first: int,
    last: int,
    *,
    attends: bool = True,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> None:
    """One launch of the stages `first` to `last` of `_choose_and_attend`; the other arguments as above."""
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = state.keys.shape[1:3]
    rows, logit_splits = scratch.highest.shape[2:]
    splits, _, list_room = scratch.listed.shape[2:]
    group, pool_kernel = heads // kv_heads, options.pool_kernel
    tile = tile_of(query)
    if first < last:
        # where there are more programs than run at once, each has a row for itself, and waits for nobody
        tile = tile | {"num_warps": WARPS, "maxnreg": REGISTERS, "launch_cooperative_grid": splits > 1}
    listed_tile = min(attention.LISTED_AT_ONCE, triton.next_power_of_2(list_room))
    near_tile = min(max(attention.FEWEST_NEAR, triton.next_power_of_2(list_room // 20)), attention.MOST_NEAR)
    attention._choose_and_attend[splits, batch * kv_heads](
        query, state.keys, state.values, state.row_state, scratch.selecting, scratch.logits, scratch.highest,
        scratch.total, scratch.scores, scratch.rankings, scratch.histogram, scratch.counters, scratch.finalists,
        scratch.choices, scratch.listed, scratch.counts, scratch.near_counts, scratch.partial, scratch.chosen_highest,
        scratch.chosen_total, sinks_of(terms), *query.stride()[:2], kv_heads, capacity, scratch.rankings.shape[2],
        logit_splits, list_room, options.recent_window, options.sink_tokens, float(group * pool_kernel),
        scaling * LOG2E,
        FIRST=first, LAST=last, G=group, D=head_dim, DP=padded_head(head_dim),
        MP=max(16, triton.next_power_of_2(group)), ROWS=triton.next_power_of_2(rows),
        NP=max(2, triton.next_power_of_2(logit_splits)), OBSERVERS=options.observation_window, POOL=pool_kernel,
        BEFORE=options.pooled_before, KEEPS=pool_kernel > ranking.COMPUTED_ANEW, BLOCK=shares.RANKED,
        REST=min(shares.REST, shares.RANKED), BINS=bins.BINS, FINE=bins.FINE, COARSE_BITS=bins.COARSE_BITS,
        BIN_BITS=bins.BIN_BITS, MOST=scratch.finalists.shape[3], SEARCHED=threshold.SEARCHED, RUN=shares.RUN,
        LISTED_TILE=listed_tile, NEAR_TILE=near_tile, LIST_STAGES=attention.LIST_STAGES, ATTENDS=attends,
        PRECISION=precision(query), CAP=cap_of(terms), **tile, **SAME_IN_ALL_THREADS,
    )  # fmt: skip
