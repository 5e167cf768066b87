"""The selections of all full steps of a pass, by Triton: their scores in bounded chunks, then `top_k` of each.

Scores are float32 probabilities; `top_k` pools them on the fly. A row is the scores of one full step of one batch row
and key/value head.

Shapes: `B` batch rows, `C` decision steps, `O` observing queries, `H` query heads, `Hkv` key/value heads,
`G = H / Hkv`, `D` head size, `L` keys, `W` slots of a selection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.selection.top_k import (
    BEYOND,
    bracket,
    can_resolve,
    collect,
    entry_of,
    resolve,
    sample_size,
    search,
    store_lowest,
    token_of,
)
from refreshkv.ops.state import FullSteps, SelectionOptions
from refreshkv.ops.tiles import LOG2E, MANY_PROGRAMS, block_sizes, on_its_device, padded_head, precision

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


@triton.jit(do_not_specialize=["shift", "decisions", "splits"])
def _log_sum_exp(
    query_ptr, key_ptr, position_ptr, padding_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, decisions, splits, shift, scale,
    G: tl.constexpr, OBSERVERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the log-sum-exp of every observing query of every full step over each split of its keys:
    (splits, B, H, C, O), in units of log 2. A row is a triple (decision step, observer, head of the group)."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * G + row % G
    observer = (row // G) % OBSERVERS
    decision = row // (G * OBSERVERS)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    # [BLOCK_M]
    anchor = tl.load(position_ptr + batch * decisions + decision, mask=decision < decisions, other=-1).to(tl.int32)
    position = anchor - (OBSERVERS - 1) + observer
    exists = (anchor >= 0) & (position >= padding)
    last = tl.max(tl.where(exists, position, -1), 0)
    if last < 0:
        return
    column = tl.arange(0, DP)
    in_head = column < D
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (position.to(tl.int64) - shift) * query_t
    # [BLOCK_M, DP]
    query = tl.load(query_row[:, None] + column[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    share = tl.cdiv(tl.cdiv(last + 1 - padding, BLOCK_N), splits) * BLOCK_N
    begin = padding + split * share
    for start in range(begin, tl.minimum(begin + share, last + 1), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        here = (token <= last)[:, None] & in_head[None, :]
        # [BLOCK_N, DP]
        key = tl.load(keys + token.to(tl.int64)[:, None] * key_t + column[None, :], mask=here, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        visible = token[None, :] <= position[:, None]
        logits = tl.where(visible, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(highest - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        highest = higher
    heads = tl.num_programs(1) * G
    row = ((split * tl.num_programs(2) + batch) * heads + head) * decisions + decision
    place = row * OBSERVERS + observer
    tl.store(lse_ptr + place, highest + tl.log2(tl.where(total > 0, total, 1.0)), mask=exists)


@triton.jit(do_not_specialize=["rows", "splits"])
def _merge_splits(split_ptr, lse_ptr, rows, splits, BLOCK: tl.constexpr):
    """Merges the log-sum-exps over splits of the keys into one: (splits, rows) -> (rows), in units of log 2."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        # [BLOCK]
        lse = tl.load(split_ptr + split * rows + row, mask=row < rows, other=-float("inf"))
        higher = tl.maximum(highest, lse)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(highest - safe) + tl.exp2(lse - safe)
        highest = higher
    tl.store(lse_ptr + row, highest + tl.log2(tl.where(total > 0, total, 1.0)), mask=row < rows)


