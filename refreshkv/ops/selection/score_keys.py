"""Score keys on the GPU: how they are stored, and the Triton kernel that writes them for a whole prompt in one launch.

The definition is `refreshkv.ops.naive.score_keys`; codes and scales are equal to its, bit for bit.

Shapes: `B` batch rows, `T` tokens of a prompt, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Keys that a program of `_write_score_keys` quantises at once."""

ABOVE = tl.constexpr(8)
"""What codes of 4 bits are stored above their values, so that a half of a byte holds them."""

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a float32 below 2^22 it leaves no fraction, so adding and subtracting rounds half to even."""


def write_score_keys(key: Tensor, codes: Tensor, scales: Tensor, first: int | Tensor) -> None:
    """`refreshkv.ops.write_score_keys` in one launch."""
    key = key if key.stride(-1) == 1 else key.contiguous()
    batch, kv_heads, tokens, head_dim = key.shape
    bits = 4 if codes.dtype == torch.uint8 else 8
    number, pointer = (0, first) if isinstance(first, Tensor) else (first, None)
    with torch.cuda.device_of(key):
        _write_score_keys[triton.cdiv(tokens, BLOCK), batch * kv_heads](
            key, codes, scales, *key.stride()[:3], kv_heads, tokens, number, pointer, scales.shape[2],
            D=head_dim, DH=padded_half(head_dim), BITS=bits, PACKED=bits == 4, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def quantized(key: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The score keys of all known tokens: codes (B, Hkv, T, D) in the key's dtype, which holds them exactly, and scales
    (B, Hkv, T) float32.

    Args:
        key: (B, Hkv, T, D), in any layout whose last dimension is packed.
        bits: 8 or 4.
    """
    batch, kv_heads, tokens, head_dim = key.shape
    if head_dim % 2:
        raise ValueError(f"score keys need an even head size, not {head_dim}")
    codes = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    scales = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    _write_score_keys[triton.cdiv(tokens, BLOCK), batch * kv_heads](
        key, codes, scales, *key.stride()[:3], kv_heads, tokens, 0, None, tokens,
        D=head_dim, DH=padded_half(head_dim), BITS=bits, PACKED=False, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return codes, scales


def padded_half(head_dim: int) -> int:
    """Half the head size, rounded up to a power of two, at least 16: the width of a tile."""
    return max(16, triton.next_power_of_2(head_dim // 2))


@triton.jit
def quantize_halves(low, high, BITS: tl.constexpr):
    """The codes of keys, as whole float32 numbers, and their scales: low, high (N, DH) float32, the two halves of each
    key, padded by zeros -> two (N, DH), (N,)."""
    TOP: tl.constexpr = 2.0 ** (BITS - 1) - 1.0
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    scale = tl.div_rn(largest, tl.full(largest.shape, TOP, tl.float32))
    divisor = tl.where(scale > 0.0, scale, 1.0)[:, None]
    low = tl.div_rn(low, tl.broadcast_to(divisor, low.shape))
    high = tl.div_rn(high, tl.broadcast_to(divisor, high.shape))
    low = tl.minimum(tl.maximum((low + ROUND) - ROUND, -TOP), TOP)
    high = tl.minimum(tl.maximum((high + ROUND) - ROUND, -TOP), TOP)
    exists = (scale > 0.0)[:, None]
    return tl.where(exists, low, 0.0), tl.where(exists, high, 0.0), scale


@triton.jit
def store_codes(codes, token, column, mask, low, high, D: tl.constexpr, BITS: tl.constexpr):
    """Stores codes low, high (N, DH) of the tokens (N,) of one batch row and head; mask (N, DH)."""
    if BITS == 4:
        byte = (low + ABOVE).to(tl.int32) | ((high + ABOVE).to(tl.int32) << 4)
        tl.store(codes + token.to(tl.int64)[:, None] * (D // 2) + column[None, :], byte.to(tl.uint8), mask=mask)
    else:
        place = token.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(codes + place, low.to(codes.dtype.element_ty), mask=mask)
        tl.store(codes + place + D // 2, high.to(codes.dtype.element_ty), mask=mask)


@triton.jit
def _write_score_keys(
    key_ptr, code_ptr, scale_ptr, key_b, key_h, key_t, kv_heads, tokens, first, first_ptr, capacity,
    D: tl.constexpr, DH: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantises BLOCK keys of one batch row and key/value head. PACKED: two codes of 4 bits share a byte."""
    pair = tl.program_id(1)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    token, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DH)
    exists = token < tokens
    mask = exists[:, None] & (column < D // 2)[None, :]
    keys = key_ptr + batch * key_b + kv_head * key_h + token.to(tl.int64)[:, None] * key_t + column[None, :]
    # [BLOCK, DH] twice
    low = tl.load(keys, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(keys + D // 2, mask=mask, other=0.0).to(tl.float32)
    low, high, scale = quantize_halves(low, high, BITS)
    if first_ptr is not None:
        first = tl.load(first_ptr).to(tl.int32)
    row = pair.to(tl.int64) * capacity
    codes = code_ptr + row * (D // 2 if PACKED else D)
    store_codes(codes, first + token, column, mask, low, high, D, 4 if PACKED else 8)
    tl.store(scale_ptr + row + first + token, scale, mask=exists)


@triton.jit
def load_score_halves(codes, token, D: tl.constexpr, DH: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Loads the codes of tokens (N,) as numbers of type `dtype`, or with 16 bits the keys: two halves (N, DH), whose
    columns from D / 2 on are finite but have no meaning. All tokens must exist."""
    # [N, DH] twice
    if BITS == 4:
        byte = _load_half(codes + token[:, None] * (D // 2), D, DH, BITS)
        return _number(byte & 15, dtype), _number(byte >> 4, dtype)
    else:
        place = codes + token[:, None] * D
        return _load_half(place, D, DH, BITS).to(dtype), _load_half(place + D // 2, D, DH, BITS).to(dtype)


@triton.jit
def load_code_halves(codes, token, D: tl.constexpr, DH: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Loads the codes of tokens (N,) as int8, of 4 bits plus ABOVE: two halves (N, DH), as `load_score_halves` does.
    ASM: PTX instructions unpack four bytes at once."""
    # [N, DH] twice
    if BITS == 4:
        byte = _load_half(codes + token[:, None] * (D // 2), D, DH, BITS)
        if ASM:
            low = tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4
            )
            high = tl.inline_asm_elementwise(
                "{ .reg .b32 moved; shr.u32 moved, $1, 4; and.b32 $0, moved, 0x0F0F0F0F; }",
                "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
            return low, high
        else:
            return (byte & 15).to(tl.int8), (byte >> 4).to(tl.int8)
    else:
        place = codes + token[:, None] * D
        return _load_half(place, D, DH, BITS), _load_half(place + D // 2, D, DH, BITS)


@triton.jit
def _load_half(place, D: tl.constexpr, DH: tl.constexpr, BITS: tl.constexpr):
    """D / 2 numbers of each token, the first one at `place` (N, 1): (N, DH)."""
    # keys of 16 bits are read again, by the attention
    POLICY: tl.constexpr = "evict_first" if BITS < 16 else ""
    column = tl.arange(0, DH)
    if DH > D // 2:
        # the padding repeats a column, for a mask would be applied byte by byte; queries are 0 there
        column = tl.minimum(column, D // 2 - 1)
    return tl.load(place + column[None, :], eviction_policy=POLICY)


@triton.jit
def _number(code, dtype: tl.constexpr):
    """Codes 0 .. 15 (uint8) minus ABOVE. The code is put into the mantissa of a power of two: conversions are slow."""
    if dtype == tl.bfloat16:
        number = (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0  # 128 + code
    elif dtype == tl.float16:
        number = (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0  # 1024 + code
    else:
        number = code.to(dtype) - ABOVE
    return number.to(dtype)
