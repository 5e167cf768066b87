"""How a selecting step's choice becomes the selection of the steps that follow.

Shapes: `B` batch rows, `Hkv` key/value heads, `L'` tokens the cache has room for and a few more, `W` slots of a
selection, `N` lists of a batch row and key/value head, padded to NP.
"""

import triton
import triton.language as tl


@triton.jit
def keep_choice(
    list_ptr, count_ptr, ranking_ptr, selected_ptr, kept_ranking_ptr, pair, own, lists, list_room, room, width,
    BLOCK: tl.constexpr, NP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Writes the positions in list `own` of a batch row and key/value head into its selection (B, Hkv, W) int32, behind
    those of the lists before it; if ORDERED, their rankings too, by which the lowest can be put in order. It reads what
    other programs wrote past its L1 cache."""
    number = tl.arange(0, NP)
    # [NP]
    counts = tl.load(count_ptr + pair * lists + number, mask=number < lists, other=0, cache_modifier=".cg")
    first = tl.sum(tl.where(number < own, counts, 0), 0)
    count = tl.sum(tl.where(number == own, counts, 0), 0)
    selected = selected_ptr + pair.to(tl.int64) * width + first
    kept_rankings = kept_ranking_ptr + pair.to(tl.int64) * width + first
    rankings = ranking_ptr + pair.to(tl.int64) * room
    listed = list_ptr + (pair.to(tl.int64) * lists + own) * (3 * list_room)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        # [BLOCK]
        token = tl.load(listed + entry, mask=entry < count, other=0)
        tl.store(selected + entry, token, mask=entry < count)
        if ORDERED:
            # [BLOCK]
            ranking = tl.load(rankings + token, mask=entry < count, other=0, cache_modifier=".cg")
            tl.store(kept_rankings + entry, ranking, mask=entry < count)