@triton.jit(do_not_specialize=["shift", "decisions", "first", "steps"])
def _scores(
    query_ptr, key_ptr, position_ptr, padding_ptr, lse_ptr, score_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, decisions, first, steps, length, kv_heads, shift, scale,
    G: tl.constexpr, OBSERVERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the scores of a chunk of decision steps: probabilities, their maximum over the group, its mean over the
    observers: (B, Hkv, steps, L)."""
    block, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head, batch = pair % kv_heads, (pair // kv_heads).to(tl.int64)
    step = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    decision = first + step
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    # [BLOCK_M]
    anchor = tl.load(position_ptr + batch * decisions + decision, mask=step < steps, other=-1).to(tl.int32)
    start = block * BLOCK_N
    if (start > tl.max(anchor, 0)) | (start + BLOCK_N <= padding):
        return
    token = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, DP)
    in_head = column < D
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    here = (token < length)[:, None] & in_head[None, :]
    # [BLOCK_N, DP]
    key = tl.load(keys + token.to(tl.int64)[:, None] * key_t + column[None, :], mask=here, other=0.0)
    score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for observer in range(OBSERVERS):
        position = anchor - (OBSERVERS - 1) + observer
        exists = (anchor >= 0) & (position >= padding)
        best = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
        for member in range(G):
            head = (kv_head * G + member).to(tl.int64)
            query_row = query_ptr + batch * query_b + head * query_h + (position.to(tl.int64) - shift) * query_t
            # [BLOCK_M, DP], then [BLOCK_M]
            query = tl.load(query_row[:, None] + column[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
            place = ((batch * kv_heads * G + head) * decisions + decision) * OBSERVERS + observer
            lse = tl.load(lse_ptr + place, mask=exists, other=0.0)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            best = tl.maximum(best, logits - lse[:, None])
        visible = (token[None, :] <= position[:, None]) & exists[:, None]
        score += tl.where(visible, tl.exp2(best), 0.0)
    present = tl.minimum(anchor + 1 - padding, OBSERVERS)
    score = score / tl.maximum(present, 1).to(tl.float32)[:, None]
    row = (pair.to(tl.int64) * steps + step) * length
    inside = (step < steps)[:, None] & (token < length)[None, :]
    tl.store(score_ptr + row[:, None] + token[None, :], score, mask=inside)


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
    POOL: tl.constexpr, SAMPLE: tl.constexpr, MARGIN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The brackets of each full step's threshold: (B, Hkv, steps, 2)."""
    first, last, keep, row = _full_step(position_ptr, padding_ptr, budget_ptr, decisions, first_decision, kv_heads)
    if last < 0:
        return
    scores = score_ptr + row * length
    low, high = bracket(scores, first, last, keep, MARGIN, recent, sinks, POOL, SAMPLE, BITS)
    tl.store(bracket_ptr + 2 * row, low)
    tl.store(bracket_ptr + 2 * row + 1, high)


@triton.jit(do_not_specialize=["decisions", "first_decision"])
def _collect(
    score_ptr, position_ptr, padding_ptr, budget_ptr, bracket_ptr, candidate_ptr, count_ptr, chosen_ptr,
    decisions, first_decision, length, width, kv_heads, recent, sinks,
    POOL: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """What is above goes into the lists of chosen entries (B, Hkv, steps, 2, W), the candidates into theirs
    (B, Hkv, steps, 2, CANDIDATES). Counts of both: (B, Hkv, steps, 2)."""
    first, last, keep, row = _full_step(position_ptr, padding_ptr, budget_ptr, decisions, first_decision, kv_heads)
    if last < 0:
        return
    scores, chosen = score_ptr + row * length, chosen_ptr + row * 2 * width
    candidates = candidate_ptr + row * 2 * CANDIDATES
    low, high = tl.load(bracket_ptr + 2 * row), tl.load(bracket_ptr + 2 * row + 1)
    above, between = collect(
        scores, first, last, recent, sinks, low, high, None, keep, chosen, chosen + width, candidates,
        POOL, CANDIDATES, BLOCK,
    )  # fmt: skip
    tl.store(count_ptr + 2 * row, above)
    tl.store(count_ptr + 2 * row + 1, between)


@triton.jit(do_not_specialize=["decisions", "first_decision"])
def _resolve(
    score_ptr, position_ptr, padding_ptr, budget_ptr, bracket_ptr, candidate_ptr, count_ptr, chosen_ptr,
    decisions, first_decision, length, width, kv_heads, recent, sinks,
    POOL: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Completes the chosen entries from the candidates; where the sample misled, searches the whole row."""
    first, last, keep, row = _full_step(position_ptr, padding_ptr, budget_ptr, decisions, first_decision, kv_heads)
    if last < 0:
        return
    chosen, candidates = chosen_ptr + row * 2 * width, candidate_ptr + row * 2 * CANDIDATES
    above, between = tl.load(count_ptr + 2 * row), tl.load(count_ptr + 2 * row + 1)
    low, high = tl.load(bracket_ptr + 2 * row), tl.load(bracket_ptr + 2 * row + 1)
    if can_resolve(above, between, keep, CANDIDATES):
        if above < keep:
            if between <= CANDIDATES // 2:
                _resolve_listed(candidates, between, above, keep, low, high, chosen, width, CANDIDATES // 2, CANDIDATES)
            else:
                _resolve_listed(candidates, between, above, keep, low, high, chosen, width, CANDIDATES, CANDIDATES)
    else:
        search(
            score_ptr + row * length, first, last, recent, sinks, low, high, above, between, keep, chosen,
            chosen + width, candidates, POOL, CANDIDATES, BLOCK,
        )  # fmt: skip


@triton.jit
def _resolve_listed(
    candidates, between, above, keep, low, high, chosen, width, SIZE: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """`resolve` of up to SIZE candidates."""
    number = tl.arange(0, SIZE)
    exists = number < between
    # [SIZE] twice
    token = tl.load(candidates + number, mask=exists, other=0)
    ranking = tl.load(candidates + CANDIDATES + number, mask=exists, other=-1)
    resolve(token, ranking, exists, between, above, keep, low, high, chosen, chosen + width, None)


@triton.jit(do_not_specialize=["decisions", "first_decision", "steps"])
def _order(
    chosen_ptr, selected_ptr, decisions, first_decision, steps, width, kv_heads,
    WIDTH: tl.constexpr, DROPPABLE: tl.constexpr,
):  # fmt: skip
    """Positions by rank, best first, -1 past the end: (B, Hkv, C, W) int32. Only the last DROPPABLE ranks are put in
    order, one by one, if that is less work than a sort."""
    step, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, WIDTH)
    chosen = chosen_ptr + (pair * steps + step) * 2 * width
    # [WIDTH] twice
    token = tl.load(chosen + slot, mask=slot < width, other=-1)
    ranking = tl.load(chosen + width + slot, mask=slot < width, other=0)
    exists = token >= 0
    selected = selected_ptr + (pair * decisions + first_decision + step) * width
    if DROPPABLE >= WIDTH:
        entry = tl.sort(tl.where(exists, entry_of(ranking, token), -1), descending=True)
        tl.store(selected + slot, tl.where(entry >= 0, token_of(entry), -1), mask=slot < width)
    else:
        size = tl.sum(exists.to(tl.int32), 0)
        entry = tl.where(exists, entry_of(ranking, token), BEYOND)
        stays = exists & (entry > store_lowest(entry, tl.minimum(size, DROPPABLE), selected, None, size))
        place = tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(selected + place, token, mask=stays)
        tl.store(selected + slot, tl.full([WIDTH], -1, tl.int32), mask=(slot >= size) & (slot < width))


def log_sum_exp(
    query: Tensor, key: Tensor, positions: Tensor, left_padding: Tensor, observation_window: int, scaling: float
) -> Tensor:
    """The observing queries' log-sum-exp over their own keys: (B, H, C, O) float32, in units of log 2.

    query (B, H, Q, D): the last Q positions; key (B, Hkv, L, D); positions (B, C); left_padding (B,).
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, decisions = key.shape[1], positions.shape[1]
    group = heads // kv_heads
    sizes = block_sizes("lse", query)
    tiles = triton.cdiv(decisions * observation_window * group, sizes["BLOCK_M"])
    # few rows are spread over the GPU by splitting their keys
    splits = max(1, min(MANY_PROGRAMS // (tiles * kv_heads * batch), triton.cdiv(key.shape[2], sizes["BLOCK_N"])))
    lse = query.new_empty(splits, batch, heads, decisions, observation_window, dtype=torch.float32)
    _log_sum_exp[tiles * splits, kv_heads, batch](
        query, key, positions, left_padding, lse,
        *query.stride()[:3], *key.stride()[:3], decisions, splits, key.shape[2] - queries, scaling * LOG2E,
        G=group, OBSERVERS=observation_window, D=head_dim, DP=padded_head(head_dim), PRECISION=precision(query),
        **sizes,
    )  # fmt: skip
    if splits == 1:
        return lse[0]
    merged = torch.empty_like(lse[0])
    _merge_splits[triton.cdiv(merged.numel(), 32),](lse, merged, merged.numel(), splits, BLOCK=32)
    return merged


@on_its_device
def select(
    query: Tensor,
    key: Tensor,
    steps: FullSteps,
    options: SelectionOptions,
    scaling: float,
    lse: Tensor | None = None,
) -> Tensor:
    """`refreshkv.ops.naive.select` by kernels: (B, Hkv, C, W) int32; `lse`: what `log_sum_exp` gives, if known."""
    positions, budgets, left_padding, width, droppable = steps
    pool_kernel, observation_window, recent_window, sink_tokens = options.for_kernels()
    batch, heads, queries, head_dim = query.shape
    kv_heads, length, decisions = key.shape[1], key.shape[2], positions.shape[1]
    if lse is None:
        lse = log_sum_exp(query, key, positions, left_padding, observation_window, scaling)
    selected = torch.empty(batch, kv_heads, decisions, width, dtype=torch.int32, device=query.device)
    pairs = batch * kv_heads
    chunk = min(decisions, max(1, MAX_SCORES // (pairs * length)))
    score = torch.empty(pairs * chunk * length, dtype=torch.float32, device=query.device)
    candidates = torch.empty(pairs * chunk * 2 * CANDIDATES, dtype=torch.int32, device=query.device)
    brackets, counts = (torch.empty(pairs * chunk * 2, dtype=torch.int32, device=query.device) for _ in range(2))
    block = min(BLOCK, triton.next_power_of_2(length))
    sizes = block_sizes("scores", query)
    sample = sample_size(length, width, SAMPLE, CANDIDATES, MARGIN)
    options = (kv_heads, recent_window, sink_tokens)
    for first in range(0, decisions, chunk):
        count = min(chunk, decisions - first)
        chosen = torch.full((batch, kv_heads, count, 2, width), -1, dtype=torch.int32, device=query.device)
        grid = (triton.cdiv(length, sizes["BLOCK_N"]), triton.cdiv(count, sizes["BLOCK_M"]), pairs)
        _scores[grid](
            query, key, positions, left_padding, lse, score, *query.stride()[:3], *key.stride()[:3],
            decisions, first, count, length, kv_heads, length - queries, scaling * LOG2E,
            G=heads // kv_heads, OBSERVERS=observation_window, D=head_dim, DP=padded_head(head_dim),
            PRECISION=precision(query), **sizes,
        )  # fmt: skip
        rows = (score, positions, left_padding, budgets, brackets)
        _bracket[count, pairs](
            *rows, decisions, first, length, *options,
            POOL=pool_kernel, SAMPLE=sample, MARGIN=MARGIN, BITS=BITS, num_warps=8,
        )  # fmt: skip
        lists = (candidates, counts, chosen, decisions, first, length, width, *options)
        shared = {"POOL": pool_kernel, "BLOCK": block, "CANDIDATES": CANDIDATES}
        _collect[count, pairs](*rows, *lists, **shared, num_warps=COLLECT_WARPS)
        _resolve[count, pairs](*rows, *lists, **shared, num_warps=4)
        if width <= LARGEST_SORT:
            padded = triton.next_power_of_2(width)
            _order[count, pairs](
                chosen, selected, decisions, first, count, width, kv_heads,
                WIDTH=padded, DROPPABLE=droppable if droppable <= LARGEST_ORDER else padded,
                num_warps=8 if width >= 1024 else 4,
            )  # fmt: skip
        else:
            selected[:, :, first : first + count] = _sorted(*chosen.unbind(3))
    return selected


def _sorted(tokens: Tensor, rankings: Tensor) -> Tensor:
    """What `_order` gives with all ranks in order, by torch: two (B, Hkv, steps, W) int32 -> the same."""
    entries = (rankings.long() << 32) + (0x7FFFFFFF - tokens)
    order = torch.where(tokens >= 0, entries, -1).sort(dim=-1, descending=True).values
    return torch.where(order >= 0, 0x7FFFFFFF - (order & 0x7FFFFFFF), -1).to(torch.int32)
