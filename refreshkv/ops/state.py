"""Structs of tensors and numbers that operations take instead of long argument lists.

Shapes: `B` batch rows, `T` positions, `P` prompt length, `R = T - P`, `S` stride, `C` decision steps, the prompt's end
included, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens the cache has room for, `W` slots of a
selection, `O` observing queries, `N` layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LAST_FULL, BUDGET, PADDING, PROMPT_LENGTH = range(4)
"""Columns of a `row_state` (B, 4) int64: position of the last full or selecting step, budget K, padded columns, length
of the last prompt block.
A compact cache counts the entries ever used in column 0 and leaves the last two at zero."""

ENTRIES_USED = LAST_FULL
"""Column 0 of a compact cache's `row_state`."""

UNBOUNDED = 2**31 - 1
"""More steps than any text has."""

SORTED_RANKS = 16
"""How many of the lowest ranks the kernels of a decoding step sort at a time: a queue drops them one by one."""


class SoftmaxTerms(NamedTuple):
    """Terms by which some models change the softmax (docs/specification.md, section 14)."""

    sinks: Tensor | None = None
    """(H,): the softmax of each query head has the further term exp(sink) in its denominator; None: no such term."""
    softcap: float | None = None
    """Each logit `x` becomes `softcap * tanh(x / softcap)`; None: no softcap."""

    @property
    def is_plain(self) -> bool:
        """Whether the softmax is the ordinary one."""
        return self.sinks is None and self.softcap is None

    def cap(self, logits: Tensor) -> Tensor:
        """The logits after the softcap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def softmax(self, logits: Tensor, kv_heads: int) -> Tensor:
        """Softmax over the last dimension of capped and masked logits (B, Hkv, G, ...), with the sinks in the
        denominator. A row in which nothing is visible gives zeros with sinks, and nan without."""
        if self.sinks is None:
            return logits.softmax(dim=-1)
        ones = (1,) * (logits.dim() - 3)
        sinks = self.sinks.to(logits.dtype).view(1, kv_heads, -1, *ones).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1]


PLAIN_SOFTMAX = SoftmaxTerms()
"""The ordinary softmax."""


class SelectionOptions(NamedTuple):
    """How a full step ranks positions (specification, section 5); `RefreshConfig` documents the fields."""

    pool_kernel: int
    observation_window: int
    recent_window: int
    sink_tokens: int
    pool_ahead: bool = False

    @property
    def pooled_before(self) -> int:
        """Positions of the pooling window that lie before its own position."""
        return self.pool_kernel - 1 if self.pool_ahead else self.pool_kernel // 2


class StepOptions(NamedTuple):
    """When a decoding step is full or selecting, and what it then keeps."""

    stride: int
    threshold: float | None
    selection: SelectionOptions
    select_stride: int | None = None

    def flat(self) -> tuple:
        """stride, threshold, the selection's options and select_stride, for an operator."""
        return self.stride, self.threshold, *self.selection, self.select_stride

    @property
    def has_full_steps(self) -> bool:
        """Whether steps after the prompt may be full."""
        return self.threshold is not None or self.stride < UNBOUNDED

    @property
    def longest_segment(self) -> int:
        """Most steps from one selection to the next."""
        stride = self.stride if self.threshold is None else UNBOUNDED
        return min(stride, UNBOUNDED if self.select_stride is None else self.select_stride)

    @property
    def last_ranks(self) -> int:
        """How many of the lowest ranks a selection keeps in order at a time."""
        if self.select_stride is not None:  # the queue drops none at the first step of a segment, and then one a step
            return min(max(self.longest_segment - 2, 0), SORTED_RANKS)
        return min(self.longest_segment, SORTED_RANKS)


PARTIAL_STEPS = StepOptions(UNBOUNDED, None, SelectionOptions(1, 1, 0, 0))
"""No step is full or selecting."""


class FullSteps(NamedTuple):
    """The full steps, or the selecting steps, for which an operation computes selections."""

    positions: Tensor
    """(B, C) int64: the step's position, or -1 where the step is not full."""
    budgets: Tensor
    """(B,) int64: the budget K of each batch row."""
    left_padding: Tensor
    """(B,) int64: padded columns of each batch row."""
    width: int
    """Slots of a selection, at least the largest `min(K, position + 1)`."""
    droppable: int
    """How many of the lowest ranks the queue can drop within a segment. Only these must be sorted."""
    look_ahead: Tensor | None = None
    """(B, H, C, m, D): the look-ahead queries of each step, further observers (specification, section 13). None without
    any."""


