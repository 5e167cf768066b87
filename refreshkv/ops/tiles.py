"""What the kernels share: tile sizes, precision, constants, and one tile's part of a softmax and of its gradients.

Shapes: M rows (pairs of position and query head of a group) by N keys; `D` head size, DP the head size padded to a
power of two; a head is PARTS tiles of WIDTH columns where a whole one would not fit the registers.
"""

# Triton does not declare that tl.static_range is iterable.
# pyright: reportGeneralTypeIssues=false

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.ops import state

LOG2E = math.log2(math.e)

LOG2_OF_E = tl.constexpr(LOG2E)
"""The same inside kernels."""

LAST_FULL = tl.constexpr(state.LAST_FULL)
BUDGET = tl.constexpr(state.BUDGET)
PADDING = tl.constexpr(state.PADDING)
PROMPT_LENGTH = tl.constexpr(state.PROMPT_LENGTH)
ROW_COLUMNS = tl.constexpr(4)
"""Columns of a `row_state` (B, 4), and how many there are."""

SAME_IN_ALL_THREADS = {"enable_fp_fusion": False}
"""Compiler options of the decoding kernels that rank. Where threads add up shares of a sum, each would fuse its own
product into the addition and get another last bit; then positions with the same score, as pooling makes them, would no
longer tie."""

TILES = {
    "full_forward": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "full_backward_query": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "full_backward_key_value": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "partial_forward": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
    "partial_backward_64": {"BLOCK_M": 64, "BLOCK_N": 64, "WIDTH": 32, "num_warps": 4, "num_stages": 3},
    "partial_backward_128": {"BLOCK_M": 128, "BLOCK_N": 64, "WIDTH": 64, "num_warps": 8, "num_stages": 2},
    "partial_backward_256": {"BLOCK_M": 256, "BLOCK_N": 64, "WIDTH": 128, "num_warps": 8, "num_stages": 2},
    "scores": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    "lse": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
}
"""Tiles of each kernel for 16-bit inputs and heads up to 128; `block_sizes` shrinks them where they would not fit.

BLOCK_M rows by BLOCK_N keys; WIDTH columns of a head at once.
"""

MANY_PROGRAMS = 512
"""About as many programs as fill a GPU."""

SHARED_MEMORY = {"partial_backward_128": 147456, "partial_backward_256": 229376}
"""Bytes of shared memory that the largest tiles need, more than some GPUs have."""

HOPPER, BLACKWELL = 9, 10
"""The major compute capabilities of H100 and H200, and of B200. A B200's tensor cores have a memory of their own, in
which the largest tiles do not fit under every version of Triton."""


def on_its_device(operation: Callable) -> Callable:
    """Makes an operation launch its kernels on the GPU of its first tensor.

    Triton launches on the current GPU, which transformers does not set for models that are spread over several.
    """

    @wraps(operation)
    def launched(tensor: Tensor, *args, **kwargs):
        with torch.cuda.device_of(tensor):
            return operation(tensor, *args, **kwargs)

    return launched


def fits(kernel: str, device: torch.device) -> bool:
    """True if the tiles of a kernel in `SHARED_MEMORY` fit the device."""
    if device.type != "cuda":
        return True
    gpu = torch.cuda.get_device_properties(device)
    return gpu.major != BLACKWELL and SHARED_MEMORY[kernel] <= gpu.shared_memory_per_block_optin


def block_sizes(kernel: str, query: Tensor) -> dict[str, int]:
    """The tiles of a kernel, smaller for float32 and for wide heads, which would not fit the shared memory."""
    sizes = dict(TILES[kernel])
    if most := most_at_once(query):
        sizes |= {"BLOCK_M": min(sizes["BLOCK_M"], most), "BLOCK_N": min(sizes["BLOCK_N"], most)}
        sizes |= {"num_stages": 1, "num_warps": 4}
    if "WIDTH" in sizes:
        sizes["WIDTH"] = min(sizes["WIDTH"], padded_head(query.shape[-1]))
    return sizes


def most_at_once(query: Tensor) -> int | None:
    """Most rows or keys of a tile where a head takes more than 256 bytes, as float32 and wide heads do; else None."""
    head = query.element_size() * padded_head(query.shape[-1])
    if head <= 256:
        return None
    return 32 if head <= 512 else 16


PARTIAL_REGISTERS = 128
"""Most registers of a thread of the forward kernels of partial steps on Hopper GPUs, for 16-bit inputs and heads of 65
to 128.

Four programs then share the 65536 registers of a multiprocessor. Without a limit ptxas takes 150 to 190, another number
after each small change; two or three programs then take 2 to 36 % longer.
"""


