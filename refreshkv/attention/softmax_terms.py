"""Ordinary attention with attention sinks or a softcap. A mask (T, L) exists, but never all logits (B, H, T, L) at
once.

Shapes: `B` batch rows, `T` query positions, `L` key positions, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`,
`D` size of a key, `E` size of a value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from refreshkv.ops.naive import grouped_attention
from refreshkv.ops.state import SoftmaxTerms

LOGITS_AT_ONCE = 1 << 26
"""Logits of `capped_attention` that exist in float32 at the same time: 256 MiB."""

ALIGNMENT = 8
"""torch's fast attention kernels take heads whose size is a multiple of this."""


def attention_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, sinks: Tensor
) -> Tensor:
    """Attention with a further term exp(sink) in the denominator, by torch's own attention.

    The sinks become the logits of one more key, whose value is zero. For this each head gets G more dimensions. There a
    query is 1 in the dimension of its head within the group and else 0, the new key holds the group's sinks, and all
    other keys are 0.

    query (B, H, T, D); key (B, Hkv, L, D); value (B, Hkv, L, E); visible (B or 1, 1, T, L) bool; sinks (H,). Returns
    (B, H, T, E), differentiable in all but `visible`.
    """
    (batch, heads, queries, size), kv_heads = query.shape, key.shape[1]
    group = heads // kv_heads
    more = group + -(size + group) % ALIGNMENT
    own = torch.eye(group, more, dtype=query.dtype, device=query.device).repeat(kv_heads, 1)  # (H, G or more)
    query = torch.cat([query, own[None, :, None].expand(batch, -1, queries, -1)], dim=-1)
    logits = F.pad((sinks.to(query.dtype) / scaling).view(kv_heads, 1, group), (size, more - group))
    sink_key = logits.expand(batch, -1, -1, -1)
    key = torch.cat([sink_key, F.pad(key, (0, more))], dim=2)
    value = F.pad(value, (0, 0, 1, 0))
    mask = F.pad(visible, (1, 0), value=True)
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, terms: SoftmaxTerms
) -> Tensor:
    """Attention with a softcap, a chunk of queries at a time; the backward pass computes each chunk's logits again.

    Arguments and result as in `attention_with_sinks`; terms: the softcap, and sinks if the model has both.
    """
    chunk = max(1, LOGITS_AT_ONCE // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = []
    for queries, seen in zip(query.split(chunk, dim=2), visible.split(chunk, dim=2), strict=True):
        # a padded query attends to nothing, which would give nan: let it attend to everything; its output is not used
        seen = (seen | ~seen.any(dim=-1, keepdim=True)).expand(len(query), -1, -1, -1)
        arguments = (queries, key, value, seen, scaling, terms)
        if torch.is_grad_enabled() and visible.shape[2] > chunk:
            parts.append(checkpoint(grouped_attention, *arguments, use_reentrant=False))
        else:
            parts.append(grouped_attention(*arguments))
    return torch.cat(parts, dim=2)