class Plan(NamedTuple):
    """The refresh pattern of known tokens in one layer (specification, section 8)."""

    full_positions: Tensor
    """(B, C) int64: the decision step's position where it was full, else -1. The first is the prompt's end, always
    full; decision step `c` is at position `P - 1 + c * S`."""
    latest: Tensor
    """(B, C) int64: the last full decision step at or before each."""
    budgets: Tensor
    """(B,) int64: the budget K of each batch row."""
    left_padding: Tensor
    """(B,) int64: padded columns of each batch row."""
    prompt_length: int
    """P, padded columns included."""
    stride: int
    """S, at most T: the last interval ends with the sequence."""
    width: int
    """Slots of a selection: `min(K, T)` for the largest K."""
    droppable: int
    """How many of the lowest ranks the queue can drop before the next full step."""
    uniform: bool
    """Whether every decision step is full and no batch row is padded."""
    recurring: bool
    """Whether later passes have the same prompt length and stride, so that planning kernels for this shape pays."""
    selecting_positions: Tensor | None = None
    """(B, E) int64: the positions of the selecting steps, -1 where such a step is full (specification, section 10).
    None without selecting steps."""
    score_bits: int = 16
    """Bits of the score keys."""
    select_stride: int | None = None
    """Decoding steps from one selecting step to the next, None without selecting steps."""
    full_look_ahead: Tensor | None = None
    """(B, H, C, m, D): the look-ahead queries of the full steps; None without any."""
    selecting_look_ahead: Tensor | None = None
    """(B, H, E, m, D): likewise of the selecting steps."""

    @property
    def steps(self) -> FullSteps:
        """The full steps, as a selection takes them."""
        kept = (self.budgets, self.left_padding, self.width, self.droppable)
        return FullSteps(self.full_positions, *kept, self.full_look_ahead)

    @property
    def selecting_steps(self) -> FullSteps:
        """The selecting steps, as a selection takes them. The plan must have some."""
        return self.steps._replace(positions=self.selecting_positions, look_ahead=self.selecting_look_ahead)

    @property
    def selecting(self) -> int:
        """E: number of steps at multiples of the select stride, including those that are full."""
        return 0 if self.selecting_positions is None else self.selecting_positions.shape[1]


class AttentionInputs(NamedTuple):
    """Inputs of the attention kernels for known positions."""

    query: Tensor
    """(B, H, Q, D): the queries of the last Q positions."""
    key: Tensor
    """(B, Hkv, T, D)."""
    value: Tensor
    """(B, Hkv, T, D)."""
    scaling: float
    terms: SoftmaxTerms = PLAIN_SOFTMAX


class Decisions(NamedTuple):
    """The state that a selection writes: one layer's decisions so far. The tensors of N layers are (N, B, ...)."""

    row_state: Tensor
    """(B, 4) int64, by the columns above."""
    selected: Tensor
    """(B, Hkv, W) int32: the selected positions, best first; only the ranks that may soon be dropped are certain to be
    sorted."""
    ranking: Tensor
    """(B, Hkv, W) int32: the bits of their scores, by which the kernels sort."""
    mean_query: Tensor
    """(B, D) float32: the mean query of the last full step."""
    full_steps: Tensor
    """(B, L) bool: which positions were full."""


class LayerState(NamedTuple):
    """The state of one layer's cache, which a decoding step changes in place."""

    keys: Tensor
    """(B, Hkv, L, D)."""
    values: Tensor
    """(B, Hkv, L, D)."""
    length: Tensor
    """() int64: tokens so far."""
    row_state: Tensor
    """As in `Decisions`, like the next three."""
    selected: Tensor
    ranking: Tensor
    mean_query: Tensor
    observers: Tensor
    """(B, H, O, D): the last queries, position `p` in slot `p % O`."""
    full_steps: Tensor

    @property
    def decisions(self) -> Decisions:
        """The part that a selection writes."""
        return Decisions(self.row_state, self.selected, self.ranking, self.mean_query, self.full_steps)


