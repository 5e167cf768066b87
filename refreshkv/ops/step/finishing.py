"""Triton kernels: the end of a decoding step. It merges the shares of the attention and, at full steps, ranks the
positions for the selection.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `L` tokens the cache has
room for, `N` shares, padded to NP.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.selection.top_k import PREFERRED
from refreshkv.ops.state import SelectionScratch
from refreshkv.ops.tiles import PADDING, ROW_COLUMNS, add_sinks, load_sinks, with_sink

RANKED = 1024
"""Positions that a program ranks at once at full steps."""


class Shares:
    """What `_attend` writes: the output (B, H, N, D), maximum and sum (B, H, N) of each share of the keys, and the
    logits that it was asked for, if any."""

    def __init__(self, query: Tensor, splits: int, logits: Tensor | None):
        batch, heads, _, head_dim = query.shape

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=query.device)

        self.splits = splits
        self.partial = buffer(batch, heads, splits, head_dim)
        self.highest, self.total = buffer(batch, heads, splits), buffer(batch, heads, splits)
        self.logits = self.total if logits is None else logits


class Ending(NamedTuple):
    """What the first launch of a step left for the last, and where that one writes."""

    shares: Shares
    """What the first launch attended to."""
    scratch: SelectionScratch
    """Says which batch rows are full, and takes the rankings of their positions."""
    scores: Tensor
    """(B, Hkv, L): those of several observers, in full batch rows; not read with a single observer."""
    output: Tensor
    """(B, 1, H, D): the step's."""


