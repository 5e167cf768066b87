"""The first histogram of a row's rankings, which says in which bin the threshold is.

A bin is a range of the upper bits of a ranking. The highest possible threshold gives the first bin its place, so that
the bins are narrow where the threshold mostly lies.
"""

import triton
import triton.language as tl

from refreshkv.ops.selection.top_k import HIGHEST

BINS = 64
"""Bins of a row, 64 at most (`counting.zero_counters`). The last one counts the rankings above the highest possible
threshold. The second histogram makes up for their width."""

FINE = 44
"""Bins below that one which are a quarter of a power of two wide each."""

COARSE_BITS = 3
"""The rest are wider by so many powers of two."""

BIN_BITS = 21
"""Lower bits of a ranking, which a fine bin does not tell apart."""


@triton.jit
def top_bin(reach, budget, BIN_BITS: tl.constexpr):
    """The upper bits of the highest possible threshold: `budget` positions score as high as it or higher, and the
    scores of all positions add up to `reach` at most (group size times pooling window)."""
    bound = tl.minimum(tl.div_rn(reach, tl.maximum(budget, 1).to(tl.float32)), 1.0)
    return bound.to(tl.int32, bitcast=True) >> BIN_BITS


@triton.jit
def bin_of(ranking, top, BINS: tl.constexpr, FINE: tl.constexpr, COARSE_BITS: tl.constexpr, BIN_BITS: tl.constexpr):
    """Maps rankings to their bins, higher rankings to higher bins: bin BINS - 1 holds those above `top`, the FINE bins
    below it have one value of the upper bits each, the others 2 to the COARSE_BITS."""
    below = top - (ranking >> BIN_BITS)
    below = tl.minimum(below, FINE + ((below - FINE) >> COARSE_BITS))  # the second is the lower one from FINE on
    return tl.minimum(tl.maximum(BINS - 2 - below, 0), BINS - 1)


@triton.jit
def bounds_of_bin(
    number, top, BINS: tl.constexpr, FINE: tl.constexpr, COARSE_BITS: tl.constexpr, BIN_BITS: tl.constexpr
):
    """The rankings `low .. high - 1` of bin `number`: the inverse of `bin_of`."""
    below = BINS - 2 - number
    is_coarse = below >= FINE
    below = tl.where(is_coarse, FINE + ((below - FINE) << COARSE_BITS), below)
    low = tl.maximum(top - below - tl.where(is_coarse, (1 << COARSE_BITS) - 1, 0), 0) << BIN_BITS
    high = tl.where(number == BINS - 1, HIGHEST, (top - below + 1) << BIN_BITS)
    return tl.where(number == 0, 0, low), high
