"""One decoding step by Triton kernels: launches of fixed size, chosen by shapes alone, nothing read by the host."""

import torch
import triton
from torch import Tensor

from refreshkv.ops.selection import step as selection
from refreshkv.ops.step import attention
from refreshkv.ops.step import observers as observing
from refreshkv.ops.step.operators import TAIL, Check
from refreshkv.ops.tiles import LOG2E, padded_head, precision

RANKING_PROGRAMS = 1024
"""About how many programs rank the positions of all rows."""

SAME_IN_ALL_THREADS = {"enable_fp_fusion": False}
"""Of kernels that rank. Where threads add up shares of a sum, each fuses its own product into the addition and gets
another last bit; then positions with the same score, as pooling makes them, would no longer tie."""


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    observers: Tensor,
    full_steps: Tensor,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    scaling: float,
) -> Tensor:
    """`refreshkv.ops.naive.decode_step` by kernels: (B, 1, H, D)."""
    check = Check.empty(query.shape[:1], *keys.shape[1:], query.device)
    output = attend_and_rank(
        query, key, value, keys, values, length, rows, selected, mean_query, observers, check, stride, threshold,
        pool_kernel, observation_window, recent_window, sink_tokens, scaling,
    )  # fmt: skip
    select(check, length, rows, selected, ranking, mean_query, full_steps, stride=stride, threshold=threshold)
    return output


def attend_and_rank(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    selected: Tensor,
    mean_query: Tensor,
    observers: Tensor,
    check: Check,
    stride: int,
    threshold: float | None,
    pool_kernel: int,
    observation_window: int,
    recent_window: int,
    sink_tokens: int,
    scaling: float,
) -> Tensor:
    """A step but for its selection, which `select` makes from what this puts into `check`: (B, 1, H, D)."""
    query, key, value = _unit_stride(query, key, value)
    shares = attend(
        query, key, value, keys, values, length, rows, rows, selected, mean_query, observers, scaling,
        mode=attention.REFRESH, stride=stride, threshold=threshold, store=observation_window == 1, check=check,
    )  # fmt: skip
    scores = shares.logits
    if observation_window > 1:
        scores = _observed_scores(observers, keys, rows, check.full, shares.splits, scaling)
    output = query.new_empty(query.shape[0], 1, *query.shape[1::2])
    finish(
        shares, output, length, rows, scores, keys.shape, pool_kernel, recent_window, sink_tokens,
        observed=observation_window > 1, check=check,
    )  # fmt: skip
    return output


def full_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    scaling: float,
) -> Tensor:
    """`refreshkv.ops.naive.full_step` by kernels: (B, 1, H, D)."""
    query, key, value = _unit_stride(query, key, value)
    state = (keys, values, length, rows, rows, rows, rows, query)
    shares = attend(query, key, value, *state, scaling, mode=attention.FULL)
    output = query.new_empty(query.shape[0], 1, *query.shape[1::2])
    finish(shares, output, length, rows, shares.total, keys.shape)
    return output


def compact_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    slots: Tensor,
    heavy: bool,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """`refreshkv.ops.naive.compact_step` by kernels: (B, 1, H, D), and the entries' probabilities."""
    query, key, value = _unit_stride(query, key, value)
    state = (keys, values, length, rows, slots, rows, rows, query)
    shares = attend(query, key, value, *state, scaling, mode=attention.COMPACT, store=heavy)
    output = query.new_empty(query.shape[0], 1, *query.shape[1::2])
    finish(shares, output, length, rows, shares.total, keys.shape)
    if not heavy:
        return output, None
    top = shares.highest.amax(dim=-1, keepdim=True)
    lse = top + (shares.total * torch.exp2(shares.highest - top)).sum(-1, keepdim=True).log2()
    entry = torch.arange(keys.shape[2], device=keys.device)
    visible = (entry < rows[:, 0, None, None]) | (entry == slots.unsqueeze(-1))
    probabilities = torch.exp2(shares.logits - lse).unflatten(1, (keys.shape[1], -1)).mean(dim=2)
    return output, probabilities.masked_fill(~visible, 0.0)


class Shares:
    """What `attend` leaves for `finish`: outputs, maxima and sums of each share of the keys."""

    def __init__(self, query: Tensor, splits: int, capacity: int, store: bool):
        batch, heads, _, head_dim = query.shape

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=query.device)

        self.splits = splits
        self.partial = buffer(batch, heads, splits, head_dim)
        self.highest, self.total = buffer(batch, heads, splits), buffer(batch, heads, splits)
        self.logits = buffer(batch, heads, capacity) if store else self.total


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    rows: Tensor,
    slots: Tensor,
    selected: Tensor,
    mean_query: Tensor,
    observers: Tensor,
    scaling: float,
    *,
    mode: int,
    stride: int = 1,
    threshold: float | None = None,
    store: bool = False,
    check: Check | None = None,
) -> Shares:
    """The first launch of a step; the arguments of `refreshkv.ops.step.operators.decode_step`, and slots (B, Hkv)
    int64: where the token goes in a compact cache; check: of a cache that refreshes."""
    batch, heads, _, head_dim = query.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    splits = attention.splits_of(batch * kv_heads, query.device)
    shares = Shares(query, splits, capacity, store)
    full, arrived, now = (shares.total,) * 3 if check is None else (check.full, check.arrived, check.now)
    attention._attend[splits, batch * kv_heads](
        query, key, value, keys, values, length, rows, slots, selected, mean_query, observers,
        full, now, arrived, shares.logits, shares.partial, shares.highest, shares.total,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], kv_heads, capacity, selected.shape[-1],
        stride, threshold or 0.0, scaling * LOG2E,
        G=group, H=heads, D=head_dim, HP=triton.next_power_of_2(heads), DP=padded_head(head_dim),
        MP=max(16, triton.next_power_of_2(group)), OBSERVERS=observers.shape[2] if mode == attention.REFRESH else 1,
        MODE=mode, SIMILARITY=threshold is not None, STORE=store, PRECISION=precision(query),
        **attention.tile_of(query),
    )  # fmt: skip
    return shares


