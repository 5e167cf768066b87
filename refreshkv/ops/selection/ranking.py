"""The selections of all full and selecting steps of a pass, by Triton: `scores` in chunks of steps, then `top_k` of
each step.

`top_k` pools the scores on the fly. A row is the scores of one step of one batch row and key/value head.

Shapes: `B` batch rows, `C` decision steps or, of selecting steps, `E` in their place, `A = C + E` steps in all, `H`
query heads, `Hkv` key/value heads, `D` head size, `L` keys, `W` slots of a selection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.naive import selection_sizes
from refreshkv.ops.selection.score_keys import quantized
from refreshkv.ops.selection.scores import ScoredKeys, log_sum_exp, write_scores
from refreshkv.ops.selection.top_k import (
    BEYOND,
    bracket,
    can_resolve,
    collect,
    ranking_of,
    resolve,
    sample_size,
    search,
    store_lowest,
    token_of,
)
from refreshkv.ops.state import PLAIN_SOFTMAX, FullSteps, Plan, SelectionOptions, SoftmaxTerms
from refreshkv.ops.tiles import on_its_device

MAX_SCORES = 2**27
"""Scores held at once, 4 bytes each: 512 MiB."""

BLOCK = 1024
"""Scores of a row taken at once."""

COLLECT_WARPS = 4

SAMPLE = 1024
"""Positions that a row's threshold is bracketed from, at least."""

CANDIDATES = 4096
"""Most candidates of a row that are listed."""

MARGIN = 4.0
"""How far from the sample's threshold the brackets are, in standard deviations of its count."""

BITS = 20
"""To how many of 31 bits the brackets are found."""

LARGEST_ORDER = 64
"""Up to this many droppable ranks are picked out one by one instead of sorting all."""

LARGEST_SORT = 4096
"""Selections up to this wide are sorted in one program, wider ones by torch."""


@triton.jit
def _full_step(position_ptr, padding_ptr, budget_ptr, decisions, first_decision, kv_heads):
    """The program's full step: the first position of its row, the last, how many to keep, and the row among those of
    the chunk."""
    step, pair = tl.program_id(0), tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    last = tl.load(position_ptr + batch * decisions + first_decision + step).to(tl.int32)
    first = tl.load(padding_ptr + batch).to(tl.int32)
    keep = tl.minimum(tl.load(budget_ptr + batch).to(tl.int32), last + 1 - first)
    return first, last, keep, pair.to(tl.int64) * tl.num_programs(0) + step


