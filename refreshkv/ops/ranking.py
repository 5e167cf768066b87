"""Triton kernels for the selection: scores of all full steps in bounded chunks, and the best positions of each.

Shapes: `B` batch rows, `C` checks, `O` observing queries, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D`
head size, `L` keys, `W` slots of a selection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.tiles import LOG2E, block_sizes, padded_head, precision

MAX_SCORES = 2**25
"""Scores held at once, twice, 4 bytes each: 256 MiB together."""

WARPS = 4
BLOCK = 1024
"""Scores of a row taken at once, and most that the search may leave in doubt before it turns to them alone."""

LARGEST_ORDER = 64
"""Up to this many droppable ranks are picked out one by one instead of sorting all."""

LARGEST_SORT = 4096
"""Selections up to this wide are sorted in one program, wider ones by torch."""


@triton.jit
def _log_sum_exp(
    query_ptr, key_ptr, position_ptr, padding_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, checks, shift, scale,
    G: tl.constexpr, OBSERVERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of every observing query of every full step: lse (B, H, C, O), in units of log 2."""
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * G + row % G
    observer = (row // G) % OBSERVERS
    check = row // (G * OBSERVERS)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    anchor = tl.load(position_ptr + batch * checks + check, mask=check < checks, other=-1).to(tl.int32)
    position = anchor - (OBSERVERS - 1) + observer
    exists = (anchor >= 0) & (position >= padding)
    last = tl.max(tl.where(exists, position, -1), 0)
    if last < 0:
        return
    column = tl.arange(0, DP)
    in_head = column < D
    query_row = query_ptr + batch * query_b + head.to(tl.int64) * query_h + (position.to(tl.int64) - shift) * query_t
    query = tl.load(query_row[:, None] + column[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(padding // BLOCK_N * BLOCK_N, last + 1, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        here = (token <= last)[:, None] & in_head[None, :]
        key = tl.load(keys + token.to(tl.int64)[:, None] * key_t + column[None, :], mask=here, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        visible = (token[None, :] <= position[:, None]) & (token[None, :] >= padding)
        logits = tl.where(visible, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(highest - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        highest = higher
    total = tl.where(exists, total, 1.0)
    heads = tl.num_programs(1) * G
    place = ((batch * heads + head) * checks + check) * OBSERVERS + observer
    tl.store(lse_ptr + place, highest + tl.log2(total), mask=exists)


@triton.jit
def _scores(
    query_ptr, key_ptr, position_ptr, padding_ptr, lse_ptr, score_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, checks, first, steps, length, kv_heads, shift, scale,
    G: tl.constexpr, OBSERVERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk of checks: probabilities, maximum over the group, mean over the observers: (B, Hkv, steps, L)."""
    block, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head, batch = pair % kv_heads, (pair // kv_heads).to(tl.int64)
    step = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    check = first + step
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    anchor = tl.load(position_ptr + batch * checks + check, mask=step < steps, other=-1).to(tl.int32)
    start = block * BLOCK_N
    if (start > tl.max(anchor, 0)) | (start + BLOCK_N <= padding):
        return
    token = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, DP)
    in_head = column < D
    keys = key_ptr + batch * key_b + kv_head.to(tl.int64) * key_h
    here = (token < length)[:, None] & in_head[None, :]
    key = tl.load(keys + token.to(tl.int64)[:, None] * key_t + column[None, :], mask=here, other=0.0)
    score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for observer in range(OBSERVERS):
        position = anchor - (OBSERVERS - 1) + observer
        exists = (anchor >= 0) & (position >= padding)
        best = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
        for member in range(G):
            head = (kv_head * G + member).to(tl.int64)
            query_row = query_ptr + batch * query_b + head * query_h + (position.to(tl.int64) - shift) * query_t
            query = tl.load(query_row[:, None] + column[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
            place = ((batch * kv_heads * G + head) * checks + check) * OBSERVERS + observer
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
def _digit_counts(digit, counted, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How often each digit occurs among those counted. Few bins: a histogram costs in proportion to them."""
    counts = tl.histogram(tl.where(counted, digit, 0), BINS)
    others = BLOCK - tl.sum(counted.to(tl.int32), 0)
    return counts - tl.where(tl.arange(0, BINS) == 0, others, 0)


@triton.jit
def _digit_of_cut(counts, remaining, BINS: tl.constexpr):
    """The digit, from the highest down, at which the count reaches `remaining`; what is left of it there; its count."""
    digit = tl.arange(0, BINS)
    from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    cut = tl.max(tl.where(from_here >= remaining, digit, 0), 0)
    remaining -= tl.sum(tl.where(digit > cut, counts, 0), 0)
    return cut, remaining, tl.sum(tl.where(digit == cut, counts, 0), 0)


@triton.jit
def _sortable(ranking, token):
    """An integer that orders by ranking, then by the lower position."""
    return (ranking.to(tl.int64) << 32) + (0x7FFFFFFF - token)


@triton.jit
def _choose(
    score_ptr, ranking_ptr, doubt_ptr, position_ptr, padding_ptr, budget_ptr, chosen_ptr,
    checks, first, steps, length, width, kv_heads, recent, sinks,
    POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best positions of one check and key/value head, unsorted, as sortable integers: into (B, Hkv, steps, W).

    Ranking is 31 bits: window and sink positions first, then the pooled score's own bits (a float >= 0 orders like
    them). A radix search, 6 bits and then 5 at a time, narrows down the lowest ranking that is kept. Once no more than
    a block is in doubt, what is above goes in, and the search ends among those few. `doubt_ptr` may be the scores'
    own memory: they are not read once the rankings are written.
    """
    step, pair = tl.program_id(0), tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    anchor = tl.load(position_ptr + batch * checks + first + step).to(tl.int32)
    if anchor < 0:
        return
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    keep = tl.minimum(tl.load(budget_ptr + batch).to(tl.int32), anchor + 1 - padding)
    row = (pair.to(tl.int64) * steps + step) * length
    scores, rankings, doubts = score_ptr + row, ranking_ptr + row, doubt_ptr + row
    chosen = chosen_ptr + (pair.to(tl.int64) * steps + step) * width
    begin = padding // BLOCK * BLOCK

    counts = tl.zeros([64], tl.int32)
    for start in range(begin, anchor + 1, BLOCK):
        token = start + tl.arange(0, BLOCK)
        exists = (token >= padding) & (token <= anchor)
        pooled = tl.zeros([BLOCK], tl.float32)
        for away in tl.static_range(-(POOL // 2), POOL // 2 + 1):
            near = token + away
            pooled = tl.maximum(pooled, tl.load(scores + near, mask=(near >= padding) & (near <= anchor), other=0.0))
        preferred = (token > anchor - recent) | (token - padding < sinks)
        ranking = pooled.to(tl.int32, bitcast=True) + tl.where(preferred, 1 << 30, 0)
        tl.store(rankings + token, ranking, mask=exists)
        counts += _digit_counts(ranking >> 25, exists, 64, BLOCK)
    prefix, remaining, doubtful = _digit_of_cut(counts, keep, 64)
    tl.debug_barrier()

    shift = tl.full([], 25, tl.int32)  # bits below the prefix
    while (shift > 0) & (doubtful > BLOCK):
        shift -= 5
        narrower = tl.zeros([32], tl.int32)
        for start in range(begin, anchor + 1, BLOCK):
            token = start + tl.arange(0, BLOCK)
            ranking = tl.load(rankings + token, mask=(token >= padding) & (token <= anchor), other=-1)
            narrower += _digit_counts((ranking >> shift) & 31, (ranking >> (shift + 5)) == prefix, 32, BLOCK)
        digit, remaining, doubtful = _digit_of_cut(narrower, remaining, 32)
        prefix = (prefix << 5) + digit

    # above the prefix: in. Equal to it: with nothing below, tied, and the first ones are in; else in doubt
    tied = tl.where(shift == 0, remaining, 0)
    sure, equals = 0, 0
    for start in range(begin, anchor + 1, BLOCK):
        token = start + tl.arange(0, BLOCK)
        ranking = tl.load(rankings + token, mask=(token >= padding) & (token <= anchor), other=-1)
        above = (ranking >> shift) > prefix
        equal = (ranking >> shift) == prefix
        place = sure + tl.cumsum(above.to(tl.int32), 0) - 1
        order = equals + tl.cumsum(equal.to(tl.int32), 0)
        sure += tl.sum(above.to(tl.int32), 0)
        equals += tl.sum(equal.to(tl.int32), 0)
        place = tl.where(above, place, keep - remaining + order - 1)
        tl.store(chosen + place, _sortable(ranking, token), mask=above | (equal & (order <= tied)))
        tl.store(doubts + order - 1, token, mask=equal & (order > tied))

    if shift > 0:
        tl.debug_barrier()
        number = tl.arange(0, BLOCK)
        token = tl.load(doubts + number, mask=number < equals, other=0)
        ranking = tl.load(rankings + token, mask=number < equals, other=-1)
        begun = keep - remaining
        while shift > 0:
            shift -= 5
            counted = (ranking >> (shift + 5)) == prefix
            digit, remaining, doubtful = _digit_of_cut(
                _digit_counts((ranking >> shift) & 31, counted, 32, BLOCK), remaining, 32
            )
            prefix = (prefix << 5) + digit
        equal = ranking == prefix
        taken = (ranking > prefix) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= remaining))
        place = begun + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(chosen + place, _sortable(ranking, token), mask=taken)


@triton.jit
def _order(
    chosen_ptr, selected_ptr, checks, first, steps, width, kv_heads, WIDTH: tl.constexpr, DROPPABLE: tl.constexpr
):  # fmt: skip
    """Positions by rank, best first, -1 past the end: (B, Hkv, C, W) int32. Only the last DROPPABLE ranks are put in
    order, one by one, if that is less work than a sort."""
    step, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, WIDTH)
    sortable = tl.load(chosen_ptr + (pair * steps + step) * width + slot, mask=slot < width, other=-1)
    selected = selected_ptr + (pair * checks + first + step) * width
    if DROPPABLE >= WIDTH:
        sortable = tl.sort(sortable, descending=True)
        token = tl.where(sortable >= 0, 0x7FFFFFFF - (sortable & 0x7FFFFFFF), -1)
        tl.store(selected + slot, token.to(tl.int32), mask=slot < width)
    else:
        size = tl.sum((sortable >= 0).to(tl.int32), 0)
        beyond = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        left = tl.where(sortable >= 0, sortable, beyond)
        dropped = tl.minimum(size, DROPPABLE)
        for place in range(dropped):
            worst = tl.min(left, 0)
            tl.store(selected + size - 1 - place, (0x7FFFFFFF - (worst & 0x7FFFFFFF)).to(tl.int32))
            left = tl.where(left == worst, beyond, left)
        stays = left < beyond
        place = tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(selected + place, (0x7FFFFFFF - (left & 0x7FFFFFFF)).to(tl.int32), mask=stays)
        tl.store(selected + slot, tl.full([WIDTH], -1, tl.int32), mask=(slot >= size) & (slot < width))


def log_sum_exp(
    query: Tensor, key: Tensor, positions: Tensor, left_padding: Tensor, observation_window: int, scaling: float
) -> Tensor:
    """The observing queries' log-sum-exp over their own keys: (B, H, C, O) float32, in units of log 2.

    query (B, H, Q, D): the last Q positions; key (B, Hkv, L, D); positions (B, C); left_padding (B,).
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, checks = key.shape[1], positions.shape[1]
    group = heads // kv_heads
    lse = torch.empty(batch, heads, checks, observation_window, dtype=torch.float32, device=query.device)
    sizes = block_sizes("lse", query)
    _log_sum_exp[triton.cdiv(checks * observation_window * group, sizes["BLOCK_M"]), kv_heads, batch](
        query, key, positions, left_padding, lse,
        *query.stride()[:3], *key.stride()[:3], checks, key.shape[2] - queries, scaling * LOG2E,
        G=group, OBSERVERS=observation_window, D=head_dim, DP=padded_head(head_dim), PRECISION=precision(query),
        **sizes,
    )  # fmt: skip
    return lse


def select(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    *,
    width: int,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    scaling: float,
    droppable: int,
    lse: Tensor | None = None,
) -> Tensor:
    """`refreshkv.ops.naive.select` by kernels: (B, Hkv, C, width) int32; `lse`: what `log_sum_exp` gives, if known."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, length, checks = key.shape[1], key.shape[2], positions.shape[1]
    if lse is None:
        lse = log_sum_exp(query, key, positions, left_padding, observation_window, scaling)
    selected = torch.empty(batch, kv_heads, checks, width, dtype=torch.int32, device=query.device)
    pairs = batch * kv_heads
    chunk = min(checks, max(1, MAX_SCORES // (pairs * length)))
    score = torch.empty(pairs * chunk * length, dtype=torch.float32, device=query.device)
    ranking = torch.empty(pairs * chunk * length, dtype=torch.int32, device=query.device)
    sizes = block_sizes("scores", query)
    for first in range(0, checks, chunk):
        steps = min(chunk, checks - first)
        chosen = torch.full((batch, kv_heads, steps, width), -1, dtype=torch.int64, device=query.device)
        grid = (triton.cdiv(length, sizes["BLOCK_N"]), triton.cdiv(steps, sizes["BLOCK_M"]), pairs)
        _scores[grid](
            query, key, positions, left_padding, lse, score, *query.stride()[:3], *key.stride()[:3],
            checks, first, steps, length, kv_heads, length - queries, scaling * LOG2E,
            G=heads // kv_heads, OBSERVERS=observation_window, D=head_dim, DP=padded_head(head_dim),
            PRECISION=precision(query), **sizes,
        )  # fmt: skip
        _choose[steps, pairs](
            score, ranking, score.view(torch.int32), positions, left_padding, budgets, chosen,
            checks, first, steps, length, width, kv_heads, recent_window, sink_tokens,
            POOL=pool_kernel, BLOCK=min(BLOCK, triton.next_power_of_2(length)), num_warps=WARPS,
        )  # fmt: skip
        if width <= LARGEST_SORT:
            padded = triton.next_power_of_2(width)
            _order[steps, pairs](
                chosen, selected, checks, first, steps, width, kv_heads,
                WIDTH=padded, DROPPABLE=droppable if droppable <= LARGEST_ORDER else padded,
                num_warps=8 if width >= 1024 else 4,
            )  # fmt: skip
        else:
            order = chosen.sort(dim=-1, descending=True).values
            tokens = torch.where(order >= 0, 0x7FFFFFFF - (order & 0x7FFFFFFF), -1)
            selected[:, :, first : first + steps] = tokens.to(torch.int32)
    return selected
