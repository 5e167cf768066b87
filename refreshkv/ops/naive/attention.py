"""Softmax attention over a set of visible keys, in plain PyTorch."""

import torch
from torch import Tensor

from refreshkv.ops.state import PLAIN_SOFTMAX, SoftmaxTerms


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Softmax attention over the visible keys, without copying keys to all query heads.

    query (B, H, R, D); key (B, Hkv, L, D); value (B, Hkv, L, E); visible (B, 1 or Hkv, R, L) bool, at least one key in
    each row. Returns (B, H, R, E) in the query's dtype; logits and softmax are at least float32.
    """
    kv_heads, rows = key.shape[1], query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3).to(wide)
    logits = (grouped @ key.to(wide).transpose(-1, -2) * scaling).unflatten(2, (-1, rows))
    logits = terms.cap(logits).masked_fill(~visible.unsqueeze(2), -torch.inf)
    output = terms.softmax(logits, kv_heads).flatten(2, 3) @ value.to(wide)
    return output.unflatten(2, (-1, rows)).flatten(1, 2).to(query.dtype)


def attend_to_positions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Attention of query (B, H, 1, D) to the positions (B, Hkv, W), -1 for none, of key (B, Hkv, L, D) and value
    (B, Hkv, L, E): (B, H, 1, E). Only these keys and values are read."""
    keys, values = (
        tensor.gather(2, positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1]))
        for tensor in (key, value)
    )
    return grouped_attention(query, keys, values, (positions >= 0)[:, :, None], scaling, terms)
