"""Causal attention of a few tokens behind many: a block of drafts, a rectified step, a short further turn.

The query heads of a key/value head and the block's tokens become the queries of one head, so that keys and values are
read once and not copied to all query heads. One mask says what each of them sees, padding included.

Shapes: `B` batch rows, `n` tokens of the block, `L` positions, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`,
`D` head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Those that take a mask and plan nothing: cuDNN would plan anew for every length."""


def short_block(query: Tensor, key: Tensor, value: Tensor, left_padding: Tensor | None, scaling: float) -> Tensor:
    """query (B, H, n, D): the last n of L positions; key, value (B, Hkv, L, D); left_padding (B,) int64 or None.

    Returns (B, H, n, D), without gradient.
    """
    kv_heads, count, columns = key.shape[1], query.shape[2], key.shape[2]
    column = torch.arange(columns, device=query.device)
    mask = column <= torch.arange(columns - count, columns, device=query.device)[:, None]  # [n, L]
    if left_padding is not None:
        mask = mask & (column >= left_padding[:, None, None])  # [B, n, L]
    mask = mask.view(-1, 1, count, columns).repeat(1, 1, query.shape[1] // kv_heads, 1)  # [B or 1, 1, G n, L]
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, Hkv, G n, D]
    with sdpa_kernel(BACKENDS, set_priority=True):
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return output.unflatten(2, (-1, count)).flatten(1, 2)