@triton.jit
def merge_shares(
    partial_ptr, highest_ptr, total_ptr, sink_ptr, output_ptr, first_head, first_sink, first, first_column, splits,
    G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Merges the shares of HEADS of a group's G query heads from the `first` on, in fixed order, and their sinks, if
    there are sinks, into COLUMNS columns of their outputs.

    first_head: the number of the group's first head among all batch rows' heads, first_sink: among those of its own;
    partial (B, H, N, D), highest and total (B, H, N), output (B, 1, H, D), sinks (H,). It reads past its L1 cache, for
    other programs of the same launch may have written the shares.
    """
    member, number = first + tl.arange(0, HEADS), tl.arange(0, NP)
    column = first_column + tl.arange(0, COLUMNS)
    is_head, in_head = member < G, column < D
    head = first_head + member
    place = head[:, None] * splits + number[None, :]
    inside = is_head[:, None] & (number < splits)[None, :]
    # [HEADS, NP] twice
    highest = tl.load(highest_ptr + place, mask=inside, other=-float("inf"), cache_modifier=".cg")
    total = tl.load(total_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
    top = tl.where(is_head, tl.max(highest, 1), 0.0)
    weight = tl.exp2(highest - top[:, None])
    place = place[:, :, None] * D + column[None, None, :]
    # [HEADS, NP, COLUMNS]
    result = tl.load(
        partial_ptr + place, mask=inside[:, :, None] & in_head[None, None, :], other=0.0, cache_modifier=".cg"
    )
    result = tl.where((highest > -float("inf"))[:, :, None], result, 0.0)  # that of an empty share is undefined
    result = tl.sum(result * weight[:, :, None], 1)
    total = tl.sum(total * weight, 1)
    _, total, result = add_sinks(sink_ptr, first_sink + member, is_head, top, total, result)
    result = (result / tl.where(is_head, total, 1.0)[:, None]).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + head[:, None] * D + column[None, :], result, mask=is_head[:, None] & in_head[None, :])


@triton.jit
def rank_full_step(
    full_ptr, row_ptr, highest_ptr, total_ptr, logit_ptr, score_ptr, ranking_ptr, sink_ptr, pair, kv_heads, part, parts,
    capacity, line, splits, recent, sinks,
    G: tl.constexpr, GP: tl.constexpr, NP: tl.constexpr, POOL: tl.constexpr, BEFORE: tl.constexpr,
    OBSERVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_rank_positions`, if the batch row's step is a full one."""
    batch = pair // kv_heads
    position = tl.load(full_ptr + batch)
    if position >= 0:
        padding = tl.load(row_ptr + batch * ROW_COLUMNS + PADDING).to(tl.int32)
        _rank_positions(
            highest_ptr, total_ptr, logit_ptr, score_ptr, ranking_ptr, sink_ptr, pair, pair % kv_heads, position,
            padding, part, parts, capacity, line, splits, recent, sinks, G, GP, NP, POOL, BEFORE, OBSERVED, BLOCK,
        )  # fmt: skip


@triton.jit
def _rank_positions(
    highest_ptr, total_ptr, logit_ptr, score_ptr, ranking_ptr, sink_ptr, pair, kv_head, position, padding, part, parts,
    capacity, line, splits, recent, sinks,
    G: tl.constexpr, GP: tl.constexpr, NP: tl.constexpr, POOL: tl.constexpr, BEFORE: tl.constexpr,
    OBSERVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ranks every `parts`-th tile of the positions of a batch row and key/value head at a full step: (B, Hkv, L) int32.
    The recent window and the sinks come first; then the pooled score's own bits decide, which order as the float >= 0
    does. The scores are those of several observers, (B, Hkv, L), if OBSERVED, else they follow from the logits, of
    which a line has `line` numbers."""
    member, number = tl.arange(0, GP), tl.arange(0, NP)
    inside = (member < G)[:, None] & (number < splits)[None, :]
    place = (pair * G + member)[:, None] * splits + number[None, :]
    # [GP, NP] twice
    highest = tl.load(highest_ptr + place, mask=inside, other=-float("inf"))
    total = tl.load(total_ptr + place, mask=inside, other=0.0)
    top = tl.max(highest, 1)
    top = tl.where(member < G, top, 0.0)
    total = tl.sum(total * tl.exp2(highest - top[:, None]), 1)
    lse = top + tl.log2(tl.where(member < G, total, 1.0))
    if sink_ptr is not None:
        lse = with_sink(lse, load_sinks(sink_ptr, kv_head * G + member, member < G))
    rows = logit_ptr + pair.to(tl.int64) * G * line
    scores = score_ptr + pair.to(tl.int64) * capacity
    rankings = ranking_ptr + pair.to(tl.int64) * capacity
    first = padding // BLOCK * BLOCK
    for start in range(first + part * BLOCK, position + 1, parts * BLOCK):
        token = start + tl.arange(0, BLOCK)
        if OBSERVED:
            best = tl.zeros([BLOCK], tl.float32)
            for away in tl.static_range(-BEFORE, POOL - BEFORE):
                near = token + away
                near_exists = (near >= padding) & (near <= position)
                # [BLOCK]
                best = tl.maximum(best, tl.load(scores + near, mask=near_exists, other=0.0))
        else:
            best = tl.full([BLOCK], -float("inf"), tl.float32)
            for group in range(G):
                shift = tl.sum(tl.where(member == group, lse, 0.0), 0)
                logits = rows + group * line
                for away in tl.static_range(-BEFORE, POOL - BEFORE):
                    near = token + away
                    near_exists = (near >= padding) & (near <= position)
                    # [BLOCK]
                    logit = tl.load(logits + near, mask=near_exists, other=-float("inf"))
                    best = tl.maximum(best, logit - shift)
            best = tl.exp2(best)
        preferred = (token > position - recent) | (token - padding < sinks)
        ranking = best.to(tl.int32, bitcast=True) + tl.where(preferred, PREFERRED, 0)
        tl.store(rankings + token, ranking, mask=(token >= padding) & (token <= position))


@triton.jit
def _finish(
    partial_ptr, highest_ptr, total_ptr, output_ptr, length_ptr, row_ptr, full_ptr, logit_ptr, score_ptr, ranking_ptr,
    sink_ptr, kv_heads, capacity, line, splits, recent, sinks,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr, POOL: tl.constexpr,
    BEFORE: tl.constexpr, RANK: tl.constexpr, OBSERVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last launch of a step of a cache without selecting steps; it also counts the token. The first G programs of a
    batch row and key/value head merge the shares of one query head each; the others rank positions if the row's step is
    full."""
    part, pair = tl.program_id(0), tl.program_id(1)
    if part < G:
        merge_shares(
            partial_ptr, highest_ptr, total_ptr, sink_ptr, output_ptr, pair * G, pair % kv_heads * G, part, 0, splits,
            G, D, 1, DP, NP,
        )  # fmt: skip
        if (part == 0) & (pair == 0):
            tl.store(length_ptr, tl.load(length_ptr) + 1)
    elif RANK:
        rank_full_step(
            full_ptr, row_ptr, highest_ptr, total_ptr, logit_ptr, score_ptr, ranking_ptr, sink_ptr, pair, kv_heads,
            part - G, tl.num_programs(0) - G, capacity, line, splits, recent, sinks, G, GP, NP, POOL, BEFORE, OBSERVED,
            BLOCK,
        )  # fmt: skip
