"""The second launch of a step of a cache with selecting steps: fixed size, chosen by shapes alone.

The host reads nothing.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for.
"""

import torch
import triton
from torch import Tensor

from refreshkv.ops.state import PLAIN_SOFTMAX, LayerState, SoftmaxTerms
from refreshkv.ops.step.attention import tile_of
from refreshkv.ops.step.finishing import Ending
from refreshkv.ops.step.selecting import attention, bins, ranking, scoring, shares, threshold
from refreshkv.ops.step.selecting.state import Selecting
from refreshkv.ops.tiles import LOG2E, SAME_IN_ALL_THREADS, cap_of, padded_head, padded_splits, precision, sinks_of

WARPS, REGISTERS, SHARED_MEMORY = 4, 128, 56 * 1024
"""Warps of a program that does all stages, the registers of a thread, and most bytes of shared memory: so
PROGRAMS_PER_PROCESSOR of them run at once on a multiprocessor of Hopper GPUs. `_choose_and_attend` needs no more for
16-bit caches, heads up to 128 and groups up to LARGEST_GROUP."""

LARGEST_GROUP = 32
"""Query heads of a group."""

MERGED_AT_ONCE = 4096
"""Most numbers of shares that a program merges at once, so that they fit the registers."""

FEWEST_COLUMNS = 32
"""Fewest columns of an output that a program merges."""


def choose_and_attend(
    query: Tensor,
    state: LayerState,
    selecting: Selecting,
    ending: Ending,
    scaling: float,
    *,
    attends: bool = True,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> None:
    """Ends a step. At a selecting step it ranks the positions by their logits, finds the best ones, attends to them and
    keeps them as the selection: one launch where all its programs run at once, else one for each stage.

    Args:
        query: (B, H, 1, D), the token's; its last dimension is contiguous.
        state: the layer's state, which holds the token already; its length, row_state, selected and ranking change.
        selecting: what the cache has for selecting steps; its scratch holds what the first launch of the step wrote,
            and afterwards the choice.
        ending: what else the first launch left, and where this one writes.
        scaling: factor of the logits.
        attends: whether to attend to the chosen positions and to write the output, or only to keep them.
        terms: the softmax's.
    """
    stages = (attention.RANK, attention.LIST, attention.NARROW, attention.ATTEND, attention.FINISH)
    spans = [(stage.value, stage.value) for stage in stages]
    if run_at_once(query, state.keys.shape[1]):
        spans = [(spans[0][0], spans[-1][0])]
    for span in spans:
        launch(query, state, selecting, ending, scaling, span, attends=attends, terms=terms)


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
    selecting: Selecting,
    ending: Ending,
    scaling: float,
    span: tuple[int, int],
    *,
    attends: bool = True,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> None:
    """One launch of the stages of `_choose_and_attend` from span[0] to span[1]; the other arguments as above."""
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = state.keys.shape[1:3]
    own, options, step = selecting.scratch, selecting.options, ending.shares
    selection, flags = options.selection, selecting.state.selecting_steps
    assert flags is not None
    splits, _, list_room = own.listed.shape[2:]
    group, pool_kernel = heads // kv_heads, selection.pool_kernel
    tile = tile_of(query)
    if span[0] < span[1]:
        # where there are more programs than run at once, each has a row for itself, and waits for nobody
        tile = tile | {"num_warps": WARPS, "maxnreg": REGISTERS, "launch_cooperative_grid": splits > 1}
    listed_tile = min(attention.LISTED_AT_ONCE, triton.next_power_of_2(list_room))
    near_tile = min(max(attention.FEWEST_NEAR, triton.next_power_of_2(list_room // 20)), attention.MOST_NEAR)
    attention._choose_and_attend[splits, batch * kv_heads](
        query, state.keys, state.values, state.row_state, own.selecting, own.logits, own.middle, own.highest, own.total,
        own.scores, own.rankings, own.histogram, own.counters, own.finalists, own.choices, own.listed, own.counts,
        own.near_counts, own.partial, own.chosen_highest, own.chosen_total, sinks_of(terms), step.partial, step.highest,
        step.total, ending.output, state.length, state.selected, state.ranking, flags, ending.scratch.full,
        ending.scores, ending.scratch.rankings, *query.stride()[:2], kv_heads, capacity, own.rankings.shape[2],
        state.selected.shape[2], step.splits, list_room,
        selection.recent_window, selection.sink_tokens, float(group * pool_kernel), scaling * LOG2E,
        FIRST=span[0], LAST=span[1], G=group, D=head_dim, DP=padded_head(head_dim),
        MP=max(16, triton.next_power_of_2(group)), ROWS=triton.next_power_of_2(own.highest.shape[2]),
        SNP=padded_splits(step.splits), NP=padded_splits(splits), OBSERVERS=selection.observation_window,
        POOL=pool_kernel, BEFORE=selection.pooled_before, KEEPS=pool_kernel > ranking.COMPUTED_ANEW,
        BLOCK=shares.RANKED, REST=min(shares.REST, shares.RANKED), BINS=bins.BINS, FINE=bins.FINE,
        COARSE_BITS=bins.COARSE_BITS, BIN_BITS=bins.BIN_BITS, MOST=own.finalists.shape[3],
        FEW=threshold.FEW_FINALISTS, SEARCHED=threshold.SEARCHED, RUN=shares.RUN, LISTED_TILE=listed_tile,
        NEAR_TILE=near_tile, LIST_STAGES=attention.LIST_STAGES, ATTENDS=attends, PRECISION=precision(query),
        CAP=cap_of(terms),
        **merged_tile(splits, step.splits, group, padded_head(head_dim)),
        GP=triton.next_power_of_2(group), FULL_STEPS=options.has_full_steps,
        ORDERED=options.last_ranks > 0, PREFERS=selection.recent_window + selection.sink_tokens > 0,
        ASM=scoring.takes_ptx(query), **tile, **SAME_IN_ALL_THREADS,
    )  # fmt: skip


def merged_tile(splits: int, step_splits: int, group: int, head_dim: int) -> dict[str, int]:
    """The tile of shares that a program merges: of how many query heads of a group, and how many of their columns. A
    row's outputs have about as many tiles as the row has programs, `splits`."""
    merged, heads, columns = padded_splits(max(splits, step_splits)), 1, head_dim
    while heads * splits < group and 2 * heads * merged * columns <= MERGED_AT_ONCE:
        heads *= 2
    while columns > FEWEST_COLUMNS and (
        heads * merged * columns > MERGED_AT_ONCE or group * (head_dim // columns) < heads * splits
    ):
        columns //= 2
    return {"MERGED": merged, "HEADS": heads, "COLUMNS": columns}
