"""How the programs of a selecting step divide the positions of a batch row among themselves, and the lists they write.

Shapes: `L` tokens the cache has room for, `N` entries of a tile.
"""

import triton
import triton.language as tl

RANKED = 1024
"""Positions that a program of `_choose_and_attend` ranks at once. `room_of` leaves room for as many."""

REST = 256
"""Positions that it ranks or lists at once where the last tile would not be whole."""

RUN = 64
"""Neighbouring positions that one program of `_choose_and_attend` lists. Runs go to the programs in turn, so that
all programs share the stretches of a row where many positions are chosen."""


def list_room(capacity: int, splits: int) -> int:
    """Most positions that one of `splits` programs of `_choose_and_attend` lists: the room of its list."""
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
    """The slots of the entries taken, (N, 4) int32 of zeros and ones, in a list that keeps their order: (N, 4), and how
    many are taken. Of two lists at once where the halves of the integers count one each."""
    of_line = tl.sum(taken, 1)
    before = tl.cumsum(of_line, 0) - of_line
    return before[:, None] + tl.cumsum(taken, 1) - taken, tl.sum(of_line, 0)
