"""A selecting step of decoding, in plain PyTorch (docs/specification.md, section 10): it chooses a small cache by the
score keys and attends to exactly that.

Shapes: `B` batch rows, `L` positions, `H` query heads, `Hkv` key/value heads, `D` head size, `O` observing queries,
`W` width of a selection. Positions are columns, left padding included; -1 fills what does not exist.
"""

import torch
from torch import Tensor

from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.selection import select
from refreshkv.ops.state import FullSteps, SelectionOptions


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
    positions = torch.full_like(left_padding, score_key.shape[2] - 1).unsqueeze(-1)
    steps = FullSteps(positions, budgets, left_padding, width, droppable=width)
    options = SelectionOptions(pool_kernel, observers.shape[2], recent_window, sink_tokens, pool_ahead)
    return select(observers, score_key, steps, options, scaling, own_first=True).squeeze(2)


def attend(query: Tensor, keys: Tensor, values: Tensor, selected: Tensor, scaling: float) -> Tensor:
    """Attention of query (B, H, 1, D) to the selected positions (B, Hkv, W), -1 for none, of keys and values
    (B, Hkv, L, D): (B, H, 1, D)."""
    index = selected.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
    return grouped_attention(
        query, keys.gather(2, index), values.gather(2, index), (selected >= 0)[:, :, None], scaling
    )