def finish(
    shares: Shares,
    output: Tensor,
    length: Tensor,
    rows: Tensor,
    scores: Tensor,
    cache_shape: torch.Size,
    pool_kernel: int = 1,
    recent_window: int = 0,
    sink_tokens: int = 0,
    observed: bool = False,
    check: Check | None = None,
) -> None:
    """The second launch: merges the shares into output (B, 1, H, D), counts the token; with `check`, ranks the
    positions of full rows from the logits (B, H, L) or, if `observed`, from scores (B, Hkv, L)."""
    batch, kv_heads, capacity, head_dim = cache_shape
    group = output.shape[2] // kv_heads
    full, rankings = (shares.total,) * 2 if check is None else (check.full, check.rankings)
    programs = min(triton.cdiv(capacity, attention.RANKED), max(1, RANKING_PROGRAMS // (batch * kv_heads)))
    attention._finish[group + (0 if check is None else programs), batch * kv_heads](
        shares.partial, shares.highest, shares.total, output, length, rows, full, shares.logits, scores,
        rankings, kv_heads, capacity, shares.splits, recent_window, sink_tokens,
        G=group, GP=triton.next_power_of_2(group), D=head_dim, DP=padded_head(head_dim),
        NP=max(2, triton.next_power_of_2(shares.splits)), POOL=pool_kernel, RANK=check is not None,
        OBSERVED=observed, BLOCK=attention.RANKED, num_warps=4, **SAME_IN_ALL_THREADS,
    )  # fmt: skip


def select(
    check: Check,
    length: Tensor,
    rows: Tensor,
    selected: Tensor,
    ranking: Tensor,
    mean_query: Tensor,
    full_steps: Tensor,
    *,
    stride: int,
    threshold: float | None,
) -> None:
    """The last launch of a step: the selections of the rows, of one layer or of several, that were full."""
    batch, kv_heads, capacity = check.rankings.shape
    head_dim, device = mean_query.shape[1], selected.device
    parts = selection.parts_of(batch * kv_heads, capacity)
    sizes = selection.sizes_of(capacity, selected.shape[2], parts)
    doubts = torch.empty(batch, kv_heads, parts, sizes["DOUBTS"], dtype=torch.int32, device=device)
    # a part's positions begin with a block that the row's own first position may be in
    room = triton.cdiv(triton.cdiv(capacity + sizes["BLOCK"], parts), sizes["BLOCK"]) * sizes["BLOCK"]
    stage = torch.empty(batch, kv_heads, parts, 2, room, dtype=torch.int32, device=device) if parts > 1 else doubts
    counts = torch.empty(batch, kv_heads, parts, 2, dtype=torch.int32, device=device) if parts > 1 else doubts
    selection._select[batch * kv_heads, parts](  # many layers and rows: more than the other dimensions take
        check.rankings, doubts, stage, counts, check.arrived, selected, ranking, rows, length, check.full, full_steps,
        check.now, mean_query, kv_heads, capacity, selected.shape[2], room, selection.MARGIN,
        D=head_dim, DP=padded_head(head_dim), SIMILARITY=threshold is not None, TAIL=TAIL,
        LAST_RANKS=last_ranks(stride, threshold), num_warps=selection.WARPS, **sizes,
    )  # fmt: skip


def _observed_scores(
    observers: Tensor, keys: Tensor, rows: Tensor, full: Tensor, splits: int, scaling: float
) -> Tensor:
    """Mean over the observing queries of their group's highest probability: (B, Hkv, L) float32, of full rows."""
    batch, heads, window, head_dim = observers.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    group, pairs = heads // kv_heads, batch * kv_heads
    highest = torch.empty(batch, heads, window, splits, dtype=torch.float32, device=observers.device)
    total = torch.empty_like(highest)
    scores = torch.empty(batch, kv_heads, capacity, dtype=torch.float32, device=observers.device)
    shared = {"G": group, "D": head_dim, "DP": padded_head(head_dim), "PRECISION": precision(keys)}
    small = keys.element_size() * padded_head(head_dim) > 256
    tile = min(16 if small else 64, max(16, triton.next_power_of_2(window * group)))
    observing._observer_sums[splits, triton.cdiv(window * group, tile), pairs](
        observers, keys, rows, full, highest, total, kv_heads, capacity, scaling * LOG2E,
        OBSERVERS=window, BLOCK_M=tile, BLOCK_N=32 if small else 64, **shared,
    )  # fmt: skip
    programs = min(triton.cdiv(capacity, 128), max(1, RANKING_PROGRAMS // pairs))
    observing._observer_scores[programs, pairs](
        observers, keys, rows, full, highest, total, scores, kv_heads, capacity, splits, scaling * LOG2E,
        GP=max(16, triton.next_power_of_2(group)), NP=max(2, triton.next_power_of_2(splits)), OBSERVERS=window,
        BLOCK_N=32 if small else 128, **shared, **SAME_IN_ALL_THREADS,
    )  # fmt: skip
    return scores


def last_ranks(stride: int, threshold: float | None) -> int:
    """How many of the lowest ranks a selection keeps in order at a time."""
    return min(stride, TAIL) if threshold is None else TAIL


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