def register_limit(dtype: torch.dtype, head_dim: int, device: torch.device) -> dict[str, int]:
    """The compiler option of a forward kernel of partial steps that keeps to `PARTIAL_REGISTERS`.

    Other tiles have none: narrower ones take fewer by themselves, but up to the limit if there is one; those of float32
    and of wider heads would spill.
    """
    limited = dtype.itemsize == 2 and padded_head(head_dim) == 128 and device.type == "cuda"
    limited = limited and torch.version.hip is None  # some AMD GPUs have major version 9, and no such option
    if limited and torch.cuda.get_device_capability(device)[0] == HOPPER:
        return {"maxnreg": PARTIAL_REGISTERS}
    return {}


def padded_head(head_dim: int) -> int:
    """The head size rounded up to a power of two, at least 16: the width of a tile."""
    return max(16, triton.next_power_of_2(head_dim))


def padded_splits(splits: int) -> int:
    """The number of splits of a batch row rounded up to a power of two, at least 2: the size of a tile."""
    return max(2, triton.next_power_of_2(splits))


def precision(query: Tensor) -> str:
    """The precision of `tl.dot`: float32 tiles are multiplied exactly, never in tf32."""
    return "ieee" if query.dtype == torch.float32 else "tf32"


def index_type(*tensors: Tensor) -> tl.dtype:
    """The integers that address a token within one head of (B, Hkv, T, D) tensors: 32 bits, which cost less, if they
    suffice."""
    farthest = max(tensor.shape[2] * tensor.stride(2) for tensor in tensors)
    return tl.int32 if farthest < 2**31 else tl.int64


def kernel_terms(terms: state.SoftmaxTerms) -> dict[str, Any]:
    """The arguments `sink_ptr` and `CAP` of a kernel that applies both terms. A term that the model does not have is
    None, a constant of the compiler: the kernel is then that of the ordinary softmax."""
    return {"sink_ptr": sinks_of(terms), "CAP": cap_of(terms)}


def sinks_of(terms: state.SoftmaxTerms) -> Tensor | None:
    """The argument `sink_ptr` of a kernel: the sinks (H,), or None."""
    return None if terms.sinks is None else terms.sinks.contiguous()


def cap_of(terms: state.SoftmaxTerms) -> float | None:
    """The argument `CAP` of a kernel: the softcap in units of log 2, or None."""
    return None if terms.softcap is None else terms.softcap * LOG2E


@triton.jit
def capped(logits, CAP: tl.constexpr):
    """CAP * tanh(logits / CAP) of logits of any shape, all in units of log 2; the logits themselves if CAP is None."""
    if CAP is not None:
        # tanh(y) = 1 - 2 / (1 + exp(2 y)), right at both ends, where exp is 0 or infinite
        logits = CAP - 2.0 * CAP / (1.0 + tl.exp2(logits * (2.0 * LOG2_OF_E / CAP)))
    return logits


@triton.jit
def cap_slope(logits, CAP: tl.constexpr):
    """The derivative of `capped`, from its results: 1 - tanh ** 2."""
    share = logits / CAP
    return 1.0 - share * share


@triton.jit
def load_sinks(sink_ptr, head, exists):
    """The sinks of query heads, of any shape, in units of log 2; 0 where a head does not exist."""
    return tl.load(sink_ptr + head, mask=exists, other=0.0).to(tl.float32) * LOG2_OF_E


@triton.jit
def with_sink(lse, sink):
    """Log-sum-exps of base 2 with one more term each."""
    higher = tl.maximum(lse, sink)
    return higher + tl.log2(tl.exp2(lse - higher) + tl.exp2(sink - higher))


@triton.jit
def add_sinks(sink_ptr, head, exists, highest, total, result):
    """Takes the sinks of M rows, which have no value, into a running softmax: its maximum [M], its sum [M] and the
    output's sum [M, DP].

    head: the rows' query heads [M]; exists: which rows are some. Without sinks nothing changes.
    """
    if sink_ptr is not None:
        # [M]
        sink = load_sinks(sink_ptr, head, exists)
        higher = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        result = result * shrink[:, None]
        highest = higher
    return highest, total, result