class SelectingState(NamedTuple):
    """What a layer's cache also holds if it has selecting steps: the score keys, and which steps were selecting.

    Without selecting steps all three are None in an operator's arguments.
    """

    codes: Tensor | None
    """The stored codes of the score keys, as `refreshkv.ops.naive.score_keys.quantize` makes them: (B, Hkv, L, D) int8
    or (B, Hkv, L, D / 2) uint8. None with 16 bits: the keys themselves are the score keys."""
    scales: Tensor | None
    """(B, Hkv, L) float32, or None."""
    selecting_steps: Tensor | None
    """(B, L) bool: which positions were selecting steps."""

    @property
    def bits(self) -> int:
        """Bits of the score keys."""
        if self.codes is None:
            return 16
        return 4 if self.codes.dtype == torch.uint8 else 8


class NearState(NamedTuple):
    """The small cache, on the GPU, of a layer with keys and values in host memory. It has C slots: `0 .. W-1` hold the
    selected tokens, in any order, and the slots from W on the tokens since the selection."""

    keys: Tensor
    """(B, Hkv, C, D)."""
    values: Tensor
    """(B, Hkv, C, D)."""
    length: Tensor
    """() int64: the slot of the step's own token."""
    row_state: Tensor
    """(B, 4) int64: as in `Decisions`, by slots in place of positions."""
    selected: Tensor
    """(B, Hkv, W) int32: the slots of the selected tokens by rank. A selecting step attends to its own token as the
    newest one; until the next step the token's rank has the slot of the last rank instead."""
    held: Tensor
    """(B, Hkv, W) int32: the position of the token in each slot, -1 for an empty slot."""
    slot_of: Tensor
    """(B, Hkv, L) int32: the slot of each position's token, -1 where it is not held."""
    own: Tensor
    """(B, Hkv, 2) int32: the rank and the slot of the token of the last selecting step, -1 before the first."""
    fetched: Tensor
    """(B, Hkv, W) int32: the position of the token that each slot fetches at this step, -1 for none."""
    wanted: Tensor
    """(B,) bool: whether this step fetches."""

    def as_layer(self, state: LayerState, observers: Tensor) -> LayerState:
        """The small cache as the state of a layer that takes PARTIAL_STEPS only. Such steps do not change the remaining
        fields, which are those of the layer's `state`; observers: (B, H, 1, D), any values."""
        small = (self.keys, self.values, self.length, self.row_state, self.selected)
        return LayerState(*small, state.ranking, state.mean_query, observers, state.full_steps)


class CompactState(NamedTuple):
    """The state of a cache of at most K entries. Its buffers have `E = K + 1` entries, so that a full cache has one
    free entry for the next token."""

    keys: Tensor
    """(B, Hkv, E, D)."""
    values: Tensor
    """(B, Hkv, E, D)."""
    length: Tensor
    """() int64: tokens so far."""
    row_state: Tensor
    """(B, 4) int64: entries ever used, K, 0, 0."""
    slots: Tensor
    """(B, Hkv) int64: the entry that the next token takes."""
    scores: Tensor
    """(B, Hkv, E) float32: for H2O, each entry's probability summed over queries, the maximum over the group at
    each."""
    positions: Tensor
    """(B, Hkv, E) int64: for H2O, the entries' positions."""


class SelectionScratch(NamedTuple):
    """What a decoding step writes for the selection at its end: (B, ...) for one layer, (N, B, ...) for several."""

    full: Tensor
    """(B,) int32: the step's position where it was full, else -1."""
    arrived: Tensor
    """(B, Hkv) int32: zeros; a counter of the selection's programs."""
    rankings: Tensor
    """(B, Hkv, L) int32: the ranking of each position in batch rows whose step is full, the higher the better."""
    now: Tensor
    """(B, D) float32: the step's mean query in batch rows whose step is full, written under the similarity schedule
    only."""

    @classmethod
    def empty(
        cls, batch: tuple[int, ...], kv_heads: int, capacity: int, head_dim: int, device: torch.device
    ) -> "SelectionScratch":
        """Uninitialised memory; batch: (B,) or (N, B)."""
        return cls(
            torch.empty(batch, dtype=torch.int32, device=device),
            torch.empty(*batch, kv_heads, dtype=torch.int32, device=device),
            torch.empty(*batch, kv_heads, capacity, dtype=torch.int32, device=device),
            torch.empty(*batch, head_dim, dtype=torch.float32, device=device),
        )

    def of(self, layer: int) -> "SelectionScratch":
        """The scratch tensors of one of several layers."""
        return SelectionScratch(*(part[layer] for part in self))
