"""Softmax attention over a set of visible keys, in plain PyTorch."""

import torch
from torch import Tensor


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Softmax attention over the visible keys, without copying keys to all query heads.

    query (B, H, R, D); key, value (B, Hkv, L, D); visible (B, 1 or Hkv, R, L) bool, at least one key in each row.
    Returns (B, H, R, D) in the query's dtype; logits and softmax are at least float32.
    """
    kv_heads, rows = key.shape[1], query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3).to(wide)
    logits = (grouped @ key.to(wide).transpose(-1, -2) * scaling).unflatten(2, (-1, rows))
    probabilities = logits.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(dim=-1)
    output = probabilities.flatten(2, 3) @ value.to(wide)
    return output.unflatten(2, (-1, rows)).flatten(1, 2).to(query.dtype)


def attend_to_positions(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float) -> Tensor:
    """Attention of query (B, H, 1, D) to the positions (B, Hkv, W), -1 for none, of key and value (B, Hkv, L, D):
    (B, H, 1, D). Only these keys and values are read."""
    index = positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])
    return grouped_attention(query, key.gather(2, index), value.gather(2, index), (positions >= 0)[:, :, None], scaling)
