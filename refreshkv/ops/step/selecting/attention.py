"""The second kernel of a step of a cache with selecting steps. At a selecting step it ranks the positions, lists the
best ones and attends to them, in shares. At every step it merges the shares and counts the token.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, padded to MP, `D` head size, padded to
DP, `L` tokens the cache has room for, `L'` a few more, `W` slots of a selection, `N` shares.
"""

import triton
import triton.language as tl

from refreshkv.ops.step.finishing import rank_full_step
from refreshkv.ops.step.selecting.counting import count_each, counted, zero_counters
from refreshkv.ops.step.selecting.finishing import keep_choice, mark_selecting, merge_part
from refreshkv.ops.step.selecting.ranking import load_sums, rank_share
from refreshkv.ops.step.selecting.shares import place_in_list
from refreshkv.ops.step.selecting.threshold import (
    ATTENDED,
    CHOICE_COLUMNS,
    COUNTED,
    COUNTERS,
    FINALISTS,
    LIMIT,
    LISTED,
    RANKED,
    THRESHOLD,
    find_bin,
    find_part,
    part_of,
    resolve,
    resolve_few,
    search,
)
from refreshkv.ops.tiles import BUDGET, PADDING, ROW_COLUMNS, attend

PROGRAMS_PER_PROCESSOR = 4
"""Programs of `_choose_and_attend` for each multiprocessor: all run at once."""

RANK, LIST, NARROW, ATTEND, FINISH = (tl.constexpr(number) for number in range(5))
"""The stages of `_choose_and_attend`."""

LISTED_AT_ONCE = 1024
"""Most positions of its share that a program lists at once."""

LIST_STAGES = 2
"""Tiles of these positions that are on their way at once."""

FEWEST_NEAR, MOST_NEAR = 256, 1024
"""Bounds of how many candidates of its share a program takes at once. About one position out of 20 is a candidate where
logits are distributed normally, and an eighth of the positions is chosen."""


