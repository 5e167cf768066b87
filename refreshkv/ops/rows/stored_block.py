"""Stores the keys and values of a block of tokens, then computes the block's causal attention: one operator, which does
not break a compiled graph.

Shapes: `B` batch rows, `n` tokens of the block, `H` query heads, `Hkv` key/value heads, `D` head size, `L` columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.ops import naive
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
    """`refreshkv.ops.stored_block` with flat arguments."""
    for buffer, new in ((keys, key), (values, value)):
        buffer.index_copy_(2, columns, new)
    if codes is not None and scales is not None:
        if CHOICE.uses_kernels(key):
            from refreshkv.ops.selection import score_keys as form  # imports Triton, which some machines lack
        else:
            form = naive
        form.write_score_keys(key, codes, scales, columns[0])
    if CHOICE.takes_short_block(query, keys, values):
        from refreshkv.ops.rows import short_block  # as above

        output = short_block.short_block(query, keys, values, left_padding, scaling, columns)
    else:
        column = torch.arange(keys.shape[2], device=keys.device)
        visible = (column <= columns[:, None]) & (column >= left_padding[:, None, None, None])
        output = F.scaled_dot_product_attention(query, keys, values, visible, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


@stored_block.register_fake
def _(query: Tensor, *args) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
