"""The full steps of a uniform schedule as dense attention, by the fastest kernel there is: cuDNN's.

Where every check is full, the full steps after the prompt stand `S` apart, and what they see falls into parts without
holes. All see the whole prompt: a rectangle. Of the tokens after it, take every S-th one: step `i` sees the first
`i + 1` of them, whichever of the S such sets it is: S causal squares. Each part is attention of its own; the outputs
are merged by their log-sum-exps, and backward every part is given those of the whole softmax.

torch's own operators are called because `scaled_dot_product_attention` neither returns the log-sum-exp nor takes one
that counts keys elsewhere.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `S` stride, `C` checks, `N = C - 1` full steps
after the prompt, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from refreshkv.ops.state import AttentionInputs, Plan
from refreshkv.ops.tiles import LOG2E, load_rows, padded_head

LN2 = math.log(2.0)

FEWEST_QUERIES = 256
"""Queries of a block from which on cuDNN's tiles fill a GPU."""

TILE = 128
"""Rows that cuDNN takes at once: up to a multiple of them, more rows cost nothing."""


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether cuDNN takes these tensors, (B, H, Q, D) and twice (B, Hkv, T, D)."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, True))


def takes_full_steps(query: Tensor, key: Tensor, value: Tensor, prompt_length: int, stride: int) -> bool:
    """Whether the full steps of query (B, H, Q, D), key and value (B, Hkv, T, D) can go this way."""
    several = (key.shape[2] - prompt_length) // stride > 1  # cuDNN refuses a square of one
    return several and usable(query, key, value)


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
    """What these keys give to the gradients of query, key and value; output and lse may count other keys as well."""
    unused = torch.empty(0, dtype=torch.int64, device=query.device)  # the dropout's seed and offset
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        upstream, query, key, value, output, lse.unsqueeze(-1).contiguous(), unused, unused, None,
        None, None, query.shape[2], key.shape[2], 0.0, causal, scale=scaling,
    )  # fmt: skip


