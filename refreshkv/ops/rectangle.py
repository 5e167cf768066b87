"""The rectangle of full steps after the prompt by the prompt's keys, which every one of them sees whole.

It is plain attention without a mask, and most of the full steps' work, so the fastest kernel there is takes it:
cuDNN's, through torch's own operators, because `scaled_dot_product_attention` neither returns the log-sum-exp nor
takes one that counts keys elsewhere.

Shapes: `B` batch rows, `C` full steps, `P` prompt length, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

import math

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

LN2 = math.log(2.0)


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether cuDNN takes these tensors, (B, H, n, D) and twice (B, Hkv, n, D)."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, False, True))


def rows_of(tensor: Tensor, first: int, stride: int) -> Tensor:
    """Every `stride`-th position from `first` on, of (B, H, n, D): packed, positions before heads in memory."""
    return tensor[:, :, first::stride].transpose(1, 2).contiguous().transpose(1, 2)


def forward(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """query (B, H, C, D), key and value (B, Hkv, P, D) -> output (B, H, C, D) and log-sum-exp (B, H, C), float32 in
    units of log 2."""
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, False, False, scale=scaling
    )
    return output, lse.squeeze(-1) / LN2


def backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rectangle's share of the gradients of query, key and value, in their dtype.

    output and upstream (B, H, C, D), lse (B, H, C) in units of log 2: of the whole softmax, keys elsewhere included.
    """
    unused = torch.empty(0, dtype=torch.int64, device=query.device)  # the dropout's seed and offset
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        upstream, query, key, value, output, (lse * LN2).unsqueeze(-1).contiguous(), unused, unused, None,
        None, None, query.shape[2], key.shape[2], 0.0, False, scale=scaling,
    )  # fmt: skip
