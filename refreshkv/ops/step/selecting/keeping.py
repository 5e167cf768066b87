"""How a selecting step's choice becomes the selection of the steps that follow.

`refreshkv.ops.step.attention._finish`, the last kernel of a step, calls `keep_choice` where the step is a selecting
one.

Shapes: `B` batch rows, `Hkv` key/value heads, `L'` tokens the cache has room for and a few more, `W` slots of a
selection, `N` lists of a batch row and key/value head, padded to NP.
"""

import triton
import triton.language as tl


@triton.jit
def keep_choice(
    list_ptr, count_ptr, ranking_ptr, selected_ptr, kept_ranking_ptr, pair, part, parts, lists, list_room, room, width,
    BLOCK: tl.constexpr, NP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Writes the chosen positions of one batch row and key/value head, one list after the other, into its selection
    (B, Hkv, W) int32; if ORDERED, their rankings too, by which the lowest can be put in order.

    Program `part` of `parts` writes every `parts`-th list.
    """
    number = tl.arange(0, NP)
    # [NP]
    counts = tl.load(count_ptr + pair * lists + number, mask=number < lists, other=0)
    selected, kept_rankings = selected_ptr + pair.to(tl.int64) * width, kept_ranking_ptr + pair.to(tl.int64) * width
    rankings = ranking_ptr + pair.to(tl.int64) * room
    for own in range(part, lists, parts):
        first = tl.sum(tl.where(number < own, counts, 0), 0)
        count = tl.sum(tl.where(number == own, counts, 0), 0)
        listed = list_ptr + (pair.to(tl.int64) * lists + own) * (3 * list_room)
        for start in range(0, count, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            # [BLOCK]
            token = tl.load(listed + entry, mask=entry < count, other=0)
            tl.store(selected + first + entry, token, mask=entry < count)
            if ORDERED:
                # [BLOCK]
                ranking = tl.load(rankings + token, mask=entry < count, other=0)
                tl.store(kept_rankings + first + entry, ranking, mask=entry < count)
