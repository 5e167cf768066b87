"""Attention of a prompt in chunks, in plain PyTorch (docs/specification.md, section 12).

Shapes: `B` batch rows, `P` prompt length, `H` query heads, `Hkv` key/value heads, `D` head size. Positions are columns,
left padding included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.state import PLAIN_SOFTMAX, SoftmaxTerms


def chunked_prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Sequence[Sequence[int]],
    left_padding: Tensor,
    sink_tokens: int,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Causal attention in which a chunk before the last sees itself and the first `sink_tokens` tokens of its row only.

    query (B, H, P, D); key (B, Hkv, P, D); value (B, Hkv, P, E); ends: for each batch row the ends of its chunks in
    columns, ascending, the last one P; left_padding (B,) int64. Returns (B, P, H, E), of which padded columns mean
    nothing.
    """
    visible = chunk_mask(ends, left_padding, sink_tokens)
    return grouped_attention(query, key, value, visible, scaling, terms).transpose(1, 2)


def chunk_mask(ends: Sequence[Sequence[int]], left_padding: Tensor, sink_tokens: int) -> Tensor:
    """Which columns each column of a prompt sees: (B, 1, P, P) bool; a padded column sees itself."""
    length, device = ends[0][-1], left_padding.device
    column = torch.arange(length, device=device)
    rows = []
    for own_ends, padding in zip(ends, left_padding.tolist(), strict=True):
        number = torch.bucketize(column, torch.tensor(own_ends, device=device), right=True)  # of each column's chunk
        is_known = (number[:, None] == number) | (number[:, None] == len(own_ends) - 1)
        is_sink = column < padding + sink_tokens
        visible = (is_known | is_sink) & (column <= column[:, None]) & (column >= padding)
        rows.append(visible | torch.eye(length, dtype=torch.bool, device=device))
    return torch.stack(rows).unsqueeze(1)
