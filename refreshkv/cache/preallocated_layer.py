"""A cache layer that keeps keys and values in preallocated buffers of fixed address.

A decoding step can therefore be captured into a CUDA graph. Nothing in it is read by the host.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens so far.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import PADDING
from refreshkv.settings import SettingsError

CANNOT_CROP = (
    "RefreshCache cannot take tokens back (a selection may rest on them), other than the last step after "
    "activate_past_recording(): use generate() without an assistant"
)


class Phase(Enum):
    """The state of a layer, which determines how it treats the next tokens.

    EMPTY -> [FILLED ->] BLOCK -> DECODING -> STEP -> DECODING -> ... ; DECODING -> [CONTINUING ->] BLOCK for a further
    part of a prompt or another turn. A compiled step stays in DECODING. `reset` leads back to EMPTY.
    """

    EMPTY = "no tokens"
    FILLED = "the first tokens of a prompt from an earlier run; the rest must follow as a block"
    BLOCK = "a block of tokens was appended, and its attention has not ended yet"
    DECODING = "a single token is a decoding step, several are a block"
    STEP = "a decoding step's token was announced, and its attention has not ended yet"
    CONTINUING = "the next tokens belong to the prompt, even a single one"


class PreallocatedLayer(CacheLayerMixin):
    """A layer whose keys and values stay in buffers of fixed size and address.

    The first tokens are a block of a prompt, and so is every later call with more than one token. `update` appends a
    block, and `end_block` follows after its attention. For a decoding step, `update` only returns the single token's
    key and value; the decoding operator that `step` calls appends them.
    """

    is_croppable = True
    """Whether the last decoding step can be taken back (`PreallocatedCache.crop`)."""
    is_sliding = False
    batch_state: tuple[str, ...] = ("keys", "values")
    """Names of the tensors whose first dimension is the batch."""
    takes_prefix = True
    """Whether `load_prefix` may fill in the first tokens; False if the selection needs the queries of all tokens."""
    takes_terms = False
    """Whether the layer supports attention sinks and a softcap (`refreshkv.ops.state.SoftmaxTerms`)."""
    takes_look_ahead: bool | None = None
    """Whether the layer's selection supports look-ahead queries; None: its selection does not depend on them."""
    takes_other_values = False
    """Whether values may have another size than keys."""
    stores_compiled_block = False
    """Whether the next block is one of drafts and compiled (`RefreshLayer.compiled_block`)."""
    last_queries = 1
    """How many tokens of a prompt must follow a prefix from `load_prefix`, because the layer needs their queries."""
    columns: Tensor | None = None
    """(n,) int64: the columns of the tokens that a block computes again; None: a block is appended."""
    # Tensors that exist from the first tokens on; transformers' class declares them as possibly None.
    keys: Tensor
    values: Tensor
    cumulative_length: Tensor
    row_state: Tensor
    device: torch.device

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.phase = Phase.EMPTY
        self.known_length: int | None = 0
        """Tokens so far; None after compiled steps, which only the device counts."""
        self.prefix_length = 0
        """Number of tokens from `load_prefix`, until the block after them ends."""
        self.block_end = 0
        """Tokens at the end of the last block; decoding steps count from there."""
        self.copies: torch.Event | torch.cuda.Event | None = None
        """Event behind copies on another stream; the next attention waits for it."""
        # Whether generate() may compile a decoding step: on a GPU the naive form reads decisions back to the host.
        self.is_compileable = not CHOICE.naive_only

    # ---- for the attention

    @property
    def is_decoding(self) -> bool:
        """Whether the tokens of the last `update` are a decoding step."""
        return self.phase in (Phase.DECODING, Phase.STEP)

    def validate_attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raises `SettingsError` unless key (B, Hkv, L, D) and value (B, Hkv, L, E) of an attention are those of the
        last `update`, in number and size of heads, and this is its first attention."""
        if self.phase not in (Phase.BLOCK, Phase.STEP) or (self.phase is Phase.STEP and query.shape[2] != 1):
            raise SettingsError(
                "the model computes several attentions from one key and value in a layer, for which a small cache "
                "would need a selection each"
            )
        if self._heads(key, value) != self._heads(self.keys, self.values):
            raise SettingsError(
                "the model attends to other keys and values than it puts into the cache (of other heads or sizes), so "
                "those in the cache cannot be selected"
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of new tokens, (B, Hkv, n, D) each.

        Returns those of all tokens, (B, Hkv, L, D), for a block, and the token's own for a decoding step.
        """
        if self.phase is not Phase.DECODING or key_states.shape[2] != 1:
            return self._append(key_states, value_states)  # pyright: ignore[reportAttributeAccessIssue]  # disable()
        if torch.compiler.is_compiling():
            self.known_length = None
        else:
            self._announce_step(key_states, value_states)
        return key_states, value_states

    def end_block(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        """Ends a block of a prompt after its attention: prepares what decoding steps read.

        query (B, H, n, D): the block's queries; left_padding (B,) int64.
        """
        raise NotImplementedError

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One decoding step: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        raise NotImplementedError

    def _announce_step(self, key_states: Tensor, value_states: Tensor) -> None:
        self._validate_shape(key_states, value_states)
        if self.known_length is not None:
            self._validate_room(self.known_length + 1)
            self.known_length += 1
        self.phase = Phase.STEP

    @torch.compiler.disable
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a block."""
        self._validate_attended()
        start = self.length
        if start > 0:
            self._validate_shape(key_states, value_states)
        else:
            self.reserve(key_states, value_states)
        self._wait_for_copies()
        end = start + key_states.shape[2]
        self._validate_room(end)
        keys, values = self._store(key_states, value_states, start, end)
        self.known_length = end
        self.cumulative_length.fill_(end)
        self.phase = Phase.BLOCK
        return keys, values

    def _store(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Writes the tokens `start .. end - 1`; returns the keys and values that the block attends to."""
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _start_decoding(self) -> None:
        """Ends `end_block`: from here on single tokens are decoding steps.

        The buffers are marked as static for CUDA graphs; the buffers of another cache are captured again.
        """
        self.phase = Phase.DECODING
        self.prefix_length, self.block_end = 0, self.length
        self.is_captured = self.attends_by_kernels or self.device.type != "cuda"
        self._mark_static((*self.batch_state, "cumulative_length"))

    @property
    def attends_by_kernels(self) -> bool:
        """Whether GPU kernels compute the layer's decoding steps."""
        return CHOICE.attends_by_kernels(self.keys, self.values)

    def operator(self, step: Callable) -> Callable:
        """The decoding operator `step` for a compiled model. The naive form on a GPU cannot be captured, so it breaks
        the graph."""
        return step if self.is_captured else torch.compiler.disable(step)

    def _mark_static(self, names: tuple[str, ...]) -> None:
        for name in names:
            torch._dynamo.mark_static_address(getattr(self, name), guard=False)

    # ---- a prompt that is known in part, or comes in parts

    def load_prefix(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fills in the first d columns of a prompt, computed in an earlier run. The rest must follow as a block, and
        attends to them.

        Keys and values (B, Hkv, d, D). Raises `ValueError` unless the layer is empty, takes a prefix, and has room for
        the tokens.
        """
        if self.length > 0:
            raise ValueError(f"a cache that holds {self.length} tokens cannot be filled: call reset() first")
        if not self.takes_prefix:
            raise ValueError(f"{type(self).__name__} depends on all queries of a prompt: compute the whole prompt")
        self._append(key_states, value_states)  # pyright: ignore[reportAttributeAccessIssue]  # as above
        self.prefix_length, self.phase = key_states.shape[2], Phase.FILLED

    def wait_for(self, stream: torch.cuda.Stream) -> None:
        """After `load_prefix` with copies that run on `stream`: lets the next attention wait for them."""
        for buffer in (self.keys, self.values):
            buffer.record_stream(stream)
        self.copies = stream.record_event()

    def _wait_for_copies(self) -> None:
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copies)
            self.copies = None

    def continue_prompt(self) -> None:
        """Lets the next tokens be a block of the prompt, even if it is a single one."""
        if self.phase is Phase.DECODING:
            self.phase = Phase.CONTINUING

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles. These cannot hold an autograd graph, so a cache with one is refused."""
        self._validate_copy()
        return dict(vars(self))

    def _validate_copy(self) -> None:
        states = (value for value in vars(self).values() if isinstance(value, Tensor))
        if any(state.requires_grad and not state.is_leaf for state in states):
            raise ValueError(
                "a cache that was filled with gradients cannot be copied: fill it under torch.no_grad(), or call "
                "reset() first"
            )

    # ---- buffers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, _, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim and not self.takes_other_values:
            raise SettingsError(
                f"the model has keys of {head_dim} and values of {value_states.shape[-1]} numbers a head, for which "
                f"{type(self).__name__} has no buffers: decode with RefreshCache(..., offload=False) or FullCache"
            )
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.value_dtype = value_states.dtype
        self.keys, self.values = self._new_buffer(key_states), self._new_buffer(value_states)
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes buffers for the batch rows and heads of (B, Hkv, any, D) keys and values, unless they are there."""
        if not (self.is_initialized and self._shape_of(key_states, value_states) == self._shape):
            with torch.inference_mode(False):  # the buffers outlive the mode in which they were first needed
                self.lazy_initialization(key_states, value_states)

    @property
    def _shape(self) -> tuple:
        """What the buffers were made for: batch rows, key/value heads, sizes of a key and a value, their types,
        device."""
        return self.batch_size, *self._heads(self.keys, self.values), self.dtype, self.value_dtype, self.device

    @staticmethod
    def _shape_of(keys: Tensor, values: Tensor) -> tuple:
        """The same, for (B, Hkv, any, D) keys and values."""
        heads = PreallocatedLayer._heads(keys, values)
        return keys.shape[0], *heads, keys.dtype, values.dtype, keys.device

    @staticmethod
    def _heads(keys: Tensor, values: Tensor) -> tuple[int, int, int]:
        """Key/value heads, and the sizes of a head's key and value."""
        return keys.shape[1], keys.shape[-1], values.shape[-1]

    def _new_buffer(self, like: Tensor) -> Tensor:
        """Zeros for all the tokens that the layer holds, (B, Hkv, capacity, D)."""
        return like.new_zeros(*like.shape[:2], self._capacity(), like.shape[-1])

    def _capacity(self) -> int:
        """Tokens that the buffers hold."""
        return self.max_cache_len

    def _keep(self, name: str, state: Tensor) -> None:
        """Copies a state into its buffer. A buffer that does not fit is replaced by one at a new, lasting address."""
        old = getattr(self, name, None)
        if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (state.shape, state.dtype, state.device):
            old.copy_(state)
        else:
            with torch.inference_mode(False):
                setattr(self, name, state.clone(memory_format=torch.contiguous_format))

    # ---- lengths

    @property
    def length(self) -> int:
        """Tokens so far. Waits for the device if steps were replayed since the host last knew."""
        if self.known_length is None:
            self.known_length = int(self.cumulative_length)
            self._validate_room(self.known_length)
        return self.known_length

    @property
    def exact_length(self) -> int:
        """How many of the first tokens have the same keys and values as under full attention."""
        return self.length

    def synchronize(self) -> None:
        """Waits until kernels have written what the host is about to read from host memory."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._length_on_device():
            return self.max_cache_len, 0
        self._validate_room(self.length + query_length)
        return self.length + query_length, 0

    def get_seq_length(self) -> int | Tensor:
        """Tokens so far. On a GPU a () int64 tensor, as in transformers' static caches: the host does not wait."""
        return self.cumulative_length if self._length_on_device() else self.length

    def _length_on_device(self) -> bool:
        if torch.compiler.is_compiling():
            return self.is_initialized  # a compiled prompt comes before there is a tensor of the length
        return self.is_initialized and self.device.type == "cuda" and self.known_length != 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    # ---- changes of the whole cache

    def reset(self) -> None:
        """Forgets all tokens and decisions; the buffers stay allocated."""
        self.phase = Phase.EMPTY
        self.known_length = self.prefix_length = 0
        self._wait_for_copies()  # or late copies would overwrite the next prompt
        if self.is_initialized:
            self.cumulative_length.zero_()
            for buffer in (value for value in vars(self).values() if isinstance(value, Tensor) and value.requires_grad):
                buffer.detach_()  # without no_grad() their graph would keep everything that was ever written

    def state_changed_by_step(self, length: int) -> tuple[str, ...]:
        """Names of the tensors that the decoding step after `length` tokens may change, except the length and entries
        that are overwritten before anything reads them. The cache copies these tensors, and `crop` restores them."""
        return ()

    def forget_step(self, length: int) -> None:
        """Sets the length back to `length` after a single step. Does not wait for the device."""
        self.known_length = length
        self.cumulative_length.fill_(length)

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(CANNOT_CROP)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_batch(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda state: state.repeat_interleave(repeats, dim=0))

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change` to each tensor that has batch rows."""
        if self.phase is Phase.EMPTY:
            return
        self._validate_attended()
        for name in self.batch_state:
            self._keep(name, change(getattr(self, name)))
        self.batch_size = self.keys.shape[0]
        self._mark_static(self.batch_state)

    # ---- validation

    def _validate_room(self, length: int) -> None:
        validate_room(length, self.max_cache_len)

    def _validate_shape(self, key_states: Tensor, value_states: Tensor) -> None:
        found = self._shape_of(key_states, value_states)
        sizes = ("rows", "key/value heads", "numbers a head", "numbers a value")
        names = (*sizes, "as keys", "as values", "as device")
        for name, expected, given in zip(names, self._shape, found, strict=True):
            if expected != given:
                raise ValueError(f"RefreshCache holds {expected} {name} and was given {given}: call reset() first")

    def _validate_padding(self, left_padding: Tensor, block: int) -> None:
        """Refuses a later block of `block` tokens whose left padding differs from that of the first block."""
        if self.length - block > self.prefix_length and not torch.equal(self.row_state[:, PADDING], left_padding):
            raise ValueError(
                f"the attention_mask hides {left_padding.tolist()} tokens at the rows' beginnings, that of the tokens "
                f"in the RefreshCache {self.row_state[:, PADDING].tolist()}: it covers the cached ones too"
            )

    def _validate_attended(self) -> None:
        """Refuses more tokens while the attention of the last ones has not come."""
        if self.phase in (Phase.BLOCK, Phase.STEP):
            raise RuntimeError(
                "RefreshCache was filled but never refreshed: call refreshkv.enable(model) before using it"
            )


def validate_room(length: int, max_cache_len: int) -> None:
    """Raises `ValueError` if a cache for `max_cache_len` tokens cannot hold `length`."""
    if length > max_cache_len:
        raise ValueError(
            f"RefreshCache is full: {length} tokens, but max_cache_len={max_cache_len}; make it at least the prompt "
            "plus max_new_tokens"
        )