def takes_block(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `block` can take these and is the fastest way. It has no gradient."""
    graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return query.shape[2] >= FEWEST_QUERIES and not graded and usable(query, key, value)


def block(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last n of L positions, a prompt or a block of it: query (B, H, n, D), key and value
    (B, Hkv, L, D) -> (B, H, n, D).

    As a rectangle and a causal square, for torch's own way to say so leaves cuDNN out. Both have rounded sizes, for
    lengths of prompts seldom come twice and cuDNN makes a plan for each: zeros behind the queries, whose rows nobody
    reads; and the keys before them that do not fill the rectangle go to the square, with as many zeros for queries.
    """
    count, before = query.shape[2], key.shape[2] - query.shape[2]
    early = before // _step(before) * _step(before)
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


def _step(length: int) -> int:
    """Lengths about as long are rounded to multiples of this: an eighth to a sixteenth of them, and whole tiles."""
    return max(TILE, 2 ** max(0, length.bit_length() - 4))


def _rounded(length: int) -> int:
    return -(-length // _step(length)) * _step(length)


def _padded(tensor: Tensor, front: int, length: int) -> Tensor:
    """(B, H, n, D) with zeros in front and behind: (B, H, length, D), positions before heads in memory."""
    count = tensor.shape[2]
    if count == length:
        return tensor
    wide = tensor.new_zeros(tensor.shape[0], length, tensor.shape[1], tensor.shape[3]).transpose(1, 2)
    wide[:, :, front : front + count] = tensor
    return wide


def forward(inputs: AttentionInputs, plan: Plan, output: Tensor) -> Tensor:
    """Writes the full steps' positions after the prompt into `output`; returns all full steps' log-sum-exp.

    output (B, R, H, D): the other positions stay untouched. Returns (B, H, C) float32, in units of log 2.
    """
    query, key, value, scaling = inputs
    prompt_length, stride = plan.prompt_length, plan.stride
    batch, heads, queries, head_dim = query.shape
    steps = (key.shape[2] - prompt_length) // stride
    rows = _every(query, prompt_length - 1 - (key.shape[2] - queries), stride)  # the first is the prompt's own
    before = attend(rows, key[:, :, :prompt_length], value[:, :, :prompt_length], False, scaling)
    squares = (_squares(tensor, prompt_length, stride, steps) for tensor in (key, value))
    since = attend(_repeated(rows[:, :, 1:], stride), *squares, True, scaling)
    lse = torch.empty(batch, heads, steps + 1, dtype=torch.float32, device=query.device)
    lse[:, :, 0] = before[1][:, :, 0] * LOG2E
    _merge[triton.cdiv(steps, 16), heads, batch](
        *before, *since, output, lse, *before[0].stride()[:3], *before[1].stride(),
        *since[0].stride()[:3], *since[1].stride(), *output.stride()[:3], steps, stride,
        D=head_dim, DP=padded_head(head_dim), BLOCK=16,
    )  # fmt: skip
    return lse


def backward(
    inputs: AttentionInputs, plan: Plan, lse: Tensor, output: Tensor, upstream: Tensor, query_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the full steps' positions of `query_grad` (B, H, R, D); returns the gradients of keys and values so far.

    lse: what `forward` returned; upstream (B, R, H, D): gradient of `output`. Returns two (B, Hkv, T, D) float32 sums,
    to which the partial rows are added.
    """
    query, key, value, scaling = inputs
    prompt_length, stride = plan.prompt_length, plan.stride
    steps = lse.shape[2] - 1
    after = prompt_length + steps * stride
    first = stride - 1  # of the rows after the prompt, the first full one
    rows = _every(query, prompt_length + first - (key.shape[2] - query.shape[2]), stride)
    rows_output, rows_upstream = (_every(tensor.transpose(1, 2), first, stride) for tensor in (output, upstream))
    lse = lse[:, :, 1:] * LN2
    squares = (_squares(tensor, prompt_length, stride, steps) for tensor in (key, value))
    upstreams, queries, outputs, lses = (_repeated(t, stride) for t in (rows_upstream, rows, rows_output, lse))
    since = attend_backward(upstreams, queries, *squares, outputs, lses, True, scaling)
    query_sum = since[0].unflatten(0, (-1, stride)).sum(1, dtype=torch.float32)
    gradients = (torch.empty_like(key, dtype=torch.float32), torch.empty_like(key, dtype=torch.float32))
    for gradient, part in zip(gradients, since[1:], strict=True):
        gradient[:, :, prompt_length:after].unflatten(2, (steps, stride)).copy_(
            part.unflatten(0, (-1, stride)).permute(0, 2, 3, 1, 4)
        )
        gradient[:, :, after:] = 0
    for begin, end in _pieces(prompt_length):
        piece = (key[:, :, begin:end], value[:, :, begin:end])
        before = attend_backward(rows_upstream, rows, *piece, rows_output, lse, False, scaling)
        query_sum += before[0]
        for gradient, part in zip(gradients, before[1:], strict=True):
            gradient[:, :, begin:end] = part
    query_grad[:, :, first::stride] = query_sum.to(query_grad.dtype)
    return gradients


def _pieces(keys: int) -> list[tuple[int, int]]:
    """Parts of so many keys whose gradients cuDNN gets right. It works on 128 keys at a time; where 64 are left over,
    it scores the 64 beyond them 0, which overflows for queries whose scores all lie below -88."""
    if keys % 128 != 64:
        return [(0, keys)]
    return [(0, keys - 32), (keys - 32, keys)]


def _every(tensor: Tensor, first: int, stride: int) -> Tensor:
    """Every `stride`-th position of (B, H, n, D) from `first` on: packed, positions before heads in memory."""
    return tensor[:, :, first::stride].transpose(1, 2).contiguous().transpose(1, 2)


def _squares(tensor: Tensor, prompt_length: int, stride: int, steps: int) -> Tensor:
    """The tokens after the prompt in `stride` interleaved sets: (B, Hkv, T, D) -> (B * S, Hkv, N, D)."""
    since = tensor[:, :, prompt_length : prompt_length + steps * stride]
    return since.unflatten(2, (steps, stride)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _repeated(tensor: Tensor, stride: int) -> Tensor:
    """(B, ...) -> (B * S, ...), the same S times."""
    return tensor.unsqueeze(1).expand(-1, stride, *tensor.shape[1:]).flatten(0, 1)


@triton.jit(do_not_specialize=["stride", "steps", "before_lse_b", "before_lse_h", "since_lse_b", "since_lse_h"])
def _merge(
    before_ptr, before_lse_ptr, since_ptr, since_lse_ptr, output_ptr, lse_ptr,
    before_b, before_h, before_n, before_lse_b, before_lse_h, before_lse_n,
    since_b, since_h, since_n, since_lse_b, since_lse_h, since_lse_n, output_b, output_t, output_h, steps, stride,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each full step after the prompt: the softmax over all its keys, from those over the parts."""
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    step = tile * BLOCK + tl.arange(0, BLOCK)
    exists = step < steps
    column = tl.arange(0, DP)
    wide = step.to(tl.int64)
    before_lse = before_lse_ptr + batch * before_lse_b + head * before_lse_h + (wide + 1) * before_lse_n
    early = tl.load(before_lse, mask=exists, other=0.0)
    since_lses = since_lse_ptr + batch * stride * since_lse_b + head * since_lse_h + wide * since_lse_n
    highest = early
    for part in range(stride):
        highest = tl.maximum(highest, tl.load(since_lses + part * since_lse_b, mask=exists, other=0.0))
    weight = tl.exp(early - highest)
    total = weight
    before_row = before_ptr + batch * before_b + head * before_h + (wide + 1) * before_n
    result = load_rows(before_row, column, exists, D, DP, True).to(tl.float32) * weight[:, None]
    since_rows = since_ptr + batch * stride * since_b + head * since_h + wide * since_n
    for part in range(stride):
        weight = tl.exp(tl.load(since_lses + part * since_lse_b, mask=exists, other=0.0) - highest)
        total += weight
        result += load_rows(since_rows + part * since_b, column, exists, D, DP, True).to(tl.float32) * weight[:, None]
    result = result / total[:, None]
    heads = tl.num_programs(1)
    lse_row = lse_ptr + (batch * heads + head) * (steps + 1) + wide + 1
    tl.store(lse_row, highest * 1.4426950408889634 + tl.log2(total), mask=exists)
    output_row = output_ptr + batch * output_b + ((wide + 1) * stride - 1) * output_t + head * output_h
    mask = exists[:, None] & (column < D)[None, :]
    tl.store(output_row[:, None] + column[None, :], result.to(output_ptr.dtype.element_ty), mask=mask)