@triton.jit
def _choose_and_attend(
    query_ptr, keys_ptr, values_ptr, row_ptr, selecting_ptr, logit_ptr, middle_ptr, logit_highest_ptr, logit_total_ptr,
    score_ptr, ranking_ptr, histogram_ptr, counter_ptr, finalist_ptr, choice_ptr, list_ptr, count_ptr, near_count_ptr,
    partial_ptr, highest_ptr, total_ptr, sink_ptr, step_partial_ptr, step_highest_ptr, step_total_ptr, output_ptr,
    length_ptr, selected_ptr, kept_ranking_ptr, flag_ptr, full_ptr, full_score_ptr, full_ranking_ptr,
    query_b, query_h, kv_heads, capacity, room, width, step_splits, list_room, recent, sinks, reach, scale,
    FIRST: tl.constexpr, LAST: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr,
    ROWS: tl.constexpr, SNP: tl.constexpr, NP: tl.constexpr, OBSERVERS: tl.constexpr, POOL: tl.constexpr,
    BEFORE: tl.constexpr, KEEPS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, BINS: tl.constexpr,
    FINE: tl.constexpr, COARSE_BITS: tl.constexpr, BIN_BITS: tl.constexpr, MOST: tl.constexpr, FEW: tl.constexpr,
    SEARCHED: tl.constexpr, RUN: tl.constexpr, LISTED_TILE: tl.constexpr, NEAR_TILE: tl.constexpr,
    LIST_STAGES: tl.constexpr, ATTENDS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr, MERGED: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, GP: tl.constexpr,
    FULL_STEPS: tl.constexpr, ORDERED: tl.constexpr, PREFERS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Does the stages FIRST to LAST for one share of a batch row and key/value head. Where the step is not a selecting
    one, there is the last stage only.

    - RANK: writes the rankings of its positions, and counts them in the row's first histogram.
    - LIST: lists its positions above the bin that holds the threshold, and its candidates, which are in the bin, and
      counts these in the row's second histogram.
    - NARROW: lists its candidates above the part of the bin that holds the threshold too, and those in it, the
      finalists, in the row's list.
    - ATTEND: finds the threshold among the row's finalists, lists its own chosen ones, and attends to all that it has
      listed: maximum and sum (B, H, N), output (B, H, N, D). Without ATTENDS it only completes the list.
    - FINISH: with ATTENDS, it merges the shares, HEADS outputs and COLUMNS of their columns at a time. The shares are
      those of `_attend` where the step is not a selecting one. At a selecting step it keeps its list as a part of the
      selection (B, Hkv, W), at a full one (FULL_STEPS) it ranks positions. One program counts the token.

    A stage needs what all programs of the row did in the stage before. Where one launch does several, each program
    waits for the others, so all of them must run at once; while it waits it attends to what is listed already.

    The share that a program ranks is a stretch of the row, so that pooling windows have their neighbours; the share
    that it lists is every N-th run of RUN positions. It reads what other programs wrote past its L1 cache.
    """
    split, pair = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(selecting_ptr + batch)
    if FIRST <= RANK:  # on their way while the position is
        sums_highest, sums = load_sums(logit_highest_ptr, logit_total_ptr, pair, step_splits, G * OBSERVERS, ROWS, SNP)
    if FIRST <= ATTEND:
        if position >= 0:
            padding = tl.load(row_ptr + batch * ROW_COLUMNS + PADDING).to(tl.int32)
            budget = tl.load(row_ptr + batch * ROW_COLUMNS + BUDGET).to(tl.int32)
            rankings = ranking_ptr + pair.to(tl.int64) * room
            histograms = histogram_ptr + pair * (2 * BINS)
            counters = counter_ptr + COUNTERS * pair
            own = pair.to(tl.int64) * splits + split
            listed = list_ptr + own * (3 * list_room)
            near_listed = listed + list_room
            finalists = finalist_ptr + pair.to(tl.int64) * (2 * MOST)
            if FIRST <= RANK:
                rank_share(
                    logit_ptr + pair.to(tl.int64) * (G * OBSERVERS) * room, middle_ptr, sums_highest, sums,
                    score_ptr + pair.to(tl.int64) * room, rankings, histograms, pair, position, padding, budget, split,
                    splits, kv_heads, room, recent, sinks, reach, sink_ptr,
                    G, ROWS, OBSERVERS, POOL, BEFORE, BLOCK, REST, BINS, FINE, COARSE_BITS, BIN_BITS, KEEPS,
                    PREFERS, RUN, ASM,
                )  # fmt: skip
            if LAST >= LIST:
                if FIRST <= RANK:
                    _arrive(counters + RANKED)
                    _wait(counters + RANKED, splits)
                low, high, above, within = find_bin(
                    histograms, budget, position + 1 - padding, reach, BINS, FINE, COARSE_BITS, BIN_BITS
                )
                if FIRST <= LIST:
                    count, near = _list_share(
                        rankings, listed, list_room, low, high, position, padding, split, splits, RUN,
                        LISTED_TILE, REST, LIST_STAGES,
                    )  # fmt: skip
                    _count_candidates(near_listed + list_room, near, low, high, histograms + BINS, BINS, NEAR_TILE, ASM)
                else:
                    count, near = tl.load(count_ptr + own), tl.load(near_count_ptr + own)
            if LAST == LIST:
                tl.store(count_ptr + own, count)
                tl.store(near_count_ptr + own, near)
            if (LAST >= ATTEND) & ATTENDS:
                row, column = tl.arange(0, MP), tl.arange(0, DP)
                mask = (row < G)[:, None] & (column < D)[None, :]
                queries = query_ptr + batch * query_b + (kv_head * G + row)[:, None] * query_h + column[None, :]
                # [MP, DP]
                query = tl.load(queries, mask=mask, other=0.0)
                keys = keys_ptr + pair.to(tl.int64) * capacity * D
                values = values_ptr + pair.to(tl.int64) * capacity * D
                highest = tl.full([MP], -float("inf"), tl.float32)
                total = tl.zeros([MP], tl.float32)
                result = tl.zeros([MP, DP], tl.float32)
            if LAST >= NARROW:
                attended = count * 0
                if FIRST <= LIST:
                    _arrive(counters + COUNTED)
                    if ATTENDS:
                        # whole tiles only: the rest goes with those that follow
                        attended = count // BLOCK_N * BLOCK_N
                        highest, total, result = _attend_to_listed(
                            query, keys, values, listed, count * 0, attended, highest, total, result, scale, D, DP,
                            BLOCK_N, PRECISION, CAP,
                        )  # fmt: skip
                    _wait(counters + COUNTED, splits)
                low, high, above, within = find_part(histograms + BINS, budget, low, high, above, within, BINS)
                if FIRST <= NARROW:
                    count = _list_finalists(
                        listed, near_listed, list_room, count, near, low, high, finalists, counters, MOST, NEAR_TILE
                    )
            if LAST == NARROW:
                tl.store(count_ptr + own, count)
            if LAST >= ATTEND:
                if FIRST <= NARROW:
                    _arrive(counters + LISTED)
                    if ATTENDS:
                        whole = count // BLOCK_N * BLOCK_N
                        highest, total, result = _attend_to_listed(
                            query, keys, values, listed, attended, whole, highest, total, result, scale, D, DP, BLOCK_N,
                            PRECISION, CAP,
                        )  # fmt: skip
                        attended = whole
                    _wait(counters + LISTED, splits)
                threshold, limit = low - 1, position
                if within > MOST:
                    threshold, limit = search(rankings, padding, position, budget, low, high, SEARCHED)
                elif within > FEW:
                    threshold, limit = resolve(finalists, within, budget - above, low, high, position, MOST)
                elif within > 0:
                    threshold, limit = resolve_few(finalists, within, budget - above, MOST, FEW)
                if split == 0:
                    tl.store(choice_ptr + CHOICE_COLUMNS * pair + THRESHOLD, threshold)
                    tl.store(choice_ptr + CHOICE_COLUMNS * pair + LIMIT, limit)
                count = _list_chosen(listed, near_listed, list_room, count, near, high, threshold, limit, NEAR_TILE)
                tl.store(count_ptr + own, count)
                if ATTENDS:
                    tl.debug_barrier()  # a thread reads entries that others have listed
                    highest, total, result = _attend_to_listed(
                        query, keys, values, listed, attended, count, highest, total, result, scale, D, DP, BLOCK_N,
                        PRECISION, CAP,
                    )  # fmt: skip
                    place = (batch * kv_heads * G + kv_head * G + row) * splits + split
                    tl.store(highest_ptr + place, highest, mask=row < G)
                    tl.store(total_ptr + place, total, mask=row < G)
                    if count > 0:
                        tl.store(partial_ptr + place[:, None] * D + column[None, :], result, mask=mask)
                if LAST >= FINISH:
                    _arrive(counters + ATTENDED)
                    _wait(counters + ATTENDED, splits)
    if LAST >= FINISH:
        if ATTENDS:
            merge_part(
                partial_ptr, highest_ptr, total_ptr, step_partial_ptr, step_highest_ptr, step_total_ptr, sink_ptr,
                output_ptr, position, pair, kv_head, split, splits, step_splits, G, D, DP, HEADS, COLUMNS, MERGED,
            )  # fmt: skip
        if position >= 0:
            keep_choice(
                list_ptr, count_ptr, ranking_ptr, selected_ptr, kept_ranking_ptr, pair, split, splits, list_room, room,
                width, BLOCK, NP, ORDERED,
            )  # fmt: skip
            if (split == 0) & (kv_head == 0):
                mark_selecting(row_ptr, flag_ptr, batch, position, capacity)
        elif FULL_STEPS:
            rank_full_step(
                full_ptr, row_ptr, step_highest_ptr, step_total_ptr, logit_ptr, full_score_ptr, full_ranking_ptr,
                sink_ptr, pair, kv_heads, split, splits, capacity, room, step_splits, recent, sinks, G, GP, SNP, POOL,
                BEFORE, OBSERVERS > 1, BLOCK,
            )  # fmt: skip
        if (split == 0) & (pair == 0):
            tl.store(length_ptr, tl.load(length_ptr) + 1)


@triton.jit
def _arrive(counter):
    """Counts this program, once what its threads have written is there for those that `_wait` for it."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _wait(counter, programs):
    """Returns once so many programs have arrived."""
    while tl.atomic_add(counter, 0, sem="acquire") < programs:
        pass


@triton.jit
def _list_share(
    rankings, listed, list_room, low, high, position, padding, split, splits,
    RUN: tl.constexpr, TILE: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Lists the positions of a share that rank at `high` or above, behind the room for all of them those that rank in
    `low .. high - 1`, and in a third such room their rankings; returns how many of each there are."""
    base = padding // RUN * RUN
    runs = tl.cdiv(position + 1 - base, RUN)
    own = tl.cdiv(tl.maximum(runs - split, 0), splits) * RUN
    count, near = position * 0, position * 0
    whole = own // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=STAGES):
        count, near = _list_tile(
            rankings, listed, list_room, low, high, split, splits, base, start, own, count, near, RUN, TILE, True,
        )  # fmt: skip
    for start in range(whole, own, REST):
        count, near = _list_tile(
            rankings, listed, list_room, low, high, split, splits, base, start, own, count, near, RUN, REST, False,
        )  # fmt: skip
    tl.debug_barrier()  # from here on, threads read entries that others have listed
    return count, near


@triton.jit
def _list_tile(
    rankings, listed, list_room, low, high, split, splits, base, start, own, count, near,
    RUN: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The part of `_list_share` for TILE positions, the `start`-th of the share and those after it, when `count` and
    `near` are listed; returns how many are then. WHOLE: the share, of `own` positions, has all of them."""
    # [TILE / 4]: of four neighbours, which are of one run
    number = start + tl.arange(0, TILE // 4) * 4
    is_own = number < own
    if not WHOLE:
        number = tl.minimum(number, own - 4)  # the next runs of the share may lie beyond the row's memory
    token = base + (number // RUN * splits + split) * RUN + number % RUN
    token = token[:, None] + tl.arange(0, 4)[None, :]
    # [TILE / 4, 4]: -1 where a run has no position; a mask would load them one by one
    ranking = tl.load(rankings + token, cache_modifier=".cg")
    if not WHOLE:
        ranking = tl.where(is_own[:, None], ranking, -1)
    is_above = ranking >= high
    # both in one scan: a tile has fewer than 2^16
    slot, taken = place_in_list(tl.where(is_above, 1, tl.where(ranking >= low, 1 << 16, 0)))
    slot = tl.where(is_above, count + (slot & 0xFFFF), list_room + near + (slot >> 16))
    tl.store(listed + slot, token, mask=ranking >= low)
    tl.store(listed + list_room + slot, ranking, mask=(ranking >= low) & (ranking < high))
    return count + (taken & 0xFFFF), near + (taken >> 16)


@triton.jit
def _count_candidates(
    near_rankings, near, low, high, histogram, BINS: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr
):
    """Adds the candidates of a share, `near` of them, to the row's second histogram. Its lowest bin also counts the
    places of the last tile that no candidate takes. ASM: PTX instructions count."""
    counters = zero_counters(BINS, ASM)
    for start in range(0, near, TILE):
        entry = start + tl.arange(0, TILE)
        # [TILE]
        ranking = tl.load(near_rankings + entry, mask=entry < near, other=low)
        counters = count_each(counters, part_of(ranking, low, high, BINS), BINS, ASM)
    counts = counted(counters, tl.cdiv(near, TILE) * TILE, BINS, ASM)
    tl.atomic_add(histogram + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _load_candidates(near_listed, list_room, near, start, TILE: tl.constexpr):
    """TILE candidates of a share from the `start`-th on: which exist, their tokens and their rankings, (TILE / 4, 4)
    each; -1 is the ranking of those that do not."""
    line = start + tl.arange(0, TILE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    # [TILE / 4, 4] twice
    token = tl.load(near_listed + line, mask=line < near, other=0)
    ranking = tl.load(near_listed + list_room + line, mask=line < near, other=-1)
    return line < near, token, ranking


@triton.jit
def _list_finalists(
    listed, near_listed, list_room, count, near, low, high, finalists, counters, MOST: tl.constexpr, TILE: tl.constexpr
):
    """Lists the candidates of a share that rank at `high` or above behind the `count` positions listed; returns how
    many these are then. Those that rank in `low .. high - 1` go into the row's list, with their rankings, as far as
    there is room."""
    for start in range(0, near, TILE):
        _, token, ranking = _load_candidates(near_listed, list_room, near, start, TILE)
        is_above, is_near = ranking >= high, (ranking >= low) & (ranking < high)
        slot, taken = place_in_list(is_above.to(tl.int32) + (is_near.to(tl.int32) << 16))
        tl.store(listed + count + (slot & 0xFFFF), token, mask=is_above)
        count += taken & 0xFFFF
        slot = tl.atomic_add(counters + FINALISTS, taken >> 16, sem="relaxed") + (slot >> 16)
        tl.store(finalists + slot, token, mask=is_near & (slot < MOST))
        tl.store(finalists + MOST + slot, ranking, mask=is_near & (slot < MOST))
    return count


@triton.jit
def _list_chosen(listed, near_listed, list_room, count, near, high, threshold, limit, TILE: tl.constexpr):
    """Lists the chosen ones of the candidates of a share that rank below `high` behind the `count` positions listed;
    returns how many these are then."""
    for start in range(0, near, TILE):
        exists, token, ranking = _load_candidates(near_listed, list_room, near, start, TILE)
        is_chosen = (ranking > threshold) | ((ranking == threshold) & (token <= limit))
        is_chosen = is_chosen & (ranking < high) & exists
        slot, taken = place_in_list(is_chosen.to(tl.int32))
        tl.store(listed + count + slot, token, mask=is_chosen)
        count += taken
    return count


@triton.jit
def _attend_to_listed(
    query, keys, values, listed, first, last, highest, total, result, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Takes the entries `first .. last - 1` of a list into the running softmax."""
    column = tl.arange(0, DP)
    in_head = column < D
    for start in range(first, last, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        exists = entry < last
        # [BLOCK_N]
        token = tl.load(listed + entry, mask=exists, other=0)
        place = token.to(tl.int64)[:, None] * D + column[None, :]
        here = exists[:, None] & in_head[None, :]
        # [BLOCK_N, DP] twice
        key = tl.load(keys + place, mask=here, other=0.0)
        value = tl.load(values + place, mask=here, other=0.0)
        highest, total, result = attend(
            query, key, value, exists[None, :], highest, total, result, scale, PRECISION, CAP
        )
    return highest, total, result