@triton.jit
def load_rows(row, column, exists, D: tl.constexpr, END: tl.constexpr, MASKED: tl.constexpr):
    """Loads a tile [M, columns] from pointers to M rows.

    column: the columns, all below END; those from D on are zero, and if MASKED the rows that do not exist too.
    """
    place = row[:, None] + column[None, :]
    # [M, columns]
    if MASKED:
        tile = tl.load(place, mask=exists[:, None] & (column < D)[None, :], other=0.0)
    elif END > D:
        tile = tl.load(place, mask=(column < D)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def load_parts(
    row, column, exists, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """As `load_rows`: the whole head in PARTS tiles [M, WIDTH]."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (load_rows(row, part * WIDTH + column, exists, D, (part + 1) * WIDTH, MASKED),)
    return parts


@triton.jit
def zero_parts(ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """PARTS tiles [ROWS, WIDTH] of float32 zeros."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros([ROWS, WIDTH], tl.float32),)
    return parts


@triton.jit
def dot_parts(left, right, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """The product [M, N] of a tile in parts, [M, WIDTH] each, with another one, [N, WIDTH] each, transposed."""
    result = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    for part in tl.static_range(1, PARTS):
        result = tl.dot(left[part], tl.trans(right[part]), result, input_precision=PRECISION)
    return result


@triton.jit
def add_parts(
    row, column, exists, weight, tile, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds weight [M, N] times a tile in parts, [N, WIDTH] each, to M float32 rows in memory."""
    for part in tl.static_range(PARTS):
        product = tl.dot(weight, tile[part], input_precision=PRECISION)
        columns = part * WIDTH + column
        place = row[:, None] + columns[None, :]
        if MASKED:
            tl.atomic_add(place, product, mask=exists[:, None] & (columns < D)[None, :], sem="relaxed")
        elif (part + 1) * WIDTH > D:
            tl.atomic_add(place, product, mask=(columns < D)[None, :], sem="relaxed")
        else:
            tl.atomic_add(place, product, sem="relaxed")


@triton.jit
def attend(
    query, key, value, visible, highest, total, result, scale, PRECISION: tl.constexpr, CAP: tl.constexpr
):  # fmt: skip
    """Takes one tile of keys and values into a running softmax of base 2: returns its maximum [M], its sum [M] and the
    output's sum [M, DP].

    query [M, DP]; key, value [N, DP]; visible [M, N], or None if all rows see all keys; CAP: as in `capped`.
    """
    # [M, N]
    logits = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale, CAP)
    return attend_by_logits(logits, value, visible, highest, total, result, PRECISION)


@triton.jit
def attend_by_logits(logits, value, visible, highest, total, result, PRECISION: tl.constexpr):
    """As `attend`, from the tile's logits [M, N]."""
    if visible is not None:
        logits = tl.where(visible, logits, -float("inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    safe = higher
    if visible is not None:
        safe = tl.where(higher == -float("inf"), 0.0, higher)  # for a row that has seen nothing yet
    weight = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(highest - safe)
    total = total * shrink + tl.sum(weight, 1)
    result = result * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
    return higher, total, result


@triton.jit
def attend_backward(
    query, key, value, visible, lse, delta, upstream, query_grad, scale, PRECISION: tl.constexpr, CAP: tl.constexpr
):  # fmt: skip
    """Adds one tile's part to the query gradient [M, DP], before the softmax scaling.

    query, upstream [M, DP]; key, value [N, DP]; lse, delta [M]; visible [M, N], or None; CAP: as in `capped`.
    """
    # [M, N]
    logits = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale, CAP)
    weight = tl.exp2(logits - lse[:, None])
    if visible is not None:
        weight = tl.where(visible, weight, 0.0)
    weight_grad = tl.dot(upstream, tl.trans(value), input_precision=PRECISION)
    logit_grad = weight * (weight_grad - delta[:, None])
    if CAP is not None:
        logit_grad = logit_grad * cap_slope(logits, CAP)
    return query_grad + tl.dot(logit_grad.to(key.dtype), key, input_precision=PRECISION)


@triton.jit
def attend_backward_keys(
    query, key, value, visible, lse, delta, upstream, key_grad, value_grad, scale, PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Adds one tile's part to the gradients [N, DP] of keys, before the softmax scaling, and of values.

    query, upstream [M, DP]; key, value [N, DP]; lse, delta [M]; visible [N, M], or None; CAP: as in `capped`. Products
    are keys by rows, so that none needs a transposition.
    """
    # [N, M]
    logits = capped(tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale, CAP)
    weight = tl.exp2(logits - lse[None, :])
    if visible is not None:
        weight = tl.where(visible, weight, 0.0)
    value_grad += tl.dot(weight.to(upstream.dtype), upstream, input_precision=PRECISION)
    weight_grad = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
    logit_grad = weight * (weight_grad - delta[None, :])
    if CAP is not None:
        logit_grad = logit_grad * cap_slope(logits, CAP)
    logit_grad = logit_grad.to(query.dtype)
    key_grad += tl.dot(logit_grad, query, input_precision=PRECISION)
    return key_grad, value_grad
