"""The launches of a selecting step, of fixed size, chosen by shapes alone; the host reads nothing.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `N` shares of the positions.
"""

import torch
import triton
from torch import Tensor

from refreshkv.ops.selection.score_keys import padded_half
from refreshkv.ops.step.selecting import attention, bins, ranking, scoring, shares, threshold
from refreshkv.ops.step.selecting.state import SelectingCache, SelectingOptions, SelectingScratch
from refreshkv.ops.tiles import LOG2E, SAME_IN_ALL_THREADS, padded_head, precision


def selecting_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: SelectingCache,
    scratch: SelectingScratch,
    options: SelectingOptions,
    scaling: float,
) -> Tensor:
    """A decoding step of the batch rows for which it is a selecting one (specification, section 10).

    Args:
        query: (B, H, 1, D), the token's.
        key: (B, Hkv, 1, D), the token's, like value.
        value: (B, Hkv, 1, D).
        cache: the layer's state, with room for the token. Changed in place: the token is stored and counted, and its
            query is put among the observers.
        scratch: memory for the launches; afterwards it says what was chosen.
        options: the fixed schedule, and how positions rank.
        scaling: of the logits.

    Returns:
        (B, 1, H, D): the attention to the chosen positions; 0 in other batch rows, whose token the caller stores.
    """
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    score(query, key, value, cache, scratch, options, scaling)
    rank(cache, scratch, options)
    find_threshold(cache, scratch, options)
    partial, highest, total = attend(query, cache, scratch, scaling)
    output = query.new_zeros(query.shape[0], 1, *query.shape[1::2])
    merge(partial, highest, total, output, cache.length, scratch)
    return output


def score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: SelectingCache,
    scratch: SelectingScratch,
    options: SelectingOptions,
    scaling: float,
    **tile: int,
) -> None:
    """The first launch: stores the token, and writes the logits of all positions.

    Args:
        query, key, value, cache, scratch, options, scaling: as in `selecting_step`; the last dimension is contiguous.
        tile: entries of `scoring.TILE` to change.
    """
    keys, values, score_keys, length, row_state, observers = cache
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    group, window = heads // kv_heads, observers.shape[2]
    scoring._score[scratch.highest.shape[3], batch * kv_heads](
        query, key, value, keys, values, score_keys.codes, score_keys.scales, observers, length, row_state,
        scratch.selecting, scratch.histogram, scratch.counters, scratch.logits, scratch.highest, scratch.total,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], kv_heads, capacity,
        scratch.logits.shape[3], options.stride, options.select_stride, scaling * LOG2E,
        G=group, D=head_dim, DH=padded_half(head_dim), MP=max(8, triton.next_power_of_2(group * window)),
        OBSERVERS=window, BITS=score_keys.bits, BINS=bins.BINS, PRECISION=precision(query),
        ASM=scoring.unpacks_by_ptx(query), **scoring.tile_of(query, **tile),
    )  # fmt: skip


def rank(cache: SelectingCache, scratch: SelectingScratch, options: SelectingOptions, warps: int = 4) -> None:
    """The second launch: writes the rankings of all positions, and counts them.

    Args:
        cache, scratch, options: as in `selecting_step`.
        warps: of each program.
    """
    batch, kv_heads, rows, room = scratch.logits.shape
    splits, group = scratch.highest.shape[3], cache.observers.shape[1] // kv_heads
    parts = shares.parts_of(batch * kv_heads, room - shares.RANKED, options.pool_kernel)
    before = options.pool_kernel - 1 if options.pool_ahead else options.pool_kernel // 2
    ranking._rank[parts, batch * kv_heads](
        scratch.logits, scratch.highest, scratch.total, cache.row_state, scratch.selecting, scratch.scores,
        scratch.rankings, scratch.histogram, kv_heads, room, splits, options.recent_window, options.sink_tokens,
        float(group * options.pool_kernel),
        G=group, MP=triton.next_power_of_2(rows), NP=max(2, triton.next_power_of_2(splits)), OBSERVERS=rows // group,
        POOL=options.pool_kernel, BEFORE=before, BLOCK=shares.RANKED, BINS=bins.BINS, FINE=bins.FINE,
        BIN_BITS=bins.BIN_BITS, num_warps=warps, **SAME_IN_ALL_THREADS,
    )  # fmt: skip


def find_threshold(
    cache: SelectingCache, scratch: SelectingScratch, options: SelectingOptions, warps: int | None = None
) -> None:
    """The third launch: writes which positions are chosen.

    Args:
        cache, scratch, options: as in `selecting_step`.
        warps: of each program; by the number of candidates if None.
    """
    batch, kv_heads, room = scratch.rankings.shape
    candidates, group = scratch.candidates.shape[3], cache.observers.shape[1] // kv_heads
    threshold._find_threshold[shares.parts_of(batch * kv_heads, room - shares.RANKED, 1), batch * kv_heads](
        cache.row_state, scratch.selecting, scratch.rankings, scratch.histogram, scratch.counters, scratch.candidates,
        scratch.choices, kv_heads, room, float(group * options.pool_kernel),
        BINS=bins.BINS, FINE=bins.FINE, BIN_BITS=bins.BIN_BITS, CANDIDATES=candidates, BLOCK=shares.RANKED,
        SEARCHED=threshold.SEARCHED, num_warps=warps or threshold.warps_of(candidates),
    )  # fmt: skip


def attend(
    query: Tensor, cache: SelectingCache, scratch: SelectingScratch, scaling: float, **tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fourth launch: attends to the chosen positions.

    Args:
        query, cache, scratch, scaling: as in `selecting_step`; the query's last dimension is contiguous.
        tile: entries of `refreshkv.ops.step.attention.TILE` to change.

    Returns:
        The shares, float32: output (B, H, N, D), maximum and sum (B, H, N). The output of an empty share is undefined.
    """
    keys, values = cache.keys, cache.values
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    splits, room = scratch.listed.shape[2:]
    partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=query.device)
    highest, total = (torch.empty(batch, heads, splits, dtype=torch.float32, device=query.device) for _ in range(2))
    group = heads // kv_heads
    attention._attend[splits, batch * kv_heads](
        query, keys, values, cache.row_state, scratch.selecting, scratch.rankings, scratch.choices, scratch.listed,
        partial, highest, total, *query.stride()[:2], kv_heads, capacity, scratch.rankings.shape[2], room,
        scaling * LOG2E,
        G=group, D=head_dim, DP=padded_head(head_dim), MP=max(16, triton.next_power_of_2(group)), RUN=shares.RUN,
        LISTED=min(attention.MOST_LISTED, triton.next_power_of_2(room)), PRECISION=precision(query),
        **attention.tile_of(query, **tile),
    )  # fmt: skip
    return partial, highest, total


def merge(
    partial: Tensor, highest: Tensor, total: Tensor, output: Tensor, length: Tensor, scratch: SelectingScratch
) -> None:
    """The last launch: merges the shares.

    Args:
        partial, highest, total: what `attend` returned.
        output: (B, 1, H, D), written in the batch rows whose step is a selecting one.
        length: () int64, which counts the token.
        scratch: as in `selecting_step`.
    """
    batch, heads, splits, head_dim = partial.shape
    kv_heads = scratch.rankings.shape[1]
    attention._merge[heads // kv_heads, batch * kv_heads](
        partial, highest, total, output, length, scratch.selecting, kv_heads, splits,
        G=heads // kv_heads, D=head_dim, DP=padded_head(head_dim), NP=max(2, triton.next_power_of_2(splits)),
        num_warps=4,
    )  # fmt: skip
