"""Histograms of many tiles, by PTX instructions (ASM) or by `tl.histogram`.

The PTX instructions add to counters in the shared memory of a program. One of them counts an entry, for which
`tl.histogram` takes some thirty (Triton 3.6).
"""

import triton
import triton.language as tl


@triton.jit
def zero_counters(BINS: tl.constexpr, ASM: tl.constexpr):
    """BINS counters, a power of two and 64 at most, that are zero; each call has others. With ASM their address, else
    (BINS,) int32."""
    tl.static_assert(BINS <= 64)
    if ASM:
        # the program's other shared memory lies behind them, aligned to 16 bytes: too few for asynchronous products
        address = tl.inline_asm_elementwise(
            "{ .shared .align 16 .b32 counters[64]; mov.u32 $0, counters; }",
            "=r", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            "st.shared.u32 [$1], 0; mov.u32 $0, 0;",
            "=r,r", [address + tl.arange(0, BINS) * 4], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()
        return address
    else:
        return tl.zeros([BINS], tl.int32)


@triton.jit
def count_each(counters, number, BINS: tl.constexpr, ASM: tl.constexpr):
    """Adds one to the counter of each number; returns the counters. Tensors of different shapes need different ones."""
    if ASM:
        tl.inline_asm_elementwise(
            "red.shared.add.u32 [$1], 1; mov.u32 $0, 0;",
            "=r,r", [counters + number * 4], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        return counters
    else:
        return counters + tl.histogram(tl.ravel(number), BINS)


@triton.jit
def counted(counters, entries, BINS: tl.constexpr, ASM: tl.constexpr):
    """How many of so many `entries` each counter has counted: (BINS,) int32."""
    if ASM:
        tl.debug_barrier()
        counts = tl.inline_asm_elementwise(
            "ld.shared.u32 $0, [$1];",
            "=r,r", [counters + tl.arange(0, BINS) * 4], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        # a compiler may keep each entry of a tensor in several threads, all of which count it
        return counts // tl.maximum(tl.sum(counts, 0) // tl.maximum(entries, 1), 1)
    else:
        return counters
