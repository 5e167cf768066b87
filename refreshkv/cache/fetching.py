"""Full keys and values in pinned host memory, for schedules without full steps: a CUDA graph can capture these steps.

With `stride=NEVER`, a select stride, and score keys of 8 or 4 bits, which are on the GPU, no step after the prompt
reads all of the host's keys. A selecting step selects by the score keys and fetches the selected tokens that the small
cache does not hold yet. Every step attends to the small cache, and stores its token in the host's buffers over the bus.
The device makes all decisions (`refreshkv.ops.step.operators.fetching_step`), so the layer is compiled and captured
like one whose keys and values are on the GPU. `OffloadedLayer` serves the other schedules.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens, `W` slots of a selection.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from refreshkv import ops
from refreshkv.cache.layer import RefreshLayer
from refreshkv.cache.preallocated_layer import Phase
from refreshkv.config import NEVER, RefreshConfig
from refreshkv.ops import naive
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import SORTED_RANKS, NearState
from refreshkv.ops.step.operators import fetching_step
from refreshkv.settings import SettingsError

FAR = ("keys", "values")
"""The buffers in host memory."""


class HostMemory:
    """Pinned host memory as torch takes it for a GPU's: kernels read and write it over the bus, at the same address."""

    def __init__(self, host: Tensor):
        self.host = host
        size = host.numel() * host.element_size()
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 2,
        }

    def on(self, device: torch.device) -> Tensor:
        """The memory as a tensor of the GPU `device`; it keeps the memory alive."""
        return torch.as_tensor(self, device=device).view(self.host.dtype).view(self.host.shape)


class FetchingLayer(RefreshLayer):
    """A `RefreshLayer` whose `keys` and `values` are host memory, with the small cache of `NearState` on the device.

    Further state: `near_...` for each field of `NearState`.
    """

    batch_state = (
        *(name for name in RefreshLayer.batch_state if name not in FAR),
        *(f"near_{name}" for name in NearState._fields if name != "length"),
    )
    takes_terms = takes_other_values = takes_look_ahead = False
    is_croppable = False  # tokens have moved

    @staticmethod
    def serves(config: RefreshConfig) -> bool:
        """Whether the layer can follow a configuration's schedule."""
        selects = config.select_stride is not None and config.score_bits < 16
        return selects and config.stride >= NEVER and config.step_options().longest_segment <= SORTED_RANKS

    def _new_buffer(self, like: Tensor) -> Tensor:
        if like.is_cuda and not CHOICE.uses_kernels(like):
            raise SettingsError(
                f"offload=True works through the kernels, which {like.dtype} and REFRESHKV_OPS=naive exclude on a GPU"
            )
        shape = (*like.shape[:2], self.max_cache_len, like.shape[-1])
        return self._held_by_host(torch.zeros(shape, dtype=like.dtype, pin_memory=like.is_cuda), like.device)

    def _held_by_host(self, host: Tensor, device: torch.device) -> Tensor:
        """A host buffer as a tensor of `device`, without a copy."""
        return HostMemory(host).on(device) if device.type == "cuda" else host

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, kv_heads, _, head_dim = key_states.shape
        segment = self.config.step_options().longest_segment
        shape = (batch, kv_heads, self.width + segment + 1, head_dim)
        self.near_keys, self.near_values = key_states.new_zeros(shape), key_states.new_zeros(shape)
        self.near_row_state = torch.zeros_like(self.row_state)
        self.near_length = torch.zeros((), dtype=torch.int64, device=self.device)
        for name in ("selected", "held", "fetched"):
            setattr(self, f"near_{name}", torch.full_like(self.selected, -1))
        self.near_slot_of = self.selected.new_full((batch, kv_heads, self.max_cache_len), -1)
        self.near_own = self.selected.new_full((batch, kv_heads, 2), -1)
        self.near_wanted = torch.zeros(batch, dtype=torch.bool, device=self.device)

    def near(self) -> NearState:
        """The small cache."""
        return NearState(*(getattr(self, f"near_{name}") for name in NearState._fields))

    def _store(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            ops.copy_tokens(states, buffer, 0, start, end - start)
        self._store_score_keys(key_states, start)
        if start > 0:  # a later block attends to all tokens: their copies stay on the device until its attention ends
            key_states, value_states = (buffer[:, :, :end].clone() for buffer in (self.keys, self.values))
        self.block = (key_states, value_states)
        return self.block

    def wait_for(self, stream: torch.cuda.Stream) -> None:
        for states in self.block:
            states.record_stream(stream)
        super().wait_for(stream)

    def _known_keys(self) -> Tensor:
        return self.block[0]

    @torch.compiler.disable
    def end_block(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        super().end_block(query, left_padding, scaling)  # pyright: ignore[reportAttributeAccessIssue]  # disable()
        near, every = self.near(), torch.ones_like(left_padding, dtype=torch.bool)
        anchors, budgets, padding, _ = self.row_state.unbind(1)
        slot = torch.arange(self.width, dtype=torch.int32, device=self.device)
        exists = slot < torch.minimum(anchors + 1 - padding, budgets)[:, None, None]
        near.held.copy_(torch.where(exists, self.selected, -1))
        near.selected.copy_(slot.expand_as(near.selected))
        near.own.fill_(-1)
        naive.hold_positions(near)
        for source, target in zip(self.block, (near.keys, near.values), strict=True):
            ops.gather_tokens(source, near.held, every, target)
        del self.block
        self._mark_static((*FAR, "near_length"))

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `RefreshLayer.step`: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        self.phase = Phase.DECODING
        chosen, options = self.selecting_state(), self.config.step_options()
        assert chosen is not None  # `serves`
        operator = self.operator(fetching_step)
        return operator(query, key, value, self.state(), chosen, self.near(), options, scaling)

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.phase is Phase.EMPTY:
            return
        self._validate_attended()
        self.synchronize()
        for name in FAR:
            self._keep_far(name, change(getattr(self, name).cpu()))
        super()._change_batch(change)

    def _keep_far(self, name: str, state: Tensor) -> None:
        """Copies keys or values into host memory; buffers that do not fit are replaced."""
        old = getattr(self, name)
        if old.shape == state.shape:
            old.copy_(state)
            return
        with torch.inference_mode(False):
            host = state.clone(memory_format=torch.contiguous_format)
            setattr(self, name, self._held_by_host(host.pin_memory() if old.is_cuda else host, old.device))

    def synchronize(self) -> None:
        if getattr(self, "is_initialized", False) and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def __deepcopy__(self, memo: dict) -> "FetchingLayer":
        self._validate_copy()
        self.synchronize()
        other: FetchingLayer = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        far = {name: getattr(self, name) for name in FAR if self.is_initialized}
        for name in vars(self).keys() - far.keys():
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        for name, buffer in far.items():
            host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
            setattr(other, name, self._held_by_host(host.copy_(buffer), buffer.device))
        return other
