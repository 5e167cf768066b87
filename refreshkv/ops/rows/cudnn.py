"""cuDNN's attention: the call itself, its backward pass, and a prompt block computed by it.

torch's own operators are called because `scaled_dot_product_attention` neither returns the log-sum-exp nor takes one
that counts further keys.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `n` queries, `m` keys.
"""

import torch
from torch import Tensor

TILE = 128
"""Rows of queries or keys that cuDNN takes at once: up to a multiple of them, more rows cost nothing."""


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """query (B, H, n, D), key and value (B, Hkv, m, D) -> output (B, H, n, D), log-sum-exp (B, H, n) float32."""
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scaling
    )
    return output, lse.squeeze(-1)


def attend_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value through these keys alone.

    upstream (B, H, n, D): gradient of the output; output and lse: of a softmax over these keys and perhaps others.
    """
    unused = torch.empty(0, dtype=torch.int64, device=query.device)  # the dropout's seed and offset
    tensors = (upstream, query, key, value, output, lse.unsqueeze(-1).contiguous(), unused, unused, None)
    settings = (None, None, query.shape[2], key.shape[2], 0.0, causal)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(*tensors, *settings, scale=scaling)


def key_chunks(keys: int) -> list[tuple[int, int]]:
    """Chunks (first, end) of so many keys for which `attend_backward` is right. cuDNN works on 128 keys at a time;
    where 64 are left over it scores the 64 beyond them 0, which overflows for queries whose scores all lie below
    -88."""
    if keys % 128 != 64:
        return [(0, keys)]
    return [(0, keys - 32), (keys - 32, keys)]


def prompt_block(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last n of L positions, a prompt or a block of it, without gradient: query (B, H, n, D),
    key and value (B, Hkv, L, D) -> (B, H, n, D).

    The block is a rectangle of earlier keys and a causal square, because torch's own way to say "bottom-right causal"
    leaves cuDNN out. Both get rounded sizes, because prompt lengths seldom recur and cuDNN builds a plan for each:
    zeros pad the queries, and their rows are dropped; the earlier keys that do not fill the rectangle go to the
    square, with as many zeros for queries.
    """
    count, before = query.shape[2], key.shape[2] - query.shape[2]
    early = before // _rounding(before) * _rounding(before)
    front = before - early
    side = _rounded(front + count)
    square = (
        _padded(tensor, first, side)
        for tensor, first in ((query, front), (key[:, :, early:], 0), (value[:, :, early:], 0))
    )
    output, lse = (part[:, :, front : front + count] for part in attend(*square, True, scaling))
    if early == 0:
        return output
    wide = _padded(query, 0, _rounded(count))
    rectangle = attend(wide, key[:, :, :early], value[:, :, :early], False, scaling)
    early_output, early_lse = (part[:, :, :count] for part in rectangle)
    share = torch.sigmoid(lse - early_lse).unsqueeze(-1)
    return torch.lerp(early_output.float(), output.float(), share).to(query.dtype)


def _rounding(length: int) -> int:
    """What a length is rounded to multiples of: an eighth to a sixteenth of it, and whole tiles."""
    return max(TILE, 2 ** max(0, length.bit_length() - 4))


def _rounded(length: int) -> int:
    return -(-length // _rounding(length)) * _rounding(length)


def _padded(tensor: Tensor, front: int, length: int) -> Tensor:
    """(B, H, n, D) with zeros in front and behind: (B, H, length, D), positions before heads in memory."""
    count = tensor.shape[2]
    if count == length:
        return tensor
    wide = tensor.new_zeros(tensor.shape[0], length, tensor.shape[1], tensor.shape[3]).transpose(1, 2)
    wide[:, :, front : front + count] = tensor
    return wide
