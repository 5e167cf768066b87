"""Triton kernels for the selection: scores of all full steps in bounded chunks, and the best positions of each.

Shapes: `B` batch rows, `C` checks, `O` observing queries, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D`
head size, `L` keys, `W` slots of a selection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.state import FullSteps, SelectionOptions
from refreshkv.ops.tiles import LOG2E, MANY_PROGRAMS, block_sizes, on_its_device, padded_head, precision, sample_size

MAX_SCORES = 2**27
"""Scores held at once, 4 bytes each: 512 MiB."""

COLLECT_WARPS = 4
BLOCK = 1024
"""Scores of a row taken at once."""

SAMPLE = 1024
DOUBTS = 4096
"""Positions that tell where about the cut is (more in long rows), and most that may be set aside for the exact one."""

MARGIN = 4.0
"""How far from the guess the cut may be, in standard deviations of the sample's count."""

LARGEST_ORDER = 64
"""Up to this many droppable ranks are picked out one by one instead of sorting all."""

LARGEST_SORT = 4096
"""Selections up to this wide are sorted in one program, wider ones by torch."""


@triton.jit(do_not_specialize=["shift", "checks", "splits"])
def _log_sum_exp(
    query_ptr, key_ptr, position_ptr, padding_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, checks, splits, shift, scale,
    G: tl.constexpr, OBSERVERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of every observing query of every full step, over each of its keys' splits: (splits, B, H, C, O), in units of
    log 2."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
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
    share = tl.cdiv(tl.cdiv(last + 1 - padding, BLOCK_N), splits) * BLOCK_N
    begin = padding + split * share
    for start in range(begin, tl.minimum(begin + share, last + 1), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        here = (token <= last)[:, None] & in_head[None, :]
        key = tl.load(keys + token.to(tl.int64)[:, None] * key_t + column[None, :], mask=here, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        visible = token[None, :] <= position[:, None]
        logits = tl.where(visible, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(highest - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        highest = higher
    heads = tl.num_programs(1) * G
    row = ((split * tl.num_programs(2) + batch) * heads + head) * checks + check
    place = row * OBSERVERS + observer
    tl.store(lse_ptr + place, highest + tl.log2(tl.where(total > 0, total, 1.0)), mask=exists)


@triton.jit(do_not_specialize=["rows", "splits"])
def _merge_splits(split_ptr, lse_ptr, rows, splits, BLOCK: tl.constexpr):
    """The log-sum-exp over all keys from those over the splits, (splits, rows) -> (rows), in units of log 2."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        lse = tl.load(split_ptr + split * rows + row, mask=row < rows, other=-float("inf"))
        higher = tl.maximum(highest, lse)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(highest - safe) + tl.exp2(lse - safe)
        highest = higher
    tl.store(lse_ptr + row, highest + tl.log2(tl.where(total > 0, total, 1.0)), mask=row < rows)


@triton.jit(do_not_specialize=["shift", "checks", "first", "steps"])
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
def _sortable(ranking, token):
    """An integer that orders by ranking, then by the lower position."""
    return (ranking.to(tl.int64) << 32) + (0x7FFFFFFF - token)


@triton.jit
def _rankings(scores, token, padding, anchor, recent, sinks, POOL: tl.constexpr, INSIDE: tl.constexpr):
    """What positions are ranked by, in 31 bits: those of the windows first, then the pooled score's own bits, which
    order as the float >= 0 does. INSIDE: all neighbours exist; else the clamped ones are pooled again, to no effect."""
    pooled = tl.zeros(token.shape, tl.float32)
    places = scores + token
    for away in tl.static_range(-(POOL // 2), POOL // 2 + 1):
        if INSIDE:
            near = places + away
        else:
            near = scores + tl.minimum(tl.maximum(token + away, padding), anchor)
        pooled = tl.maximum(pooled, tl.load(near))
    preferred = (token > anchor - recent) | (token - padding < sinks)
    return pooled.to(tl.int32, bitcast=True) + tl.where(preferred, 1 << 30, 0)


@triton.jit
def _block_rankings(scores, start, padding, anchor, recent, sinks, POOL: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of a block, and their rankings, -1 where none exists."""
    token = start + tl.arange(0, BLOCK)
    if (start >= padding + POOL // 2) & (start + BLOCK + POOL // 2 <= anchor + 1):
        ranking = _rankings(scores, token, padding, anchor, recent, sinks, POOL, True)
    else:
        ranking = _rankings(scores, token, padding, anchor, recent, sinks, POOL, False)
        ranking = tl.where((token >= padding) & (token <= anchor), ranking, -1)
    return token, ranking


@triton.jit
def _choice(position_ptr, padding_ptr, budget_ptr, checks, first, kv_heads):
    """Of a program's check and key/value head: the full step's position, the first column, how many to keep, and the
    row among those of the chunk."""
    step, pair = tl.program_id(0), tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    anchor = tl.load(position_ptr + batch * checks + first + step).to(tl.int32)
    padding = tl.load(padding_ptr + batch).to(tl.int32)
    keep = tl.minimum(tl.load(budget_ptr + batch).to(tl.int32), anchor + 1 - padding)
    return anchor, padding, keep, pair.to(tl.int64) * tl.num_programs(0) + step


@triton.jit(do_not_specialize=["checks", "first"])
def _guess(
    score_ptr, position_ptr, padding_ptr, budget_ptr, bound_ptr, checks, first, length, kv_heads, recent, sinks,
    POOL: tl.constexpr, SAMPLE: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """Two rankings that the cut almost surely lies between, with few others: (B, Hkv, steps, 2).

    From a sample of the positions, one at random out of each of SAMPLE equal stretches, MARGIN standard deviations to
    either side, and to 20 bits.
    """
    anchor, padding, keep, row = _choice(position_ptr, padding_ptr, budget_ptr, checks, first, kv_heads)
    if anchor < 0:
        return
    count = anchor + 1 - padding
    sampled = tl.minimum(count, SAMPLE)
    number = tl.arange(0, SAMPLE)
    stretch = tl.maximum(count // SAMPLE, 1)
    token = (number.to(tl.int64) * count // sampled).to(tl.int32) + ((number * 40503) >> 8) % stretch
    token = padding + tl.minimum(token, count - 1)
    ranking = _rankings(score_ptr + row * length, token, padding, anchor, recent, sinks, POOL, False)
    ranking = tl.where(number < sampled, ranking, -1)
    expected = keep.to(tl.float32) * sampled / count
    spread = tl.where(count > SAMPLE, MARGIN * tl.sqrt(expected * (1.0 - keep.to(tl.float32) / count)), 0.0)
    few, many = (expected - spread).to(tl.int32) - 1, (expected + spread).to(tl.int32) + 2
    lower, upper = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for digit in range(20):
        step = 1 << (30 - digit)
        reached = (ranking >= lower + step).to(tl.int32) + ((ranking >= upper + step).to(tl.int32) << 16)
        reached = tl.sum(reached, 0)  # of both at once: a sample has less than 2^16
        lower = tl.where((reached & 0xFFFF) >= many, lower + step, lower)
        upper = tl.where((reached >> 16) >= few, upper + step, upper)
    tl.store(bound_ptr + 2 * row, tl.where(many <= sampled, lower, 0))
    tl.store(bound_ptr + 2 * row + 1, tl.where(few > 0, upper | ((1 << 11) - 1), 0x7FFFFFFF))


@triton.jit(do_not_specialize=["checks", "first"])
def _collect(
    score_ptr, position_ptr, padding_ptr, budget_ptr, bound_ptr, doubt_ptr, count_ptr, chosen_ptr,
    checks, first, length, width, kv_heads, recent, sinks,
    POOL: tl.constexpr, BLOCK: tl.constexpr, DOUBTS: tl.constexpr,
):  # fmt: skip
    """Positions above the upper bound go into the selection, as sortable integers: (B, Hkv, steps, W). Those between
    the bounds are set aside: (B, Hkv, steps, DOUBTS). Both stay in order. Counts of both: (B, Hkv, steps, 2)."""
    anchor, padding, keep, row = _choice(position_ptr, padding_ptr, budget_ptr, checks, first, kv_heads)
    if anchor < 0:
        return
    scores, chosen, doubts = score_ptr + row * length, chosen_ptr + row * width, doubt_ptr + row * DOUBTS
    lower, upper = tl.load(bound_ptr + 2 * row), tl.load(bound_ptr + 2 * row + 1)
    sure, doubtful = 0, 0
    for start in range(padding // BLOCK * BLOCK, anchor + 1, BLOCK):
        token, ranking = _block_rankings(scores, start, padding, anchor, recent, sinks, POOL, BLOCK)
        above = ranking > upper
        between = (ranking >= lower) & (ranking <= upper)
        counts = above.to(tl.int32) + (between.to(tl.int32) << 16)  # both in one scan: a block has less than 2^16
        order = tl.cumsum(counts, 0) - counts
        place = tl.where(above, sure + (order & 0xFFFF), keep)
        tl.store(chosen + place, _sortable(ranking, token), mask=place < keep)
        place = tl.where(between, doubtful + (order >> 16), DOUBTS)
        tl.store(doubts + place, _sortable(ranking, token), mask=place < DOUBTS)
        total = tl.sum(counts, 0)
        sure += total & 0xFFFF
        doubtful += total >> 16
    tl.store(count_ptr + 2 * row, sure)
    tl.store(count_ptr + 2 * row + 1, doubtful)


@triton.jit(do_not_specialize=["checks", "first"])
def _settle(
    score_ptr, position_ptr, padding_ptr, budget_ptr, bound_ptr, doubt_ptr, count_ptr, chosen_ptr,
    checks, first, length, width, kv_heads, recent, sinks,
    POOL: tl.constexpr, BLOCK: tl.constexpr, DOUBTS: tl.constexpr,
):  # fmt: skip
    """Completes the selection from those in doubt; where a sample misled, searches everything instead."""
    anchor, padding, keep, row = _choice(position_ptr, padding_ptr, budget_ptr, checks, first, kv_heads)
    if anchor < 0:
        return
    chosen, doubts = chosen_ptr + row * width, doubt_ptr + row * DOUBTS
    sure, doubtful = tl.load(count_ptr + 2 * row), tl.load(count_ptr + 2 * row + 1)
    lower, upper = tl.load(bound_ptr + 2 * row), tl.load(bound_ptr + 2 * row + 1)
    if (sure > keep) | (sure + doubtful < keep) | (doubtful > DOUBTS):
        _search(score_ptr + row * length, chosen, keep, padding, anchor, recent, sinks, POOL, BLOCK)
    elif doubtful <= DOUBTS // 2:
        _take_best(doubts, doubtful, chosen, sure, keep, lower, upper, DOUBTS // 2)
    else:
        _take_best(doubts, doubtful, chosen, sure, keep, lower, upper, DOUBTS)


@triton.jit
def _take_best(doubts, doubtful, chosen, sure, keep, lower, upper, SIZE: tl.constexpr):
    """Puts the best of up to SIZE doubtful ones, ranked `lower .. upper`, behind the sure ones."""
    number = tl.arange(0, SIZE)
    sortable = tl.load(doubts + number, mask=number < doubtful, other=-1)
    ranking = (sortable >> 32).to(tl.int32)
    missing = keep - sure
    cut, reached = lower, doubtful  # the lowest ranking that is kept, and how many are not below it
    while (cut < upper) & (reached != missing):
        middle = upper - (upper - cut) // 2
        count = tl.sum((ranking >= middle).to(tl.int32), 0)
        reached = tl.where(count >= missing, count, reached)
        cut = tl.where(count >= missing, middle, cut)
        upper = tl.where(count >= missing, upper, middle - 1)
    ties = missing - tl.sum((ranking > cut).to(tl.int32), 0)  # of which the first ones are in
    equal = (ranking == cut) & (number < doubtful)
    goes_in = (ranking > cut) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= ties))
    place = tl.where(goes_in, sure + tl.cumsum(goes_in.to(tl.int32), 0) - 1, keep)
    tl.store(chosen + place, sortable, mask=place < keep)


@triton.jit
def _search(
    scores, chosen, keep, padding, anchor, recent, sinks, POOL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The whole selection, by searching the cut among all positions, one bit at a pass."""
    begin = padding // BLOCK * BLOCK
    cut = tl.full([], 0, tl.int32)
    for digit in range(31):
        higher = cut + (1 << (30 - digit))
        reached = tl.zeros([BLOCK], tl.int32)
        for start in range(begin, anchor + 1, BLOCK):
            token, ranking = _block_rankings(scores, start, padding, anchor, recent, sinks, POOL, BLOCK)
            reached += (ranking >= higher).to(tl.int32)
        cut = tl.where(tl.sum(reached, 0) >= keep, higher, cut)
    reached = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, anchor + 1, BLOCK):
        token, ranking = _block_rankings(scores, start, padding, anchor, recent, sinks, POOL, BLOCK)
        reached += (ranking > cut).to(tl.int32)
    ties = keep - tl.sum(reached, 0)
    taken, equals = 0, 0
    for start in range(begin, anchor + 1, BLOCK):
        token, ranking = _block_rankings(scores, start, padding, anchor, recent, sinks, POOL, BLOCK)
        equal = ranking == cut
        order = equals + tl.cumsum(equal.to(tl.int32), 0)
        equals += tl.sum(equal.to(tl.int32), 0)
        goes_in = (ranking > cut) | (equal & (order <= ties))
        place = taken + tl.cumsum(goes_in.to(tl.int32), 0) - 1
        taken += tl.sum(goes_in.to(tl.int32), 0)
        tl.store(chosen + place, _sortable(ranking, token), mask=goes_in)


@triton.jit(do_not_specialize=["checks", "first", "steps"])
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
    sizes = block_sizes("lse", query)
    tiles = triton.cdiv(checks * observation_window * group, sizes["BLOCK_M"])
    # few rows are spread over the GPU by splitting their keys
    splits = max(1, min(MANY_PROGRAMS // (tiles * kv_heads * batch), triton.cdiv(key.shape[2], sizes["BLOCK_N"])))
    lse = query.new_empty(splits, batch, heads, checks, observation_window, dtype=torch.float32)
    _log_sum_exp[tiles * splits, kv_heads, batch](
        query, key, positions, left_padding, lse,
        *query.stride()[:3], *key.stride()[:3], checks, splits, key.shape[2] - queries, scaling * LOG2E,
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
    pool_kernel, observation_window, recent_window, sink_tokens = options
    batch, heads, queries, head_dim = query.shape
    kv_heads, length, checks = key.shape[1], key.shape[2], positions.shape[1]
    if lse is None:
        lse = log_sum_exp(query, key, positions, left_padding, observation_window, scaling)
    selected = torch.empty(batch, kv_heads, checks, width, dtype=torch.int32, device=query.device)
    pairs = batch * kv_heads
    chunk = min(checks, max(1, MAX_SCORES // (pairs * length)))
    score = torch.empty(pairs * chunk * length, dtype=torch.float32, device=query.device)
    doubts = torch.empty(pairs * chunk * DOUBTS, dtype=torch.int64, device=query.device)
    bounds, counts = (torch.empty(pairs * chunk * 2, dtype=torch.int32, device=query.device) for _ in range(2))
    block = min(BLOCK, triton.next_power_of_2(length))
    sizes = block_sizes("scores", query)
    sample = sample_size(length, width, SAMPLE, DOUBTS, MARGIN)
    for first in range(0, checks, chunk):
        count = min(chunk, checks - first)
        chosen = torch.full((batch, kv_heads, count, width), -1, dtype=torch.int64, device=query.device)
        grid = (triton.cdiv(length, sizes["BLOCK_N"]), triton.cdiv(count, sizes["BLOCK_M"]), pairs)
        _scores[grid](
            query, key, positions, left_padding, lse, score, *query.stride()[:3], *key.stride()[:3],
            checks, first, count, length, kv_heads, length - queries, scaling * LOG2E,
            G=heads // kv_heads, OBSERVERS=observation_window, D=head_dim, DP=padded_head(head_dim),
            PRECISION=precision(query), **sizes,
        )  # fmt: skip
        rows = (positions, left_padding, budgets)
        options = (kv_heads, recent_window, sink_tokens)
        _guess[count, pairs](
            score,
            *rows,
            bounds,
            checks,
            first,
            length,
            *options,
            POOL=pool_kernel,
            SAMPLE=sample,
            MARGIN=MARGIN,
            num_warps=8,
        )
        _collect[count, pairs](
            score, *rows, bounds, doubts, counts, chosen, checks, first, length, width, *options,
            POOL=pool_kernel, BLOCK=block, DOUBTS=DOUBTS, num_warps=COLLECT_WARPS,
        )  # fmt: skip
        _settle[count, pairs](
            score, *rows, bounds, doubts, counts, chosen, checks, first, length, width, *options,
            POOL=pool_kernel, BLOCK=block, DOUBTS=DOUBTS, num_warps=4,
        )  # fmt: skip
        if width <= LARGEST_SORT:
            padded = triton.next_power_of_2(width)
            _order[count, pairs](
                chosen, selected, checks, first, count, width, kv_heads,
                WIDTH=padded, DROPPABLE=droppable if droppable <= LARGEST_ORDER else padded,
                num_warps=8 if width >= 1024 else 4,
            )  # fmt: skip
        else:
            order = chosen.sort(dim=-1, descending=True).values
            tokens = torch.where(order >= 0, 0x7FFFFFFF - (order & 0x7FFFFFFF), -1)
            selected[:, :, first : first + count] = tokens.to(torch.int32)
    return selected
