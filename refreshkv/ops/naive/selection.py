"""Which positions a full or selecting step keeps, in plain PyTorch (docs/specification.md, sections 3, 5 and 10).

Shapes: `B` batch rows, `Q` positions of the queries, `L` positions of the keys, `H` query heads, `Hkv` key/value heads,
`G = H / Hkv`, `D` head size, `N` steps that select, `W` slots of a selection, `O` observing queries, `m`
look-ahead queries. Positions are columns, left padding included; -1 stands for a position that does not exist.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.ops.state import PLAIN_SOFTMAX, FullSteps, SelectionOptions, SoftmaxTerms

MAX_SCORES = 2**26
"""Attention scores that `select` holds at once (float32: 256 MiB); it takes longer inputs in chunks of steps."""


@torch.no_grad()
def select(
    query: Tensor,
    key: Tensor,
    steps: FullSteps,
    options: SelectionOptions,
    scaling: float,
    *,
    own_first: bool = False,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """The positions each step keeps, by rank (specification, sections 3 and 5; paper section 2.2).

    query (B, H, Q, D): the queries of the last Q of L positions; key (B, Hkv, L, D): the keys, or the score keys of
    selecting steps. own_first: the step's own position ranks first, as at selecting steps (section 10). Returns
    (B, Hkv, N, W) int64 by rank, best first, -1 past the end. Other forms may return all ranks but the `droppable`
    lowest in any order.
    """
    left_padding = steps.left_padding
    chunk = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * options.observation_window * key.shape[2]))
    parts = []
    for first in range(0, steps.positions.shape[1], chunk):
        here = steps.positions[:, first : first + chunk]
        look_ahead = None if steps.look_ahead is None else steps.look_ahead[:, :, first : first + chunk]
        observers = observing_queries(query, here - (key.shape[2] - query.shape[2]), options.observation_window)
        scores = observed_scores(observers, key, here, left_padding, scaling, terms, look_ahead)
        scores = pool(scores, here, left_padding, options.pool_kernel, options.pool_ahead)
        parts.append(best_positions(scores, steps._replace(positions=here), options, own_first=own_first))
    return torch.cat(parts, dim=2)


def best_positions(scores: Tensor, steps: FullSteps, options: SelectionOptions, *, own_first: bool = False) -> Tensor:
    """The positions each step keeps, by rank, (B, Hkv, N, W) as in `select`: scores (B, Hkv, N, L), pooled."""
    ranking = _ranking_keys(scores, steps.positions, steps.left_padding, options, own_first)
    return _best(ranking, steps.positions, steps.budgets, steps.left_padding, steps.width)


def observing_queries(query: Tensor, columns: Tensor, observation_window: int) -> Tensor:
    """The queries of columns `c - O + 1 .. c`: query (B, H, Q, D), columns (B, N) -> (B, H, N, O, D).

    Columns before the first get the first one's query, which `observed_scores` leaves out.
    """
    back = torch.arange(observation_window - 1, -1, -1, device=query.device)
    columns = (columns.unsqueeze(-1) - back).clamp(min=0)  # (B, N, O)
    index = columns.flatten(1)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    return query.gather(2, index).unflatten(2, columns.shape[1:])


def observed_scores(
    observers: Tensor,
    key: Tensor,
    positions: Tensor,
    left_padding: Tensor,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
    look_ahead: Tensor | None = None,
) -> Tensor:
    """The scores of all positions: softmax probabilities, their maximum over the group, its mean over the observing
    queries.

    look_ahead (B, H, N, m, D): the mean of the step's own maximum and of those of these queries takes the place of the
    step's own; None without any. Other arguments as in `observed_probabilities`. Returns (B, Hkv, N, L) float32.
    """
    probabilities = observed_probabilities(observers, key, positions, left_padding, scaling, terms).amax(dim=2)
    if look_ahead is not None:
        count = look_ahead.shape[3]
        alone = look_ahead.flatten(2, 3).unsqueeze(3)  # (B, H, N * m, 1, D)
        ahead = observed_probabilities(alone, key, positions.repeat_interleave(count, 1), left_padding, scaling, terms)
        ahead = ahead.amax(dim=2).squeeze(3).unflatten(2, (-1, count))  # (B, Hkv, N, m, L)
        own = probabilities[..., -1:, :]
        # the mean as own + differences: equal queries change no bit of it
        mean = own + (ahead - own).sum(dim=3, keepdim=True) / (count + 1)
        probabilities = torch.cat([probabilities[..., :-1, :], mean], dim=3)
    # a batch row may have fewer positions than observers
    present = (positions + 1 - left_padding.unsqueeze(-1)).clamp(min=1, max=observers.shape[3])
    return probabilities.sum(dim=3) / present[:, None, :, None]


def observed_probabilities(
    observers: Tensor,
    key: Tensor,
    positions: Tensor,
    left_padding: Tensor,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """The softmax probabilities of each observing query over the positions that it sees: (B, Hkv, G, N, O, L) float32.

    observers (B, H, N, O, D); key (B, Hkv, L, D); positions (B, N): the steps. All are 0 for an observer that does not
    exist.
    """
    (steps, observing), kv_heads = observers.shape[2:4], key.shape[1]
    wide = torch.promote_types(observers.dtype, torch.float32)
    grouped = observers.unflatten(1, (kv_heads, -1)).flatten(2, 4).to(wide)
    logits = grouped @ key.to(wide).transpose(-1, -2) * scaling
    logits = logits.unflatten(2, (-1, steps, observing))  # (B, Hkv, G, N, O, L)
    column = torch.arange(key.shape[2], device=key.device)
    observer = positions.unsqueeze(-1) - torch.arange(observing - 1, -1, -1, device=key.device)  # (B, N, O)
    start = left_padding[:, None, None]
    seen = (column >= start.unsqueeze(-1)) & (column <= observer.unsqueeze(-1))
    unseen = ~seen[:, None, None]
    logits = terms.cap(logits).masked_fill(unseen, -torch.inf)
    return terms.softmax(logits, kv_heads).masked_fill(unseen, 0.0).float()


def _exists(columns: int, positions: Tensor, left_padding: Tensor) -> Tensor:
    """Which columns a step at `a` sees, `left_padding .. a`: (B, 1, N, L) bool."""
    column = torch.arange(columns, device=positions.device)
    exists = (column >= left_padding[:, None, None]) & (column <= positions.unsqueeze(-1))
    return exists.unsqueeze(1)


def pool(scores: Tensor, positions: Tensor, left_padding: Tensor, kernel: int, ahead: bool = False) -> Tensor:
    """Max-pools scores (B, Hkv, N, L) over neighbouring positions, among the positions that exist: in a window around
    each position or, if `ahead`, in one that ends there."""
    exists = _exists(scores.shape[-1], positions, left_padding)
    scores = scores.masked_fill(~exists, -torch.inf)
    before = kernel - 1 if ahead else kernel // 2
    padded = F.pad(scores.flatten(0, 1), (before, kernel - 1 - before), value=-torch.inf)
    return F.max_pool1d(padded, kernel, stride=1).unflatten(0, scores.shape[:2])


def _ranking_keys(
    scores: Tensor, positions: Tensor, left_padding: Tensor, options: SelectionOptions, own_first: bool
) -> Tensor:
    """Rankings (B, Hkv, N, L) int64, all different: the step's own position if `own_first`, then the recent window and
    the sinks, then the higher score, then the lower position.

    A float32 >= 0 orders like its bits, of which a mean of probabilities needs the lower 30, so the criteria fit into
    one integer: 2 + 30 + 31 bits.
    """
    columns = scores.shape[-1]
    column = torch.arange(columns, device=scores.device)
    exists = _exists(columns, positions, left_padding)
    recent = column > (positions - options.recent_window).unsqueeze(-1)
    sink = column - left_padding[:, None, None] < options.sink_tokens
    preferred = (recent | sink).long()
    if own_first:
        preferred = preferred.masked_fill(column == positions.unsqueeze(-1), 2)
    bits = scores.clamp(min=0.0).contiguous().view(torch.int32).long()
    ranking = (preferred.unsqueeze(1) << 61) + (bits << 31) + (columns - 1 - column)
    return ranking.masked_fill(~exists, -1)


def _best(ranking: Tensor, positions: Tensor, budgets: Tensor, left_padding: Tensor, width: int) -> Tensor:
    """The columns of the `min(K, a + 1)` highest rankings, highest first, -1 past the end: (B, Hkv, N, width)."""
    order = ranking.topk(min(width, ranking.shape[-1]), dim=-1).indices
    order = F.pad(order, (0, width - order.shape[-1]), value=-1)
    kept = selection_sizes(positions, budgets, left_padding)  # (B, N)
    rank = torch.arange(width, device=ranking.device)
    return order.masked_fill(rank >= kept[:, None, :, None], -1)


def selection_sizes(positions: Tensor, budgets: Tensor, left_padding: Tensor) -> Tensor:
    """How many positions each step keeps, `n_sel = min(K, real tokens up to a)`: (B, N) int64, 0 where there is no
    step."""
    context = positions + 1 - left_padding.unsqueeze(-1)
    return torch.minimum(context, budgets.unsqueeze(-1)).clamp(min=0)


def ranks_left(steps_since: Tensor, selected_sizes: Tensor, budgets: Tensor) -> Tensor:
    """How many ranks of the selection the queue still holds, `steps_since >= 1` steps after it was made: (B, R)."""
    dropped = (selected_sizes + steps_since - 1 - budgets.unsqueeze(-1)).clamp(min=0)
    return selected_sizes - dropped
