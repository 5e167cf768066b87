"""How the programs of a selecting step divide the positions of a batch row among themselves, and the lists they write.

Shapes: `L` tokens the cache has room for, `N` entries of a tile.
"""

import triton
import triton.language as tl

RANKED, COLLECTED = 512, 1024
"""Positions that a program of `_rank`, and of `_find_threshold`, takes at once. The second is the larger: `room_of`
leaves room for it."""

LONG_ROW, COLLECTED_OF_LONG = 65536, 4096
"""Positions of a row above which a program of `_find_threshold` takes more at once, and how many it then takes. It
adds to the row's counter once for each tile."""

MOST_PARTS = 64
"""Most programs of `_rank`, and of `_find_threshold`, that share a batch row and key/value head."""

RANK_PROGRAMS, THRESHOLD_PROGRAMS = 1056, 528
"""Programs of `_rank`, and of `_find_threshold`, that a GPU runs at once."""

RUN = 64
"""Neighbouring positions that `_attend_to_chosen` gives to the same program. Runs go to the programs in turn, so that
all programs share the stretches of a row where many positions are chosen."""


def parts_of(pairs: int, capacity: int, pool_kernel: int, tile: int, programs: int) -> int:
    """Programs of `_rank`, or of `_find_threshold`, for each of `pairs` batch rows and key/value heads.

    There are enough of them for each to take its share, and what the pooling windows reach beyond it, as one tile,
    unless MOST_PARTS or `programs` limits them.
    """
    reach = 16 * triton.cdiv(pool_kernel, 16) + 16
    wanted = triton.cdiv(capacity, max(tile - reach, 16))
    return max(1, min(wanted, MOST_PARTS, programs // pairs))


def collected_of(capacity: int) -> int:
    """Positions that a program of `_find_threshold` takes at once, in a cache with room for `capacity` tokens."""
    return COLLECTED_OF_LONG if capacity > LONG_ROW else COLLECTED


def list_room(capacity: int, splits: int) -> int:
    """Most positions that one of `splits` programs of `_attend_to_chosen` goes through: the room of its list."""
    return triton.cdiv(triton.cdiv(capacity, RUN) + 1, splits) * RUN


@triton.jit
def share(first, end, part, parts):
    """The positions `begin .. end - 1` that program `part` of `parts` takes out of `first .. end - 1`.

    Each share begins at a multiple of 16, so that its loads are aligned: the first one may begin before `first`.
    """
    base = first // 16 * 16
    size = tl.cdiv(tl.cdiv(end - base, parts), 16) * 16
    begin = base + part * size
    return begin, tl.minimum(begin + size, end)


@triton.jit
def place_in_list(taken):
    """The slots of the entries taken, (N, 4) bool, in a list that keeps their order: (N, 4), and how many are taken."""
    taken = taken.to(tl.int32)
    of_line = tl.sum(taken, 1)
    before = tl.cumsum(of_line, 0) - of_line
    return before[:, None] + tl.cumsum(taken, 1) - taken, tl.sum(of_line, 0)
