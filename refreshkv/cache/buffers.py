"""Cache layers whose keys and values stay in buffers of fixed size and address, and a cache of such layers.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens so far.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from refreshkv.layers import layer_windows
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import PADDING
from refreshkv.settings import SettingsError


class BufferedLayer(CacheLayerMixin):
    """A layer whose keys and values stay in buffers of fixed size and address, so that a decoding step can be captured
    into a CUDA graph: nothing in it is read by the host.

    The first block of tokens is a prompt, and so is every later block of more than one token; `begin` follows it. In
    between, `update` hands the single token through, and the decoding operator appends it.
    """

    is_croppable = False
    is_sliding = False
    per_row: tuple[str, ...] = ("keys", "values")
    """Names of the state that has a part for each batch row."""
    needs_queries = False
    """Whether `fill` wants the tokens' queries too: what is kept of a prompt depends on all of them."""
    last_queries = 1
    """Tokens of a prompt that have to follow what `fill` put in, for their queries are needed."""
    can_take_back = True
    """Whether `take_back` undoes a decoding step."""
    tells_steps = True
    """Whether a decoding step does anything else than a prompt block of one token."""

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.known_length: int | None = 0
        self.filled_length = 0
        self.prompt_end = 0
        self.arrival: torch.cuda.Event | None = None
        self.is_decoding = False
        self.awaits_attention = False
        # whether generate() may compile a decoding step; on a GPU the naive form reads decisions back to the host
        self.is_compileable = not CHOICE.naive_only

    @property
    def length(self) -> int:
        """Tokens so far. Waits for the device if steps were replayed since the host last knew."""
        if self.known_length is None:
            self.known_length = int(self.cumulative_length)
            self._check_room(self.known_length)
        return self.known_length

    @property
    def exact_length(self) -> int:
        """The first tokens, as many of them as full attention would have left just so."""
        return self.length

    def settle(self) -> None:
        """Before the host reads what kernels still write."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, _, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise ValueError(f"keys of {head_dim} and values of {value_states.shape[-1]} numbers are not supported")
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.value_dtype = value_states.dtype
        self.keys, self.values = self._new_buffer(key_states), self._new_buffer(value_states)
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        # tells the mask function whose length it is given, and how many tokens fit
        self.cumulative_length.refreshkv_max_cache_len = self.max_cache_len
        self.is_initialized = True

    @property
    def _shape(self) -> tuple:
        """Of what the buffers were made for: rows, key/value heads, head size, types of keys and values, device."""
        return self.batch_size, self.keys.shape[1], self.keys.shape[-1], self.dtype, self.value_dtype, self.device

    @staticmethod
    def _shape_of(keys: Tensor, values: Tensor) -> tuple:
        """The same of (B, Hkv, any, D) keys and values."""
        return keys.shape[0], keys.shape[1], keys.shape[-1], keys.dtype, values.dtype, keys.device

    def _new_buffer(self, like: Tensor) -> Tensor:
        """Zeros for all the tokens that the layer holds, (B, Hkv, capacity, D)."""
        return like.new_zeros(*like.shape[:2], self._capacity(), like.shape[-1])

    def _capacity(self) -> int:
        """Tokens that the buffers hold."""
        return self.max_cache_len

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes buffers for as many rows and heads as (B, Hkv, any, D) keys and values have, unless they are there."""
        if not (self.is_initialized and self._shape_of(key_states, value_states) == self._shape):
            with torch.inference_mode(False):  # the buffers outlive the mode in which they were first wanted
                self.lazy_initialization(key_states, value_states)

    def fill(self, key_states: Tensor, value_states: Tensor, query_states: Tensor | None = None) -> None:
        """Puts in the first d columns of a prompt, known from an earlier run. The rest of it has to follow, and attends
        to them. Keys and values (B, Hkv, d, D), and if the layer `needs_queries` the queries (B, H, d, D).

        Raises `ValueError` unless the layer is empty and the tokens have room in it.
        """
        if self.length > 0:
            raise ValueError(f"a cache that holds {self.length} tokens cannot be filled: call reset() first")
        if self.needs_queries and query_states is None:
            raise ValueError(f"{type(self).__name__} depends on all queries of a prompt: fill it with them too")
        self._append(key_states, value_states)
        self.filled_length, self.awaits_attention = key_states.shape[2], False

    def arrives(self, stream: torch.cuda.Stream) -> None:
        """What `fill` puts in is copied on this stream: the first attention waits until it has come."""
        for buffer in (self.keys, self.values):
            buffer.record_stream(stream)
        self.arrival = stream.record_event()

    def _await_arrival(self) -> None:
        """From here on the computation comes after what was copied on another stream."""
        if self.arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrival)
            self.arrival = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Takes (B, Hkv, n, D) keys and values. Of a prompt block: all tokens' so far, (B, Hkv, L, D); of a decoding
        step: the token's own, which the attention appends."""
        if self.is_decoding and key_states.shape[2] == 1:
            if torch.compiler.is_compiling():
                self.known_length = None
            else:
                self._check_step(key_states, value_states)
            return key_states, value_states
        return self._append(key_states, value_states)

    def _check_step(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check_refreshed()
        self._check_shape(key_states, value_states)
        if self.known_length is not None:
            self._check_room(self.known_length + 1)
            self.known_length += 1
        self.awaits_attention = True

    @torch.compiler.disable
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a prompt block."""
        self._check_refreshed()
        if self.tells_steps:
            check_chunks()
        start = self.length
        if start > 0:
            self._check_shape(key_states, value_states)
        else:
            self.reserve(key_states, value_states)
        self._await_arrival()
        end = start + key_states.shape[2]
        self._check_room(end)
        keys, values = self._store(key_states, value_states, start, end)
        self.known_length = end
        self.cumulative_length.fill_(end)
        self.is_decoding, self.awaits_attention = False, True
        return keys, values

    def _store(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _check_room(self, length: int) -> None:
        check_room(length, self.max_cache_len)

    def _check_shape(self, key_states: Tensor, value_states: Tensor) -> None:
        found = self._shape_of(key_states, value_states)
        names = ("row_state", "key/value heads", "numbers a head", "as keys", "as values", "as device")
        for name, held, given in zip(names, self._shape, found, strict=True):
            if held != given:
                raise ValueError(f"RefreshCache holds {held} {name} and was given {given}: call reset() first")

    def _check_padding(self, left_padding: Tensor, block: int) -> None:
        """That the last `block` tokens, a later part of a prompt or another turn, come with the rows' first padding."""
        if self.length - block > self.filled_length and not torch.equal(self.row_state[:, PADDING], left_padding):
            raise ValueError(
                f"the attention_mask hides {left_padding.tolist()} tokens at the rows' beginnings, that of the tokens "
                f"in the RefreshCache {self.row_state[:, PADDING].tolist()}: it covers the cached ones too"
            )

    def _check_refreshed(self) -> None:
        if self.awaits_attention:
            raise RuntimeError(
                "RefreshCache was filled but never refreshed: call refreshkv.enable(model) before using it"
            )

    def _keep(self, name: str, state: Tensor) -> None:
        """Puts a state into its buffer; the buffer is made, at an address that stays, if none fits."""
        old = getattr(self, name, None)
        if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (state.shape, state.dtype, state.device):
            old.copy_(state)
        else:
            with torch.inference_mode(False):
                setattr(self, name, state.clone(memory_format=torch.contiguous_format))

    def _end_prompt(self) -> None:
        """From here on single tokens are decoding steps. Tells CUDA graphs that the buffers stay where they are; those
        of another cache are recorded anew."""
        self.is_decoding, self.awaits_attention = True, False
        self.filled_length, self.prompt_end = 0, self.length
        self.is_captured = CHOICE.uses_kernels(self.keys) or self.device.type != "cuda"
        self._mark_addresses((*self.per_row, "cumulative_length"))

    def changed_by_step(self, length: int) -> tuple[str, ...]:
        """Names of the state that the decoding step after `length` tokens may change, other than `length` itself and
        what is overwritten before anything reads it: who wants that step back copies it, and puts it in again."""
        return ()

    def take_back(self, length: int) -> None:
        """After the one decoding step that made `length` tokens one more, and with the state that `changed_by_step`
        names put in again: as if that step had never been. Does not wait for the device."""
        self.known_length = length
        self.cumulative_length.fill_(length)

    def operator(self, step: Callable) -> Callable:
        """A decoding operator, as it may be compiled: the naive form on a GPU breaks the graph instead."""
        return step if self.is_captured else torch.compiler.disable(step)

    def _mark_addresses(self, names: tuple[str, ...]) -> None:
        for name in names:
            torch._dynamo.mark_static_address(getattr(self, name), guard=False)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._length_on_device():
            return self.max_cache_len, 0
        self._check_room(self.length + query_length)
        return self.length + query_length, 0

    def get_seq_length(self) -> int | Tensor:
        """Tokens so far: on a GPU a () int64 tensor, as in transformers' static caches, so that nobody waits for it."""
        return self.cumulative_length if self._length_on_device() else self.length

    def _length_on_device(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        return self.is_initialized and self.device.type == "cuda" and self.known_length != 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        """Forgets all tokens and decisions; the buffers stay allocated."""
        self.known_length = self.filled_length = 0
        self.is_decoding = self.awaits_attention = False
        self._await_arrival()  # or late copies would meet those of the next prompt
        if self.is_initialized:
            self.cumulative_length.zero_()
            for buffer in (self.keys, self.values):
                buffer.detach_()  # without no_grad() they would hold on to everything that was ever written

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "RefreshCache cannot take tokens back (a selection may rest on them): use generate() without an assistant"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_rows(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def _change_rows(self, change) -> None:
        if self.known_length == 0:
            return
        self._check_refreshed()
        for name in self.per_row:
            self._keep(name, change(getattr(self, name)))
        self.batch_size = self.keys.shape[0]
        self._mark_addresses(self.per_row)


def check_chunks() -> None:
    """`ValueError` if generate() is processing a prompt in chunks of which one is a single token: but for the cache's
    first tokens, nothing that it is given tells that from a decoding step."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_prefill":
        frame = frame.f_back
    chunks = [] if frame is None else frame.f_locals.get("input_chunks", [])
    if len(chunks) > 1 and any(chunk.shape[-1] == 1 for chunk in chunks[1:]):
        raise ValueError(
            f"prefill_chunk_size={chunks[0].shape[-1]} cuts {sum(chunk.shape[-1] for chunk in chunks)} tokens so that "
            "a chunk after the first is a single one, which the cache takes for a decoding step: choose another size"
        )


def check_room(length: int, max_cache_len: int) -> None:
    """`ValueError` if a cache for `max_cache_len` tokens cannot hold `length`."""
    if length > max_cache_len:
        raise ValueError(
            f"RefreshCache is full: {length} tokens, but max_cache_len={max_cache_len}; make it at least the prompt "
            "plus max_new_tokens"
        )


class BufferedCache(Cache):
    """A cache of `make_layer()` for each full-attention layer; sliding-window layers keep one of transformers' own.

    Raises `SettingsError` unless max_cache_len, the most tokens per row, is a number.
    """

    def __init__(self, model_config: PretrainedConfig, max_cache_len: int, make_layer: Callable[[], BufferedLayer]):
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise SettingsError(f"max_cache_len must be a whole number >= 1, got {max_cache_len!r}")
        super().__init__(
            layers=[
                make_layer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
                for window in layer_windows(model_config)
            ]
        )
        self.capacity = max_cache_len

    @property
    def can_take_back(self) -> bool:
        """Whether every layer can undo a decoding step."""
        return all(isinstance(layer, BufferedLayer) and layer.can_take_back for layer in self.layers)

    @property
    def length(self) -> int:
        """Tokens so far. Waits for the device if steps were replayed since the host last knew."""
        return next(layer.length for layer in self.layers if isinstance(layer, BufferedLayer))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """The update of one layer. Raises `RuntimeError` if an error broke off the model's call before this one."""
        if layer_idx == 0 and not torch.compiler.is_compiling():
            self._check_complete()
            if any(getattr(layer, "tells_steps", False) for layer in self.layers):
                check_chunks()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_complete(self) -> None:
        lengths = {layer.known_length for layer in self.layers if isinstance(layer, BufferedLayer)} - {None}
        if len(lengths) > 1:
            raise RuntimeError(
                f"some layers of the RefreshCache hold {min(lengths)} tokens and some {max(lengths)}, as an error "
                "within the model leaves them: call reset() first"
            )

    def reset(self) -> None:
        """Forgets all tokens and decisions; full-attention layers keep their buffers."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, BufferedLayer):
                layer.reset()
            else:  # some releases of transformers cannot empty these
                self.layers[number] = type(layer)(sliding_window=layer.sliding_window)
