"""A block of drafts in a compiled model: one operator stores its keys and values and computes its attention, so that
the graph of the model does not break.

Shapes: `B` batch rows, `n` tokens of the block, `H` query heads, `Hkv` key/value heads, `D` head size, `L` columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv import ops
from refreshkv.ops.choice import CHOICE


@torch.library.custom_op("refreshkv::stored_block", mutates_args=("keys", "values", "codes", "scales"))
def stored_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    columns: Tensor,
    left_padding: Tensor,
    scaling: float,
) -> Tensor:
    """Stores the keys and values of a block of tokens, then computes the block's causal attention.

    Args:
        query: (B, H, n, D).
        key, value: (B, Hkv, n, D), of the block.
        keys, values: (B, Hkv, L, D), changed in place.
        codes, scales: of the score keys of 8 or 4 bits, changed in place; None with 16 bits.
        columns: (n,) int64, ascending: where the block's tokens stand.
        left_padding: (B,) int64.
        scaling: factor of the logits.

    Returns (B, n, H, D), without gradient.
    """
    for buffer, new in ((keys, key), (values, value)):
        buffer.index_copy_(2, columns, new)
    if codes is not None and scales is not None:
        ops.write_score_keys(key, codes, scales, columns[0])
    if CHOICE.takes_short_block(query, keys, values):
        output = ops.short_block(query, keys, values, left_padding, scaling, columns)
    else:
        column = torch.arange(keys.shape[2], device=keys.device)
        visible = (column <= columns[:, None]) & (column >= left_padding[:, None, None, None])
        output = F.scaled_dot_product_attention(query, keys, values, visible, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


@stored_block.register_fake
def _(query: Tensor, *args) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
