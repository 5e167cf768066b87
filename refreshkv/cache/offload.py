"""Full keys and values in pinned host memory, the small cache on the GPU: for contexts too long for GPU memory.

A decision step reads the host's buffers over the bus, in place, with the same operator as `RefreshLayer`; the selected
tokens are then copied to the GPU. All other steps read GPU memory only. There, near buffers hold the selected tokens in
slots `0 .. W-1`, and behind them the tokens since the last selection. The operator treats the near buffers as an
ordinary cache whose first tokens are the selected ones; a later token `t` is at `t - base`. The number of selected
tokens and of steps since the last selection is the same, and so is the queue (specification, section 4).

Score keys of 8 or 4 bits are on the GPU, so a selecting step selects without reading the host's keys. It copies over
the bus only the selected tokens that the near buffers do not hold yet, into the slots of tokens that are no longer
selected. Then it attends to the near buffers. With `score_bits=16` it computes scores from the host's keys.

The host knows from the step counter which steps are decision or selecting steps; it never reads back what they decided.
Steps are not captured into a CUDA graph. With an observation window a decision step reads the keys twice more. A beam
search, which reorders batch rows, copies them whole in host memory. torch rounds each pinned buffer up to a power of
two; PYTORCH_CUDA_ALLOC_CONF has settings for that.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `W` slots of a selection, `C` slots of
the near buffers.
"""

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from refreshkv import ops
from refreshkv.cache.layer import RefreshLayer
from refreshkv.cache.preallocated_layer import Phase
from refreshkv.config import NEVER, RefreshConfig
from refreshkv.ops import naive
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import LAST_FULL, LayerState, SelectionOptions, StepOptions
from refreshkv.ops.step.operators import choose_step, decode_step
from refreshkv.settings import SettingsError

SLACK = 256
"""Slots of the near buffers beyond those of visible tokens. When all are used, the visible tokens move to the front."""


