"""A selecting step of decoding, in plain PyTorch (docs/specification.md, section 10): it chooses a small cache by the
score keys and attends to exactly that.

Shapes: `B` batch rows, `L` positions, `H` query heads, `Hkv` key/value heads, `D` head size, `O` observing queries,
`W` width of a selection. Positions are columns, left padding included; -1 fills what does not exist.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.selection import observed_scores


@torch.no_grad()
def choose(
    observers: Tensor,
    score_key: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    *,
    width: int,
    pool_kernel: int,
    pool_ahead: bool,
    recent_window: int,
    sink_tokens: int,
    scaling: float,
) -> Tensor:
    """The positions that a selecting step at the last of L positions keeps, by rank: (B, Hkv, W) int64.

    observers (B, H, O, D): the queries of the last O positions, this step's last; score_key (B, Hkv, L, D): score keys
    as numbers; budgets, left_padding (B,) int64; width: at least the largest `min(K, c + 1)`.
    """
    position = score_key.shape[2] - 1
    positions = torch.full_like(left_padding, position).unsqueeze(-1)
    scores = observed_scores(observers.unsqueeze(2), score_key, positions, left_padding, scaling).squeeze(2)
    exists = torch.arange(position + 1, device=scores.device) >= left_padding[:, None, None]
    scores = pool(scores.masked_fill(~exists, -torch.inf), pool_kernel, pool_ahead)
    ranking = _ranking(scores, left_padding, recent_window, sink_tokens).masked_fill(~exists, -1)
    order = ranking.topk(min(width, position + 1), dim=-1).indices
    order = F.pad(order, (0, width - order.shape[-1]), value=-1)
    kept = torch.minimum(budgets, position + 1 - left_padding)
    return order.masked_fill(torch.arange(width, device=order.device) >= kept[:, None, None], -1)


def pool(scores: Tensor, kernel: int, ahead: bool) -> Tensor:
    """Maximum over `kernel` neighbouring positions of the last dimension, in a window around each position or, if
    `ahead`, in one that ends there."""
    before = kernel - 1 if ahead else kernel // 2
    padded = F.pad(scores, (before, kernel - 1 - before), value=-torch.inf)
    return padded.unfold(-1, kernel, 1).amax(dim=-1)


def attend(query: Tensor, keys: Tensor, values: Tensor, selected: Tensor, scaling: float) -> Tensor:
    """Attention of query (B, H, 1, D) to the selected positions (B, Hkv, W), -1 for none, of keys and values
    (B, Hkv, L, D): (B, H, 1, D)."""
    index = selected.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
    return grouped_attention(
        query, keys.gather(2, index), values.gather(2, index), (selected >= 0)[:, :, None], scaling
    )


def _ranking(scores: Tensor, left_padding: Tensor, recent_window: int, sink_tokens: int) -> Tensor:
    """(B, Hkv, L) int64, all different: the last position, then recent and sink positions, then the score, then the
    lower position. A float32 >= 0 orders like its bits: 2 + 31 + 30 bits."""
    columns = scores.shape[-1]
    column = torch.arange(columns, device=scores.device)
    recent = column > columns - 1 - recent_window
    sink = column - left_padding[:, None, None] < sink_tokens
    first = (recent | sink).long()
    first = first.masked_fill(column == columns - 1, 2)
    bits = scores.float().clamp(min=0.0).contiguous().view(torch.int32).long()
    return (first << 61) + (bits << 30) + (columns - 1 - column)
