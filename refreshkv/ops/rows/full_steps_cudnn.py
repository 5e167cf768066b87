"""The full steps of a uniform plan as dense attention, by cuDNN.

Where every decision step is full, the full steps after the prompt stand `S` apart, and the keys they see fall into
parts without holes. All of them see the whole prompt: a rectangle. The tokens after it are taken in S interleaved sets,
every S-th token each: step `i` sees the first `i + 1` tokens of every set, so each set is a causal square. Each part is
an attention of its own; the outputs are merged by their log-sum-exps, and backward every part gets the log-sum-exp of
the whole softmax.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `S` stride, `C` decision steps, `N = C - 1` full
steps after the prompt, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops.rows import cudnn
from refreshkv.ops.state import AttentionInputs, Plan
from refreshkv.ops.tiles import LOG2E, load_rows, padded_head

LN2 = math.log(2.0)
LOG2_E = tl.constexpr(LOG2E)

BLOCK = 16
"""Full steps of a program of `_merge`."""


def forward(inputs: AttentionInputs, plan: Plan, output: Tensor) -> Tensor:
    """Writes the full steps' positions after the prompt into `output`; returns all full steps' log-sum-exp.

    output (B, R, H, D): the other positions stay untouched. Returns (B, H, C) float32, in units of log 2.
    """
    query, key, value, scaling, _ = inputs
    prompt, stride = plan.prompt_length, plan.stride
    batch, heads, queries, head_dim = query.shape
    steps = (key.shape[2] - prompt) // stride
    rows = _every(query, prompt - 1 - (key.shape[2] - queries), stride)  # the first is the prompt's own
    rectangle = cudnn.attend(rows, key[:, :, :prompt], value[:, :, :prompt], False, scaling)
    squares = (_squares(tensor, prompt, stride, steps) for tensor in (key, value))
    square = cudnn.attend(_repeated(rows[:, :, 1:], stride), *squares, True, scaling)
    lse = torch.empty(batch, heads, steps + 1, dtype=torch.float32, device=query.device)
    lse[:, :, 0] = rectangle[1][:, :, 0] * LOG2E
    _merge[triton.cdiv(steps, BLOCK), heads, batch](
        *rectangle, *square, output, lse, *rectangle[0].stride()[:3], *rectangle[1].stride(),
        *square[0].stride()[:3], *square[1].stride(), *output.stride()[:3], steps, stride,
        D=head_dim, DP=padded_head(head_dim), BLOCK=BLOCK,
    )  # fmt: skip
    return lse


def backward(
    inputs: AttentionInputs, plan: Plan, lse: Tensor, output: Tensor, upstream: Tensor, query_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the full steps' positions of `query_grad` (B, H, R, D); returns the gradients of keys and values so far.

    lse: what `forward` returned; upstream (B, R, H, D): gradient of `output`. Returns two (B, Hkv, T, D) float32 sums,
    to which the partial steps are added.
    """
    query, key, value, scaling, _ = inputs
    prompt, stride = plan.prompt_length, plan.stride
    steps = lse.shape[2] - 1
    after = prompt + steps * stride
    first = stride - 1  # of the positions after the prompt, the first full one
    rows = _every(query, prompt + first - (key.shape[2] - query.shape[2]), stride)
    rows_output, rows_upstream = (_every(tensor.transpose(1, 2), first, stride) for tensor in (output, upstream))
    lse = lse[:, :, 1:] * LN2
    squares = (_squares(tensor, prompt, stride, steps) for tensor in (key, value))
    upstreams, queries, outputs, lses = (_repeated(t, stride) for t in (rows_upstream, rows, rows_output, lse))
    from_squares = cudnn.attend_backward(upstreams, queries, *squares, outputs, lses, True, scaling)
    query_sum = from_squares[0].unflatten(0, (-1, stride)).sum(1, dtype=torch.float32)
    gradients = (torch.empty_like(key, dtype=torch.float32), torch.empty_like(key, dtype=torch.float32))
    for gradient, part in zip(gradients, from_squares[1:], strict=True):
        gradient[:, :, prompt:after].unflatten(2, (steps, stride)).copy_(
            part.unflatten(0, (-1, stride)).permute(0, 2, 3, 1, 4)
        )
        gradient[:, :, after:] = 0
    for begin, end in cudnn.key_chunks(prompt):
        chunk = (key[:, :, begin:end], value[:, :, begin:end])
        from_chunk = cudnn.attend_backward(rows_upstream, rows, *chunk, rows_output, lse, False, scaling)
        query_sum += from_chunk[0]
        for gradient, part in zip(gradients, from_chunk[1:], strict=True):
            gradient[:, :, begin:end] = part
    query_grad[:, :, first::stride] = query_sum.to(query_grad.dtype)
    return gradients