class OffloadedLayer(RefreshLayer):
    """A `RefreshLayer` whose `keys` and `values` are host memory.

    Further state, on the device: `near_keys`, `near_values` (B, Hkv, C, D): the small cache; `near_row_state` (B, 4),
    `near_selected` (B, Hkv, W), `near_length` (): as `refreshkv.ops.step.operators.decode_step` takes them;
    `near_positions` (B, Hkv, W) int32: the positions of the tokens in slots `0 .. W-1`.
    """

    near_state = ("near_keys", "near_values", "near_row_state", "near_selected", "near_positions")
    batch_state = (*RefreshLayer.batch_state, *near_state)
    takes_terms = takes_other_values = takes_look_ahead = False
    is_croppable = False  # the host has moved tokens

    def __init__(self, max_cache_len: int, config: RefreshConfig):
        super().__init__(max_cache_len, config)
        self.is_compileable = False  # the host decides which buffers a step reads
        steps = min(config.step_options().longest_segment, max_cache_len)
        self.visible = min(self.width, steps) + 1
        """Most tokens since a selection that a queue holds, plus one for the token itself."""

    def _new_buffer(self, like: Tensor) -> Tensor:
        if like.is_cuda and not CHOICE.uses_kernels(like):
            raise SettingsError(
                f"offload=True works through the kernels, which {like.dtype} and REFRESHKV_OPS=naive exclude on a GPU"
            )
        shape = (*like.shape[:2], self.max_cache_len, like.shape[-1])
        return torch.zeros(shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, kv_heads, _, head_dim = key_states.shape
        shape = (batch, kv_heads, self.width + self.visible + SLACK, head_dim)
        self.near_keys, self.near_values = key_states.new_zeros(shape), key_states.new_zeros(shape)
        self.near_row_state = torch.zeros_like(self.row_state)
        self.near_selected, self.near_positions = torch.zeros_like(self.selected), torch.zeros_like(self.selected)
        self.near_length = torch.zeros((), dtype=torch.int64, device=self.device)

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return super().update(key_states, value_states, *args, **kwargs)

    def _store(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        if self.phase in (Phase.DECODING, Phase.CONTINUING):  # a further block
            self._flush(start)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            ops.copy_tokens(states, buffer, 0, start, end - start)
        self._store_score_keys(key_states, start)
        if start > 0:  # a later block attends to all tokens: their copies stay on the device until its attention ends
            key_states, value_states = (self._to_device(buffer, end) for buffer in (self.keys, self.values))
        self.block = (key_states, value_states)
        return self.block

    def _to_device(self, buffer: Tensor, end: int) -> Tensor:
        """The first `end` tokens of a host buffer, on the device.

        A kernel copies them, so that the copy comes after the kernels that still write to the buffer.
        """
        whole = torch.empty(*buffer.shape[:2], end, buffer.shape[3], dtype=buffer.dtype, device=self.device)
        ops.copy_tokens(buffer, whole, 0, 0, end)
        return whole

    def wait_for(self, stream: torch.cuda.Stream) -> None:
        for states in (*self.block, *(getattr(self, name) for name in self.score_state)):
            states.record_stream(stream)
        self.copies = stream.record_event()

    def _known_keys(self) -> Tensor:
        return self.block[0]

    @torch.compiler.disable
    def end_block(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        super().end_block(query, left_padding, scaling)  # pyright: ignore[reportAttributeAccessIssue]  # disable()
        self.flushed = self.length
        every = torch.ones_like(left_padding, dtype=torch.bool)
        for source, target in zip(self.block, (self.near_keys, self.near_values), strict=True):
            ops.gather_tokens(source, self.selected, every, target)
        del self.block
        self.base = self.length - self.width
        self.near_length.fill_(self.width)
        self._hold_in_order(every)
        self._describe()

    @torch.compiler.disable
    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `RefreshLayer.step`: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        position = self.length - 1  # `update` has counted the token
        self._make_room(position)
        if self._is_decision_step(position):
            return self._decision_step(query, key, value, position, scaling)
        if self._is_at_select_stride(position):
            return self._selecting_step(query, key, value, position, scaling)
        self.phase = Phase.DECODING
        self.cumulative_length += 1
        window = self.config.observation_window
        self.observers[:, :, position % window] = query[:, :, 0]
        return self._near_step(query, key, value, self.near_selected, scaling)

    def _near_step(self, query: Tensor, key: Tensor, value: Tensor, selected: Tensor, scaling: float) -> Tensor:
        """A partial step on the near buffers, with the selection of slots `selected`."""
        state = (self.near_keys, self.near_values, self.near_length, self.near_row_state, selected)
        # only full steps change the other fields; a copy of the query, because the step overwrites the one observer
        state = LayerState(*state, self.ranking, self.mean_query, query.clone(), self.full_steps)
        return decode_step(query, key, value, state, StepOptions(NEVER, None, SelectionOptions(1, 1, 0, 0)), scaling)

    def _decision_step(self, query: Tensor, key: Tensor, value: Tensor, position: int, scaling: float) -> Tensor:
        """A step that may be full; it attends to the host's buffers. Batch rows for which it was full, or a selecting
        step, then get a new small cache."""
        self._flush(position)
        output = super().step(query, key, value, scaling)
        if self.drops_many and CHOICE.uses_kernels(query):
            self._sort()
        self.flushed = position + 1
        chose = self.row_state[:, LAST_FULL] == position
        slot = position - self.base
        for source, token, target in (
            (self.keys, key, self.near_keys),
            (self.values, value, self.near_values),
        ):
            ops.copy_tokens(token, target, 0, slot, 1)
            ops.gather_tokens(source, self.selected, chose, target)
        self.near_length += 1
        self._hold_in_order(chose)
        self._describe()
        return output

    def _selecting_step(self, query: Tensor, key: Tensor, value: Tensor, position: int, scaling: float) -> Tensor:
        """A selecting step of all batch rows: selects by the score keys, fetches the tokens that the near buffers lack,
        and attends to the near buffers."""
        self._flush(position)
        self.phase = Phase.DECODING
        chosen, options = self.selecting_state(), self.config.step_options()
        assert chosen is not None  # the schedule has selecting steps
        choose_step(query, key, value, self.state(), options, scaling, chosen)
        if self.drops_many and CHOICE.uses_kernels(query):
            self._sort()
        self.flushed = position + 1
        _, budgets, padding, _ = self.row_state.unbind(1)
        kept = torch.minimum(position + 1 - padding, budgets)
        slots, fetched = naive.place_chosen(self.selected, kept, self.near_positions, self.max_cache_len)
        every = torch.ones_like(kept, dtype=torch.bool)
        for source, target in ((self.keys, self.near_keys), (self.values, self.near_values)):
            ops.gather_tokens(source, fetched, every, target)
        # The step attends to its own token as the newest one; among the selected, the slot of the last rank replaces
        # it.
        near = position - self.base
        last = slots.gather(2, (kept - 1)[:, None, None].expand(-1, slots.shape[1], 1))
        others = torch.where(self.selected == position, last, slots)
        before = torch.full_like(kept, near - 1)
        self.near_row_state.copy_(torch.stack([before, budgets, near + 1 - kept, torch.zeros_like(kept)], dim=1))
        output = self._near_step(query, key, value, others, scaling)
        self.near_selected.copy_(slots)
        self.near_positions.copy_(torch.where(fetched >= 0, fetched, self.near_positions))
        self._describe()
        return output

    def _hold_in_order(self, rows: Tensor) -> None:
        """Notes that slots `0 .. W-1` of the batch rows (B,) bool now hold the selection in its own order."""
        rows = rows[:, None, None]
        slot = torch.arange(self.width, dtype=torch.int32, device=self.device)
        self.near_selected.copy_(torch.where(rows, slot, self.near_selected))
        anchors, budgets, padding, _ = self.row_state.unbind(1)
        exists = slot < torch.minimum(anchors + 1 - padding, budgets)[:, None, None]
        held = torch.where(exists, self.selected, -1)
        self.near_positions.copy_(torch.where(rows, held, self.near_positions))

    def _sort(self) -> None:
        """Sorts the selections by rank. The kernels sort only the lowest ranks, shortly before the queue drops them.
        But the slots of the near buffers stay fixed until the next selection, so all ranks must be sorted here."""
        anchors, budgets, padding, _ = self.row_state.unbind(1)
        size = torch.minimum(anchors + 1 - padding, budgets)[:, None, None]
        slot = torch.arange(self.width, device=self.device)
        rank = (self.ranking.long() << 32) + (0x7FFFFFFF - self.selected)  # ties: the lower position ranks higher
        order = torch.where(slot < size, rank, -1 - slot).argsort(dim=-1, descending=True)
        for state in (self.selected, self.ranking):
            state.copy_(state.gather(2, order))

    def _describe(self) -> None:
        """Writes `near_row_state`, which with `near_selected` describes the near buffers to the operator.

        The padding is chosen so that `min(budget, a + 1 - padding)` is the number of selected tokens.
        """
        anchors, budgets, padding, _ = self.row_state.unbind(1)
        kept = torch.minimum(anchors + 1 - padding, budgets)
        near = anchors - self.base
        self.near_row_state.copy_(torch.stack([near, budgets, near + 1 - kept, torch.zeros_like(near)], dim=1))

    def _make_room(self, position: int) -> None:
        """Before the token at `position`: if the near buffers are full, moves the visible tokens forward."""
        if position - self.base < self.near_keys.shape[2]:
            return
        self._flush(position)
        kept = self.visible - 1  # the token itself comes last
        shift = position - self.base - kept - self.width
        for buffer in (self.near_keys, self.near_values):
            buffer[:, :, self.width : self.width + kept] = buffer[:, :, self.width + shift :].clone()
        self.base += shift
        self.near_length -= shift
        self._describe()

    def _flush(self, position: int) -> None:
        """Copies to the host those tokens before `position` that only the near buffers hold, and stores their score
        keys."""
        if position == self.flushed:
            return
        first = self.flushed - self.base
        for buffer, near in ((self.keys, self.near_keys), (self.values, self.near_values)):
            ops.copy_tokens(near, buffer, first, self.flushed, position - self.flushed)
        self._store_score_keys(self.near_keys[:, :, first : position - self.base], self.flushed)
        self.flushed = position

    def _length_on_device(self) -> bool:
        return False  # steps are not captured, so the host always knows the length

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.phase is Phase.EMPTY:
            return
        if self.phase in (Phase.DECODING, Phase.CONTINUING):
            self._flush(self.length)
        self.synchronize()
        super()._change_batch(change)

    def _keep(self, name: str, state: Tensor) -> None:
        super()._keep(name, state)
        self._pin()

    def synchronize(self) -> None:
        if getattr(self, "is_initialized", False) and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _pin(self) -> None:
        for name in ("keys", "values"):
            buffer = getattr(self, name)
            if self.device.type == "cuda" and not buffer.is_pinned():
                setattr(self, name, buffer.pin_memory())

    def __deepcopy__(self, memo: dict) -> "OffloadedLayer":
        self._validate_copy()
        self.synchronize()
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        if other.is_initialized:
            other._pin()
        return other

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # by then the module's own names are gone
            self.synchronize()
