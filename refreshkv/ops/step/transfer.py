"""Triton kernels that copy tokens between host and device. Pinned host memory is read and written in place, over the
bus, without a copy in between and without waiting for the host.

Shapes: `B` batch rows, `Hkv` key/value heads, `L` tokens, `D` head size, `W` slots of a selection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16
"""Tokens that a program copies."""

LARGEST_MOVE = 8192
"""Numbers that a program of `_move` holds."""


@triton.jit(do_not_specialize=["count", "source_first", "target_first"])
def _copy(
    source_ptr, target_ptr, source_b, source_h, source_t, target_b, target_h, target_t,
    source_first, target_first, count,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK of `count` tokens of one batch row and head."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, DP)
    mask = (token < count)[:, None] & (column < D)[None, :]
    source = source_ptr + batch * source_b + head * source_h + (source_first + token) * source_t
    target = target_ptr + batch * target_b + head * target_h + (target_first + token) * target_t
    # [BLOCK, DP]
    tl.store(target[:, None] + column[None, :], tl.load(source[:, None] + column[None, :], mask=mask), mask=mask)


@triton.jit
def _gather(
    source_ptr, index_ptr, wanted_ptr, target_ptr, source_b, source_h, source_t, target_b, target_h, target_t, width,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK of `width` chosen tokens of one batch row and head."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if tl.load(wanted_ptr + batch) == 0:
        return
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = index_ptr + (batch * tl.num_programs(1) + head) * width + slot
    # [BLOCK]
    token = tl.load(index, mask=slot < width, other=-1).to(tl.int64)
    column = tl.arange(0, DP)
    mask = (token >= 0)[:, None] & (column < D)[None, :]
    source = source_ptr + batch * source_b + head * source_h + token * source_t
    target = target_ptr + batch * target_b + head * target_h + slot.to(tl.int64) * target_t
    # [BLOCK, DP]
    tl.store(target[:, None] + column[None, :], tl.load(source[:, None] + column[None, :], mask=mask), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _move(
    buffer_ptr, source_ptr, target_ptr, buffer_b, buffer_h, buffer_t, count,
    D: tl.constexpr, DC: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """DC numbers of all `count` tokens of one batch row and head."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    number, column = tl.arange(0, MP), tl.program_id(0) * DC + tl.arange(0, DC)
    exists = number < count
    # [MP] twice
    source = tl.load(source_ptr + batch * count + number, mask=exists, other=0)
    target = tl.load(target_ptr + batch * count + number, mask=exists, other=0)
    mask = exists[:, None] & (column < D)[None, :]
    buffer = buffer_ptr + batch * buffer_b + head * buffer_h + column[None, :]
    # [MP, DC]
    content = tl.load(buffer + source[:, None] * buffer_t, mask=mask)
    tl.debug_barrier()  # other warps may write what this one reads
    tl.store(buffer + target[:, None] * buffer_t, content, mask=mask)


def copy_tokens(source: Tensor, target: Tensor, source_first: int, target_first: int, count: int) -> None:
    """As `refreshkv.ops.copy_tokens`."""
    batch, kv_heads, _, head_dim = source.shape
    if count == 0:
        return
    source = source if source.stride(-1) == 1 else source.contiguous()
    with torch.cuda.device_of(source if source.is_cuda else target):
        _copy[triton.cdiv(count, BLOCK), kv_heads, batch](
            source, target, *source.stride()[:3], *target.stride()[:3], source_first, target_first, count,
            D=head_dim, DP=triton.next_power_of_2(head_dim), BLOCK=BLOCK,
        )  # fmt: skip


def gather_tokens(source: Tensor, index: Tensor, wanted: Tensor, target: Tensor) -> None:
    """As `refreshkv.ops.gather_tokens`."""
    batch, kv_heads, width = index.shape
    source = source if source.stride(-1) == 1 else source.contiguous()
    head_dim = source.shape[-1]
    with torch.cuda.device_of(index):
        _gather[triton.cdiv(width, BLOCK), kv_heads, batch](
            source, index, wanted, target, *source.stride()[:3], *target.stride()[:3], width,
            D=head_dim, DP=triton.next_power_of_2(head_dim), BLOCK=BLOCK,
        )  # fmt: skip


def move_tokens(buffer: Tensor, source: Tensor, target: Tensor) -> None:
    """As `refreshkv.ops.move_tokens`, for one buffer (B, Hkv, L, D)."""
    batch, kv_heads, _, size = buffer.shape
    count = source.shape[1]
    rows = triton.next_power_of_2(count)
    columns = min(triton.next_power_of_2(size), max(4, min(32, LARGEST_MOVE // rows)))
    with torch.cuda.device_of(buffer):
        _move[triton.cdiv(size, columns), kv_heads, batch](
            buffer, source.contiguous(), target.contiguous(), *buffer.stride()[:3], count, D=size, DC=columns, MP=rows
        )
