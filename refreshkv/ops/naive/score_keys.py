"""Score keys: a copy of the keys in 8 or 4 bits, by which selecting steps score, in plain PyTorch
(docs/specification.md, section 10.5).

Shapes: `D` head size; leading dimensions are free. What is stored is the definition: the codes and a float32 scale.
"""

import torch
from torch import Tensor

CODE_BITS = (8, 4)
"""Sizes of a stored code. With 16 bits the keys themselves are the score keys, and nothing is stored."""


def quantize(key: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes and the scale of each key: key (..., D) -> codes, scale (...) float32.

    codes of 8 bits: (..., D) int8. Of 4 bits: (..., D / 2) uint8; the low half of byte `d` holds the code of dimension
    `d`, its high half that of dimension `d + D / 2`, each plus 8.
    """
    top = 2 ** (bits - 1) - 1
    key = key.float()
    largest = key.abs().amax(dim=-1)
    scale = largest / torch.full_like(largest, top)  # by a number, torch multiplies by its reciprocal on a GPU
    codes = (key / scale.unsqueeze(-1)).round().clamp(-top, top)
    codes = codes.masked_fill(scale.unsqueeze(-1) == 0, 0.0).to(torch.int8)
    return (codes if bits == 8 else pack(codes)), scale


def empty_score_keys(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, all zero, for the score keys of 8 or 4 bits of a cache's keys (B, Hkv, L, D), or of their
    shape."""
    codes, scales = quantize(keys[:, :, :0], bits)
    shape = (*keys.shape[:3], codes.shape[-1])
    return codes.new_zeros(shape), scales.new_zeros(shape[:3])


def write_score_keys(key: Tensor, codes: Tensor, scales: Tensor, first: int | Tensor) -> None:
    """As `refreshkv.ops.write_score_keys`."""
    columns = first + torch.arange(key.shape[2], device=key.device)
    for buffer, new in zip(
        (codes, scales), quantize(key.detach(), 4 if codes.dtype == torch.uint8 else 8), strict=True
    ):
        buffer.index_copy_(2, columns, new)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The score keys that `quantize` stored: (..., D) float32."""
    codes = unpack(codes) if codes.dtype == torch.uint8 else codes
    return codes.float() * scale.unsqueeze(-1)


def score_keys_of(key: Tensor, bits: int) -> Tensor:
    """The score keys of the keys (..., D), as numbers: the keys themselves with 16 bits, else (..., D) float32."""
    return key if bits == 16 else dequantize(*quantize(key, bits))


def pack(codes: Tensor) -> Tensor:
    """Codes of -7 .. 7, (..., D) int8 -> (..., D / 2) uint8, two to a byte."""
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8) - 8
