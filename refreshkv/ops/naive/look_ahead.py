"""How far a step's score is from the attention that follows it, in plain PyTorch (docs/specification.md, section 13).

Shapes: `B` batch rows, `T` positions, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `N` steps
that select, `m` look-ahead queries, `S` positions after a step.
"""

import math

import torch
from torch import Tensor

from refreshkv.ops.naive.selection import MAX_SCORES, observed_probabilities
from refreshkv.ops.state import PLAIN_SOFTMAX, SoftmaxTerms


def look_ahead_divergence(
    query: Tensor,
    key: Tensor,
    score_key: Tensor,
    look_ahead: Tensor,
    positions: Tensor,
    left_padding: Tensor,
    horizon: int,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> tuple[Tensor, Tensor]:
    """KL divergence of each step's score from the attention of the tokens after it, over the positions up to the step.

    The target of a step at `a` is the mean of the full-attention probabilities of positions `a + 1 .. a + horizon`, as
    far as the sequence goes, on `0 .. a`, renormalised. The score is the mean of the softmax of the step's own query
    and of its look-ahead queries on `0 .. a`. Both are per query head.

    Args:
        query: (B, H, T, D). key: (B, Hkv, T, D).
        score_key: the keys by which the steps score: `key`, or the score keys of selecting steps.
        look_ahead: (B, H, N, m, D), the only differentiable argument.
        positions: (B, N) int64, -1 where there is no step.
        left_padding: (B,) int64.
        horizon: positions after a step whose attention is the target.
        scaling: factor of the logits. terms: what the model changes in the softmax besides.

    Returns the sum over batch rows and steps of the mean over query heads, and the number of batch rows and steps: two
    scalars. A step that no token follows does not count.
    """
    query, key, score_key = query.detach(), key.detach(), score_key.detach()
    counts = (positions >= 0) & (positions < query.shape[2] - 1)
    here, total = positions.clamp(min=0), look_ahead.new_zeros(())
    observing = max(horizon, 1 + look_ahead.shape[3])
    chunk = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * observing * query.shape[2]))
    for steps in torch.arange(positions.shape[1], device=query.device).split(chunk):
        target = following_attention(query, key, here[:, steps], left_padding, horizon, scaling, terms)
        own = _taken(query, here[:, steps]).unsqueeze(3)  # (B, H, N, 1, D)
        observers = torch.cat([own.to(look_ahead.dtype), look_ahead[:, :, steps]], dim=3)
        score = log_score(observers, score_key, here[:, steps], left_padding, scaling, terms)
        divergences = torch.xlogy(target, target) - target * score.masked_fill(target == 0, 0.0)
        divergences = divergences.sum(dim=-1).mean(dim=1)  # (B, N)
        total = total + divergences.where(counts[:, steps], 0.0).sum()
    return total, counts.sum()


def _taken(query: Tensor, columns: Tensor) -> Tensor:
    """The queries of columns (B, n): query (B, H, T, D) -> (B, H, n, D)."""
    return query.gather(2, columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))


@torch.no_grad()
def following_attention(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    left_padding: Tensor,
    horizon: int,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """The target of the steps at `positions` (B, N): (B, H, N, T), zero after each step; arguments as above."""
    length = query.shape[2]
    after = positions[:, :, None] + torch.arange(1, horizon + 1, device=query.device)  # (B, N, S)
    exists = after < length
    after = after.clamp(max=length - 1).flatten(1)
    observers = _taken(query, after).unsqueeze(3)  # (B, H, N * S, 1, D)
    probabilities = observed_probabilities(observers, key, after, left_padding, scaling, terms)
    probabilities = probabilities.squeeze(4).flatten(1, 2).unflatten(2, exists.shape[1:])  # (B, H, N, S, T)
    known = torch.arange(length, device=query.device) <= positions.unsqueeze(-1)
    target = (probabilities * exists[:, None, :, :, None]).sum(dim=3) * known[:, None]
    return target / target.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)


def log_score(
    observers: Tensor,
    score_key: Tensor,
    positions: Tensor,
    left_padding: Tensor,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """The logarithm of the mean softmax of observers (B, H, N, O, D) over the positions up to `positions` (B, N):
    (B, H, N, T), -inf where there is nothing to see."""
    kv_heads, (steps, count) = score_key.shape[1], observers.shape[2:4]
    wide = torch.promote_types(observers.dtype, torch.float32)
    grouped = observers.unflatten(1, (kv_heads, -1)).flatten(2, 4).to(wide)
    logits = terms.cap(grouped @ score_key.to(wide).transpose(-1, -2) * scaling)
    logits = logits.unflatten(2, (-1, steps, count)).flatten(1, 2)  # (B, H, N, O, T)
    column = torch.arange(score_key.shape[2], device=score_key.device)
    seen = (column >= left_padding[:, None, None]) & (column <= positions.unsqueeze(-1))  # (B, N, T)
    logits = logits.masked_fill(~seen[:, None, :, None], torch.finfo(wide).min)
    score = logits.log_softmax(dim=-1).logsumexp(dim=3) - math.log(count)
    return score.masked_fill(~seen[:, None], -torch.inf)
