"""Counters in the shared memory of a program, by PTX instructions.

One instruction counts an entry, for which `tl.histogram` takes some thirty (Triton 3.6).
"""

import triton
import triton.language as tl


@triton.jit
def zero_counters(BINS: tl.constexpr):
    """The address of BINS counters, a power of two and 128 at most, that are zero; each call has others."""
    tl.static_assert(BINS <= 128)
    # the program's other shared memory lies behind them, aligned to 16 bytes: too few for asynchronous matrix products
    address = tl.inline_asm_elementwise(
        "{ .shared .align 16 .b32 counters[128]; mov.u32 $0, counters; }",
        "=r", [], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.inline_asm_elementwise(
        "st.shared.u32 [$1], 0; mov.u32 $0, 0;",
        "=r,r", [address + tl.arange(0, BINS) * 4], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()
    return address


@triton.jit
def count_each(address, number):
    """Adds one to the counter of each number. Tensors of different shapes need different counters."""
    tl.inline_asm_elementwise(
        "red.shared.add.u32 [$1], 1; mov.u32 $0, 0;",
        "=r,r", [address + number * 4], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def counted(address, entries, BINS: tl.constexpr):
    """How many of so many `entries` each of BINS counters has counted, (BINS,) int32."""
    tl.debug_barrier()
    counts = tl.inline_asm_elementwise(
        "ld.shared.u32 $0, [$1];",
        "=r,r", [address + tl.arange(0, BINS) * 4], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    # a compiler may keep each entry of a tensor in several threads, all of which count it
    return counts // tl.maximum(tl.sum(counts, 0) // tl.maximum(entries, 1), 1)