@triton.jit(do_not_specialize=["decisions", "first_decision"])
def _bracket(
    score_ptr, position_ptr, padding_ptr, budget_ptr, bracket_ptr,
    decisions, first_decision, length, kv_heads, recent, sinks,
    POOL: tl.constexpr, AHEAD: tl.constexpr, OWN: tl.constexpr, SAMPLE: tl.constexpr, MARGIN: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The brackets of each full step's threshold: (B, Hkv, steps, 2)."""
    first, last, keep, row = _full_step(position_ptr, padding_ptr, budget_ptr, decisions, first_decision, kv_heads)
    if last < 0:
        return
    scores = score_ptr + row * length
    low, high = bracket(scores, first, last, keep, MARGIN, recent, sinks, POOL, SAMPLE, BITS, AHEAD, OWN)
    tl.store(bracket_ptr + 2 * row, low)
    tl.store(bracket_ptr + 2 * row + 1, high)


@triton.jit(do_not_specialize=["decisions", "first_decision"])
def _collect(
    score_ptr, position_ptr, padding_ptr, budget_ptr, bracket_ptr, candidate_ptr, count_ptr, chosen_ptr,
    decisions, first_decision, length, width, kv_heads, recent, sinks,
    POOL: tl.constexpr, AHEAD: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """What is above goes into the lists of chosen entries (B, Hkv, steps, W) int64, the candidates into theirs
    (B, Hkv, steps, CANDIDATES). Counts of both: (B, Hkv, steps, 2)."""
    first, last, keep, row = _full_step(position_ptr, padding_ptr, budget_ptr, decisions, first_decision, kv_heads)
    if last < 0:
        return
    scores, chosen = score_ptr + row * length, chosen_ptr + row * width
    candidates = candidate_ptr + row * CANDIDATES
    low, high = tl.load(bracket_ptr + 2 * row), tl.load(bracket_ptr + 2 * row + 1)
    above, between = collect(
        scores, first, last, recent, sinks, low, high, None, keep, chosen, None, candidates,
        POOL, CANDIDATES, BLOCK, AHEAD, OWN,
    )  # fmt: skip
    tl.store(count_ptr + 2 * row, above)
    tl.store(count_ptr + 2 * row + 1, between)


@triton.jit(do_not_specialize=["decisions", "first_decision"])
def _resolve(
    score_ptr, position_ptr, padding_ptr, budget_ptr, bracket_ptr, candidate_ptr, count_ptr, chosen_ptr,
    decisions, first_decision, length, width, kv_heads, recent, sinks,
    POOL: tl.constexpr, AHEAD: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Completes the chosen entries from the candidates; where the sample misled, searches the whole row."""
    first, last, keep, row = _full_step(position_ptr, padding_ptr, budget_ptr, decisions, first_decision, kv_heads)
    if last < 0:
        return
    chosen, candidates = chosen_ptr + row * width, candidate_ptr + row * CANDIDATES
    above, between = tl.load(count_ptr + 2 * row), tl.load(count_ptr + 2 * row + 1)
    low, high = tl.load(bracket_ptr + 2 * row), tl.load(bracket_ptr + 2 * row + 1)
    if can_resolve(above, between, keep, CANDIDATES):
        if above < keep:
            if between <= CANDIDATES // 2:
                _resolve_listed(candidates, between, above, keep, low, high, chosen, CANDIDATES // 2)
            else:
                _resolve_listed(candidates, between, above, keep, low, high, chosen, CANDIDATES)
    else:
        search(
            score_ptr + row * length, first, last, recent, sinks, low, high, above, between, keep, chosen,
            None, candidates, POOL, CANDIDATES, BLOCK, AHEAD, OWN,
        )  # fmt: skip


@triton.jit
def _resolve_listed(candidates, between, above, keep, low, high, chosen, SIZE: tl.constexpr):
    """`resolve` of up to SIZE candidates."""
    number = tl.arange(0, SIZE)
    exists = number < between
    # [SIZE]
    entry = tl.load(candidates + number, mask=exists, other=-1)
    resolve(token_of(entry), ranking_of(entry), exists, between, above, keep, low, high, chosen, None, None)


@triton.jit(do_not_specialize=["decisions", "first_decision", "selected_pair"])
def _order(
    position_ptr, padding_ptr, budget_ptr, chosen_ptr, selected_ptr,
    decisions, first_decision, width, kv_heads, selected_pair,
    WIDTH: tl.constexpr, DROPPABLE: tl.constexpr,
):  # fmt: skip
    """Positions by rank, best first, -1 past the end: (B, Hkv, C, W) int32. Only the last DROPPABLE ranks are put in
    order, one by one, if that is less work than a sort."""
    _, _, keep, row = _full_step(position_ptr, padding_ptr, budget_ptr, decisions, first_decision, kv_heads)
    slot, size = tl.arange(0, WIDTH), tl.maximum(keep, 0)
    selected = selected_ptr + tl.program_id(1).to(tl.int64) * selected_pair
    selected += (first_decision + tl.program_id(0)) * width
    exists = slot < size
    if DROPPABLE >= WIDTH:
        # [WIDTH]
        entry = tl.sort(tl.load(chosen_ptr + row * width + slot, mask=exists, other=-1), descending=True)
        tl.store(selected + slot, tl.where(entry >= 0, token_of(entry), -1), mask=slot < width)
    else:
        # [WIDTH]
        entry = tl.load(chosen_ptr + row * width + slot, mask=exists, other=BEYOND)
        stays = exists & (entry > store_lowest(entry, tl.minimum(size, DROPPABLE), selected, None, size))
        place = tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(selected + place, token_of(entry), mask=stays)
        tl.store(selected + slot, tl.full([WIDTH], -1, tl.int32), mask=(slot >= size) & (slot < width))


def select_all(
    query: Tensor,
    key: Tensor,
    plan: Plan,
    options: SelectionOptions,
    scaling: float,
    lse: Tensor | None = None,
    *,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """What the full steps of a plan keep and, after them, what its selecting steps keep: (B, Hkv, A, W) int32.

    Args as in `select`; lse: of the full steps.
    """
    full, selecting = plan.full_positions.shape[1], plan.selecting
    if selecting == 0:
        return select(query, key, plan.steps, options, scaling, lse, terms=terms)
    shape = (*key.shape[:2], full + selecting, plan.width)
    selected = torch.empty(shape, dtype=torch.int32, device=query.device)
    select(query, key, plan.steps, options, scaling, lse, terms=terms, into=selected[:, :, :full])
    codes, scales = (key, None) if plan.score_bits == 16 else quantized(key, plan.score_bits)
    select(
        query, codes, plan.selecting_steps, options, scaling,
        terms=terms, key_scales=scales, own_first=True, into=selected[:, :, full:],
    )  # fmt: skip
    return selected


@on_its_device
def select(
    query: Tensor,
    key: Tensor,
    steps: FullSteps,
    options: SelectionOptions,
    scaling: float,
    lse: Tensor | None = None,
    *,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
    key_scales: Tensor | None = None,
    own_first: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """`refreshkv.ops.naive.select` by kernels: (B, Hkv, C, W) int32.

    Args:
        query, key, steps, options, scaling, own_first, terms: as there.
        lse: what `log_sum_exp` gives, if known.
        key_scales: (B, Hkv, L) float32, a factor of each key; None: they are all 1.
        into: where to write the selections, some of the steps of a larger (B, Hkv, A, W) int32 tensor.
    """
    positions, budgets, left_padding, width, *_ = steps
    batch, kv_heads, length, _ = key.shape
    decisions, pairs = positions.shape[1], batch * kv_heads
    keys = ScoredKeys(key, key_scales)
    if lse is None:
        lse = log_sum_exp(query, keys, positions, left_padding, options.observation_window, scaling, terms)
    if into is None:
        into = torch.empty(batch, kv_heads, decisions, width, dtype=torch.int32, device=query.device)
    chunk = min(decisions, max(1, MAX_SCORES // (pairs * length)))
    score = torch.empty(pairs * chunk * length, dtype=torch.float32, device=query.device)
    candidates = torch.empty(pairs * chunk * CANDIDATES, dtype=torch.int64, device=query.device)
    chosen = torch.empty(pairs * chunk * width, dtype=torch.int64, device=query.device)
    brackets, counts = (torch.empty(pairs * chunk * 2, dtype=torch.int32, device=query.device) for _ in range(2))
    block = min(BLOCK, triton.next_power_of_2(length))
    sample = sample_size(length, width, SAMPLE, CANDIDATES, MARGIN)
    windows = (kv_heads, options.recent_window, options.sink_tokens)
    kind = {"POOL": options.pool_kernel, "AHEAD": options.pool_ahead, "OWN": own_first}
    for first in range(0, decisions, chunk):
        count = min(chunk, decisions - first)
        write_scores(query, keys, steps, lse, score, first, count, scaling, terms=terms)
        rows = (score, positions, left_padding, budgets, brackets)
        _bracket[count, pairs](
            *rows, decisions, first, length, *windows, **kind, SAMPLE=sample, MARGIN=MARGIN, BITS=BITS, num_warps=8
        )
        lists = (candidates, counts, chosen, decisions, first, length, width, *windows)
        shared = {**kind, "BLOCK": block, "CANDIDATES": CANDIDATES}
        _collect[count, pairs](*rows, *lists, **shared, num_warps=COLLECT_WARPS)
        _resolve[count, pairs](*rows, *lists, **shared, num_warps=4)
        _store_by_rank(steps, chosen, into, first, count)
    return into


def _store_by_rank(steps: FullSteps, chosen: Tensor, into: Tensor, first: int, count: int) -> None:
    """Stores what the steps `first .. first + count - 1` chose, in `chosen`, by rank in `into` (B, Hkv, C, W)."""
    positions, budgets, left_padding, width, droppable, _ = steps
    batch, kv_heads = into.shape[:2]
    if width > LARGEST_SORT:
        here = slice(first, first + count)
        sizes = selection_sizes(positions[:, here], budgets, left_padding)
        entries = chosen[: batch * kv_heads * count * width].view(batch, kv_heads, count, width)
        into[:, :, here] = _sorted(entries, sizes)
        return
    padded = triton.next_power_of_2(width)
    _order[count, batch * kv_heads](
        positions, left_padding, budgets, chosen, into, positions.shape[1], first, width, kv_heads, into.stride(1),
        WIDTH=padded, DROPPABLE=droppable if droppable <= LARGEST_ORDER else padded,
        num_warps=8 if width >= 1024 else 4,
    )  # fmt: skip


def _sorted(entries: Tensor, sizes: Tensor) -> Tensor:
    """What `_order` gives with all ranks in order, by torch: entries (B, Hkv, steps, W) int64, of which the first of
    each step's `sizes` (B, steps) exist -> (B, Hkv, steps, W) int32."""
    slot = torch.arange(entries.shape[-1], device=entries.device)
    exists = slot < sizes[:, None, :, None]
    order = entries.masked_fill(~exists, -1).sort(dim=-1, descending=True).values
    return torch.where(order >= 0, 0x7FFFFFFF - (order & 0x7FFFFFFF), -1).to(torch.int32)
