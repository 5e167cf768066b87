"""Block sizes and precisions that the kernels share."""

import math

import torch
import triton
from torch import Tensor

LOG2E = math.log2(math.e)

TILES = {
    "full_forward": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "full_backward_query": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "full_backward_key_value": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "partial_forward": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "partial_backward": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    "partial_backward_query": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    "partial_backward_key_value": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    "scores": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    "lse": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
}
"""Tiles of each kernel for 16-bit inputs and heads up to 128; `block_sizes` shrinks them where they would not fit."""


def block_sizes(kernel: str, query: Tensor) -> dict[str, int]:
    """The tiles of a kernel: smaller ones for float32 and for wide heads, whose tiles fill the shared memory."""
    sizes = dict(TILES[kernel])
    if query.element_size() * padded_head(query.shape[-1]) > 256:
        sizes |= {"BLOCK_M": min(sizes["BLOCK_M"], 32), "BLOCK_N": min(sizes["BLOCK_N"], 32), "num_stages": 1}
        sizes["num_warps"] = 4
    return sizes


def padded_head(head_dim: int) -> int:
    """The head size as the kernels' tiles have it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def precision(query: Tensor) -> str:
    """How float32 tiles are multiplied: exactly, never in tf32."""
    return "ieee" if query.dtype == torch.float32 else "tf32"