def _every(tensor: Tensor, first: int, stride: int) -> Tensor:
    """Every `stride`-th position of (B, H, n, D) from `first` on: packed, positions before heads in memory."""
    return tensor[:, :, first::stride].transpose(1, 2).contiguous().transpose(1, 2)


def _squares(tensor: Tensor, prompt_length: int, stride: int, steps: int) -> Tensor:
    """The tokens after the prompt in `stride` interleaved sets: (B, Hkv, T, D) -> (B * S, Hkv, N, D)."""
    after = tensor[:, :, prompt_length : prompt_length + steps * stride]
    return after.unflatten(2, (steps, stride)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _repeated(tensor: Tensor, stride: int) -> Tensor:
    """(B, ...) -> (B * S, ...): each batch row S times."""
    return tensor.unsqueeze(1).expand(-1, stride, *tensor.shape[1:]).flatten(0, 1)


@triton.jit(do_not_specialize=["stride", "steps", "rectangle_lse_b", "rectangle_lse_h", "square_lse_b", "square_lse_h"])
def _merge(
    rectangle_ptr, rectangle_lse_ptr, square_ptr, square_lse_ptr, output_ptr, lse_ptr,
    rectangle_b, rectangle_h, rectangle_n, rectangle_lse_b, rectangle_lse_h, rectangle_lse_n,
    square_b, square_h, square_n, square_lse_b, square_lse_h, square_lse_n,
    output_b, output_t, output_h, steps, stride,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the softmaxes of each full step after the prompt, over the rectangle and over the S squares, into one."""
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    step = tile * BLOCK + tl.arange(0, BLOCK)
    exists = step < steps
    column = tl.arange(0, DP)
    wide = step.to(tl.int64)
    rectangle_lse = rectangle_lse_ptr + batch * rectangle_lse_b + head * rectangle_lse_h + (wide + 1) * rectangle_lse_n
    # [BLOCK]
    early = tl.load(rectangle_lse, mask=exists, other=0.0)
    square_lse = square_lse_ptr + batch * stride * square_lse_b + head * square_lse_h + wide * square_lse_n
    highest = early
    for part in range(stride):
        # [BLOCK]
        highest = tl.maximum(highest, tl.load(square_lse + part * square_lse_b, mask=exists, other=0.0))
    weight = tl.exp(early - highest)
    total = weight
    rectangle_row = rectangle_ptr + batch * rectangle_b + head * rectangle_h + (wide + 1) * rectangle_n
    # [BLOCK, DP]
    result = load_rows(rectangle_row, column, exists, D, DP, True).to(tl.float32) * weight[:, None]
    square_row = square_ptr + batch * stride * square_b + head * square_h + wide * square_n
    for part in range(stride):
        # [BLOCK], then [BLOCK, DP]
        weight = tl.exp(tl.load(square_lse + part * square_lse_b, mask=exists, other=0.0) - highest)
        total += weight
        result += load_rows(square_row + part * square_b, column, exists, D, DP, True).to(tl.float32) * weight[:, None]
    result = result / total[:, None]
    heads = tl.num_programs(1)
    lse_row = lse_ptr + (batch * heads + head) * (steps + 1) + wide + 1
    tl.store(lse_row, highest * LOG2_E + tl.log2(total), mask=exists)
    output_row = output_ptr + batch * output_b + ((wide + 1) * stride - 1) * output_t + head * output_h
    mask = exists[:, None] & (column < D)[None, :]
    tl.store(output_row[:, None] + column[None, :], result.to(output_ptr.dtype.element_ty), mask=mask)
