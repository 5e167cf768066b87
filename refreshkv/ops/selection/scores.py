"""Scores of all keys for the full steps of a pass, by Triton: float32 probabilities, before pooling.

Shapes: `B` batch rows, `C` decision steps, `O` observing queries, `H` query heads, `Hkv` key/value heads,
`G = H / Hkv`, `D` head size, `L` keys.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.state import PLAIN_SOFTMAX, FullSteps, SoftmaxTerms
from refreshkv.ops.tiles import LOG2E, MANY_PROGRAMS, block_sizes, cap_of, capped, padded_head, precision


class ScoredKeys(NamedTuple):
    """The keys that scores are taken from."""

    key: Tensor
    """(B, Hkv, L, D) in the query's dtype: the keys, or the codes of score keys, which are small whole numbers."""
    scales: Tensor | None
    """(B, Hkv, L) float32: the factor of each key; None: they are all 1."""

    def flat(self) -> tuple[Tensor, Tensor]:
        """The keys, and their scales or, in their place, a tensor that is not read."""
        return self.key, self.key if self.scales is None else self.scales


@triton.jit(do_not_specialize=["shift", "decisions", "splits"])
def _log_sum_exp(
    query_ptr, key_ptr, scale_ptr, position_ptr, padding_ptr, lse_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, decisions, splits, length, shift, scale,
    SCALED: tl.constexpr, G: tl.constexpr, OBSERVERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
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
        if SCALED:
            # [BLOCK_N]
            factor = tl.load(scale_ptr + (batch * tl.num_programs(1) + kv_head) * length + token, mask=token <= last)
            logits *= factor[None, :]
        logits = capped(logits, CAP)
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
    query_ptr, key_ptr, scale_ptr, position_ptr, padding_ptr, lse_ptr, score_ptr,
    query_b, query_h, query_t, key_b, key_h, key_t, decisions, first, steps, length, kv_heads, shift, scale,
    SCALED: tl.constexpr, G: tl.constexpr, OBSERVERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
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
    factor = scale
    if SCALED:
        # [1, BLOCK_N]
        factor = scale * tl.load(scale_ptr + pair.to(tl.int64) * length + token, mask=token < length)[None, :]
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
            logits = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor, CAP)
            best = tl.maximum(best, logits - lse[:, None])
        visible = (token[None, :] <= position[:, None]) & exists[:, None]
        score += tl.where(visible, tl.exp2(best), 0.0)
    present = tl.minimum(anchor + 1 - padding, OBSERVERS)
    score = score / tl.maximum(present, 1).to(tl.float32)[:, None]
    row = (pair.to(tl.int64) * steps + step) * length
    inside = (step < steps)[:, None] & (token < length)[None, :]
    tl.store(score_ptr + row[:, None] + token[None, :], score, mask=inside)


def log_sum_exp(
    query: Tensor,
    keys: ScoredKeys,
    positions: Tensor,
    left_padding: Tensor,
    observation_window: int,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """The observing queries' log-sum-exp over their own keys, and their sinks: (B, H, C, O) float32, in units of log 2.

    query (B, H, Q, D): the last Q positions; positions (B, C); left_padding (B,).
    """
    key = keys.key
    batch, heads, queries, head_dim = query.shape
    kv_heads, decisions = key.shape[1], positions.shape[1]
    group = heads // kv_heads
    sizes = block_sizes("lse", query)
    tiles = triton.cdiv(decisions * observation_window * group, sizes["BLOCK_M"])
    # few rows are spread over the GPU by splitting their keys
    splits = max(1, min(MANY_PROGRAMS // (tiles * kv_heads * batch), triton.cdiv(key.shape[2], sizes["BLOCK_N"])))
    lse = query.new_empty(splits, batch, heads, decisions, observation_window, dtype=torch.float32)
    _log_sum_exp[tiles * splits, kv_heads, batch](
        query, *keys.flat(), positions, left_padding, lse,
        *query.stride()[:3], *key.stride()[:3], decisions, splits, key.shape[2], key.shape[2] - queries,
        scaling * LOG2E,
        SCALED=keys.scales is not None, G=group,
        OBSERVERS=observation_window, D=head_dim, DP=padded_head(head_dim), PRECISION=precision(query),
        CAP=cap_of(terms), **sizes,
    )  # fmt: skip
    merged = lse[0]
    if splits > 1:
        merged = torch.empty_like(merged)
        _merge_splits[triton.cdiv(merged.numel(), 32),](lse, merged, merged.numel(), splits, BLOCK=32)
    if terms.sinks is None:
        return merged
    return torch.logaddexp2(merged, terms.sinks.float()[:, None, None] * LOG2E)


def write_scores(
    query: Tensor,
    keys: ScoredKeys,
    steps: FullSteps,
    lse: Tensor,
    score: Tensor,
    first: int,
    count: int,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> None:
    """Writes the scores of the steps `first .. first + count - 1` into `score`: (B, Hkv, count, L) float32.

    query (B, H, Q, D): the last Q positions; lse (B, H, C, O): what `log_sum_exp` gives.
    """
    key = keys.key
    batch, heads, queries, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    sizes = block_sizes("scores", query)
    grid = (triton.cdiv(length, sizes["BLOCK_N"]), triton.cdiv(count, sizes["BLOCK_M"]), batch * kv_heads)
    _scores[grid](
        query, *keys.flat(), steps.positions, steps.left_padding, lse, score, *query.stride()[:3], *key.stride()[:3],
        steps.positions.shape[1], first, count, length, kv_heads, length - queries, scaling * LOG2E,
        SCALED=keys.scales is not None, G=heads // kv_heads,
        OBSERVERS=lse.shape[3], D=head_dim, DP=padded_head(head_dim),
        PRECISION=precision(query), CAP=cap_of(terms), **sizes,
    )  # fmt: skip
