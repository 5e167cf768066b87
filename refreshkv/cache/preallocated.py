"""A cache of preallocated layers: one for each full-attention layer, and transformers' own for all others.

Shapes: `B` batch rows, `Hkv` key/value heads, `D` head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, LinearAttentionLayer

from refreshkv.cache.preallocated_layer import CANNOT_CROP, PreallocatedLayer
from refreshkv.cache.recurrent import change_batch, forget, forget_other_batch
from refreshkv.layers import EMPTY, RECURRENT, layer_kinds, own_layers
from refreshkv.settings import SettingsError


class RowStart(NamedTuple):
    """How a batch row of a cache begins, as given by the calls so far."""

    padding: int | None
    """Columns of padding before the row's first token; None if no call had a mask."""
    offset: int | None
    """Position of a token minus its column; None if the row had no token yet, or only the device knows."""

    def merged(self, later: "RowStart") -> "RowStart":
        """The union of both, after a later call that agrees."""
        return RowStart(*(old if new is None else new for old, new in zip(self, later, strict=True)))


class PreallocatedCache(Cache):
    """A cache of `make_layer()` for each full-attention layer; all other layers keep one of transformers' own.

    Raises `SettingsError` unless max_cache_len, the most tokens per batch row, is a number.
    """

    def __init__(self, config: PretrainedConfig, max_cache_len: int, make_layer: Callable[[], PreallocatedLayer]):
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise SettingsError(f"max_cache_len must be a whole number >= 1, got {max_cache_len!r}")
        self.kinds = layer_kinds(config)
        """The kind of each layer."""
        own = own_layers(config)
        super().__init__(
            layers=[make_layer() if kind.is_refreshed else layer for kind, layer in zip(self.kinds, own, strict=True)]
        )
        self.columns: Tensor | None = None
        """(n,) int64: the columns of the tokens that the next pass computes again; None: a pass appends its tokens."""
        self.is_broken = False
        """Whether an error broke off a pass after layers of transformers' own had changed."""
        self._own_layers_changed = False
        self.first_layer = next((number for number, kind in enumerate(self.kinds) if kind.attends), 0)
        """The layer whose update comes first in a pass."""
        self.capacity = max_cache_len
        self.undo: UndoLog | None = None
        self.row_starts: list[RowStart] | None = None
        """How each batch row begins; None if not known. Later calls must agree with it."""
        self.tokens: Tensor | None = None
        """(B, l): the first l tokens that the cache holds, as `generate` gave them; None if not known."""
        self.tokens_are_compared = False
        """Whether `generate` has compared its prompt with them."""

    @property
    def known_length(self) -> int | None:
        """Tokens so far; None after replayed steps, until `length` has asked the device."""
        return self.preallocated_layers()[0].known_length

    @property
    def inputs_are_known(self) -> bool:
        """Whether the next call's inputs need no validation, for which the host would wait for the device."""
        return self.columns is not None

    @property
    def has_prefix(self) -> bool:
        """Whether the first tokens come from `load_prefix`, and no block has followed yet."""
        return self.preallocated_layers()[0].prefix_length > 0

    @property
    def length(self) -> int:
        """Tokens so far. Waits for the device if steps were replayed since the host last knew."""
        return self.preallocated_layers()[0].length

    def preallocated_layers(self) -> list[PreallocatedLayer]:
        """The full-attention layers."""
        return [layer for layer in self.layers if isinstance(layer, PreallocatedLayer)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The update of one layer. Raises `RuntimeError` if an error broke off the model's call before this one."""
        if not torch.compiler.is_compiling():
            if layer_idx == self.first_layer:
                self._validate_complete()
            self._note_change(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' own; an emptied layer takes another number of batch rows."""
        self._note_change(layer_idx)
        forget_other_batch(self.layers[layer_idx], len(conv_states))
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' own; an emptied layer takes another number of batch rows."""
        self._note_change(layer_idx)
        forget_other_batch(self.layers[layer_idx], len(recurrent_states))
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @property
    def has_own_layers(self) -> bool:
        """Whether some layers are transformers' own, which change at once and cannot go back."""
        return not all(isinstance(layer, PreallocatedLayer) for layer in self.layers)

    def _note_change(self, layer_idx: int) -> None:
        if not isinstance(self.layers[layer_idx], PreallocatedLayer):
            self._own_layers_changed = True

    def break_off(self) -> None:
        """Notes that an error ended a pass: transformers' own layers may hold more tokens than the others now."""
        self.is_broken = self.is_broken or self._own_layers_changed

    def begin_pass(self) -> None:
        """Called before each pass of the model.

        Raises `RuntimeError` if an error broke off the last one after layers of transformers' own had changed.
        """
        if self.is_broken:
            raise RuntimeError(
                f"an error broke off the last pass through the {type(self).__name__}, whose sliding-window and "
                "recurrent layers cannot go back to the state before it: call reset() first"
            )
        self._own_layers_changed = False

    def _validate_complete(self) -> None:
        known = (layer.known_length for layer in self.preallocated_layers())
        lengths = {length for length in known if length is not None}
        if len(lengths) > 1:
            raise RuntimeError(
                f"some layers of the RefreshCache hold {min(lengths)} tokens and some {max(lengths)}, as an error "
                "within the model leaves them: call reset() first"
            )

    def begin_step(self) -> int:
        """Number of tokens that the next decoding step takes: the new one, and perhaps earlier ones that the cache
        removes."""
        return 1

    def continue_prompt(self) -> None:
        """Lets the next tokens be a block of the prompt, even if it is a single one."""
        for layer in self.preallocated_layers():
            layer.continue_prompt()

    def reset(self) -> None:
        """Forgets all tokens and decisions; full-attention layers keep their buffers."""
        self.undo = self.row_starts = self.tokens = None
        self.is_broken = False
        for number, layer in enumerate(self.layers):
            if isinstance(layer, PreallocatedLayer):
                layer.reset()
            elif isinstance(layer, DynamicSlidingWindowLayer):  # some releases of transformers cannot empty these
                self.layers[number] = type(layer)(sliding_window=layer.sliding_window)
            elif isinstance(layer, LinearAttentionLayer):
                forget(layer)

    # ---- changes of the batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As `batch_select_indices`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these batch rows, in this order: numbers (any,) or a mask (B,) bool."""
        if self.known_length == 0:
            return
        indices = row_numbers(indices, self.batch_size)
        self._change_layers(
            lambda layer: layer.batch_select_indices(indices),
            lambda state: state.index_select(0, indices.to(state.device)),
        )
        self.tokens = None if self.tokens is None else self.tokens[indices.to(self.tokens.device)]
        # on a GPU the host does not wait for the numbers
        known = self.row_starts if indices.device.type == "cpu" else None
        self.row_starts = None if known is None else [known[row] for row in indices.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times; the copies are neighbours."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats must be a whole number >= 1, got {repeats!r}")
        self._change_layers(
            lambda layer: layer.batch_repeat_interleave(repeats), lambda state: state.repeat_interleave(repeats, dim=0)
        )
        self.tokens = None if self.tokens is None else self.tokens.repeat_interleave(repeats, dim=0)
        if self.row_starts is not None:
            self.row_starts = [start for start in self.row_starts for _ in range(repeats)]

    def _change_layers(self, attending: Callable[[Any], None], change: Callable[[Tensor], Tensor]) -> None:
        """Changes the batch rows of each layer: by `attending(layer)`, or of a recurrent layer's states by `change`."""
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            if kind.name == RECURRENT:
                change_batch(layer, change)
            elif kind.attends:
                attending(layer)

    # ---- taking back the last step, by the names of transformers

    @property
    def is_croppable(self) -> bool:
        """Whether the last decoding step can be taken back. A recurrent layer keeps no state of earlier steps, and a
        sliding window has dropped tokens."""
        layers = (layer for layer, kind in zip(self.layers, self.kinds, strict=True) if kind.name != EMPTY)
        return all(isinstance(layer, PreallocatedLayer) and layer.is_croppable for layer in layers)

    def activate_past_recording(self) -> None:
        """From here on keeps a copy of what the next step changes, so that `crop(-1)` can take it back.

        Raises `NotImplementedError` if the cache is not croppable.
        """
        if not self.is_croppable:
            raise NotImplementedError(CANNOT_CROP)
        self.undo = UndoLog(self.preallocated_layers(), self.length)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last step (-1), or accepts it (0) and keeps what the next one changes.

        At most one step may have come since the call before. Does not wait for the device. Raises
        `NotImplementedError` for other numbers, and without `activate_past_recording`.
        """
        if self.undo is None or tokens_to_remove not in (0, -1):
            raise NotImplementedError(CANNOT_CROP)
        if tokens_to_remove == -1:
            self.undo.take_back_step()
            if self.tokens is not None:
                self.tokens = self.tokens[:, : self.undo.length]
            self.undo = None
        else:
            self.undo.accept_step()


def row_numbers(indices: Any, rows: int) -> Tensor:
    """The numbers (any,) int64 of the batch rows that `indices`, numbers or a mask (B,) bool, selects from `rows` rows.

    Raises `ValueError` for others. Numbers on a GPU are not read by the host.
    """
    indices = torch.as_tensor(indices)
    if indices.ndim != 1 or indices.is_floating_point() or indices.is_complex():
        raise ValueError(
            f"batch rows are chosen by a list of numbers or a mask, got {tuple(indices.shape)} {indices.dtype}"
        )
    if indices.dtype == torch.bool:
        if len(indices) != rows:
            raise ValueError(f"a mask of {len(indices)} batch rows does not fit a cache of {rows}")
        indices = indices.nonzero().squeeze(1)
    if len(indices) == 0:
        raise ValueError("no batch row is chosen: to empty the cache, call reset()")
    indices = indices.long()
    if indices.device.type != "cpu":
        return indices
    if not bool(((indices >= -rows) & (indices < rows)).all()):
        raise ValueError(f"batch rows {indices.tolist()} are not all in a cache of {rows} rows")
    return indices % rows


class UndoLog:
    """Copies of what one decoding step of all layers changes.

    length: tokens in the layers now.
    """

    def __init__(self, layers: list[PreallocatedLayer], length: int):
        self.layers, self.length = layers, length
        self.copies: dict[str, list[Tensor]] = {}
        self._record()

    def accept_step(self) -> None:
        """Records the state before the next step; refuses more than one step since the last record."""
        known = self.layers[0].known_length
        if known is not None and known > self.length + 1:
            raise NotImplementedError(CANNOT_CROP)
        self.length = self.length + 1 if known is None else known
        self._record()

    def take_back_step(self) -> None:
        """Restores the recorded state."""
        for name in self.changing:
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]  # has no public name
                self._states(name), self.copies[name]
            )
        for layer in self.layers:
            layer.forget_step(self.length)

    def _record(self) -> None:
        self.changing = self.layers[0].state_changed_by_step(self.length) if self.length else ()
        for name in self.changing:
            states = self._states(name)
            if name not in self.copies:
                self.copies[name] = [torch.empty_like(state) for state in states]
            # all layers at once: these launches are not captured
            torch._foreach_copy_(self.copies[name], states)  # pyright: ignore[reportPrivateImportUsage]  # as above

    def _states(self, name: str) -> list[Tensor]:
        return [getattr(layer, name) for layer in self.layers]
