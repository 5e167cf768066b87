"""RefreshCache: a transformers cache that holds the full keys and values, and each layer's current selection."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.cache.fetching import FetchingLayer
from refreshkv.cache.layer import RefreshLayer
from refreshkv.cache.offload import OffloadedLayer
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.config import RefreshConfig
from refreshkv.settings import SettingsError


class RefreshCache(PreallocatedCache):
    """The cache of a model with the refresh attention: `model.generate(..., past_key_values=RefreshCache(...))`.

    The full keys and values stay in buffers allocated at the first token; each full-attention layer decodes from its
    own selection of them. Sliding-window layers keep a transformers cache of their own.

    On a GPU, `generate` compiles the decoding step and captures it into a CUDA graph, unless a layer has a sliding
    window; the host does not wait for the device in it. For the next text call `reset()` and use the same cache:
    another cache, or another number of batch rows, is captured again. A captured step beyond `max_cache_len`, called
    without generate() and its mask, returns nan, and the next read of the length raises an error.

    Several tokens at once are a block of the prompt, or a new turn; a single token after them is a decoding step. Each
    chunk of a prompt from generate(prefill_chunk_size=...) is a block, even a chunk of a single token.

    Args:
        config: the model's configuration, `model.config`.
        max_cache_len: most tokens per batch row, prompt and generated ones together.
        refresh: schedule and selection; None takes the ones saved under "refreshkv" in `config`.
        offload: keep the full keys and values in pinned host memory, and only the small caches and the score keys of
            fewer than 16 bits on the GPU. Full steps then read all keys and values over the bus, and steps are not
            captured. Without full steps (`stride=NEVER` with a select stride and score keys of 8 or 4 bits) steps are
            captured, and selecting steps fetch only the tokens that the small caches did not hold before.

    The model's configuration may also come first, without its name. The older names, `model_config=` for the model's
    configuration and `config=` for the `RefreshConfig`, work until the next release.
    """

    def __init__(
        self,
        first: PretrainedConfig | None = None,
        /,
        max_cache_len: Any = None,
        refresh: RefreshConfig | None = None,
        *,
        config: PretrainedConfig | RefreshConfig | None = None,
        offload: bool = False,
        model_config: PretrainedConfig | None = None,
    ):
        if isinstance(config, RefreshConfig) or model_config is not None:
            warnings.warn(
                "RefreshCache(model_config=..., config=RefreshConfig(...)) is spelled "
                "RefreshCache(config=model.config, refresh=RefreshConfig(...)) now",
                DeprecationWarning,
                stacklevel=2,
            )
            refresh, config = (config, None) if isinstance(config, RefreshConfig) else (refresh, config)
        model_config = first or config or model_config
        if model_config is None:
            raise SettingsError("RefreshCache needs config=model.config")
        self.config = refresh or saved_config(model_config, "refresh")
        make_layer = layer_kind(self.config, offload)
        super().__init__(model_config, max_cache_len, lambda: make_layer(max_cache_len, self.config))
        self.row_tensors: dict[str, Tensor] = {}
        """The tensors of `RowLengths`, which keep their addresses for later texts."""
        self.graphs: Any = None
        """The captured calls of `decode_lossless`; a copy of the cache has none."""
        layers = self.refresh_layers()
        if layers and not offload:  # offloaded layers each end their step by themselves
            layers[-1].earlier_layers = tuple(layers[:-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "graphs": None}

    @property
    def full_steps(self) -> Tensor:
        """Which positions were full steps: (layers, B, L) bool; the last position of a prompt counts as one.

        Sliding-window layers have no full steps. Raises `ValueError` before the first token.
        """
        return self._flags("full_steps")

    @property
    def selecting_steps(self) -> Tensor:
        """Which positions were selecting steps: (layers, B, L) bool, like `full_steps`; all False without one."""
        return self._flags("selecting_steps")

    # ---- several tokens again (docs/specification.md, section 11)

    def begin_step(self) -> int:
        """Number of tokens that the next decoding step takes: 1. With `rectify`, at a full step, this calls `rectify()`
        and returns the stride."""
        layer = self.refresh_layers()[0]
        if not (self.config.rectify and layer.is_decoding):
            return 1
        is_full = layer.length - layer.exact_length == self.config.stride - 1
        return self.rectify() + 1 if is_full else 1

    def rectify(self) -> int:
        """Removes the tokens since the last full step, and returns their number n.

        The next call must begin with these tokens. With one token more it is a full step that computes them again, with
        several more it is another turn. Raises `NotImplementedError` where tokens cannot be forgotten: caches with
        offload=True, and layers that are not full attention.
        """
        self.validate_droppable()
        dropped = [layer.drop_steps() for layer in self.refresh_layers()]
        return dropped[0]

    @property
    def exact_length(self) -> int:
        """How many of the first tokens have the same keys and values as under full attention."""
        return self.refresh_layers()[0].exact_length

    def begin_drafts(self) -> None:
        """Call this before the first steps that `verify` will remove. Errors as in `rectify`."""
        self.validate_droppable()
        for layer in self.refresh_layers():
            layer.keep_observers()

    def verify(self, columns: Tensor | None = None, compiled: bool = False) -> None:
        """Removes the drafts, which are the tokens of all steps since the last block. Does not wait for the device.

        The next call computes the drafts again in one block. Its selection waits for `RowLengths.accept`. columns (n,)
        int64: those of the block's n tokens, in a call that a CUDA graph captures; None: the host knows them. compiled:
        whether that call is compiled; it needs columns.
        """
        self.validate_droppable()
        for layer in self.refresh_layers():
            layer.drop_drafts(columns, compiled)

    @property
    def inputs_are_known(self) -> bool:
        """Whether the next call is a block of drafts, whose inputs `decode_lossless` makes: they need no validation."""
        # in this order: torch 2.11 cannot trace a property of super()
        return self.refresh_layers()[0].awaits_accept or super().inputs_are_known

    def row_tensor(self, name: str, value: Tensor) -> Tensor:
        """The tensor of this name with this value, at the address that it had before if its shape is the same."""
        old = self.row_tensors.get(name)
        if old is None or (old.shape, old.device) != (value.shape, value.device):
            with torch.inference_mode(False):
                self.row_tensors[name] = value.clone(memory_format=torch.contiguous_format)
        else:
            old.copy_(value)
        return self.row_tensors[name]

    def addresses(self) -> tuple[int, ...]:
        """The addresses of all state of the layers, and of the rows' lengths."""
        layers = (value for layer in self.refresh_layers() for value in vars(layer).values())
        return tuple(value.data_ptr() for value in (*layers, *self.row_tensors.values()) if isinstance(value, Tensor))

    def validate_droppable(self) -> None:
        """Raises `NotImplementedError` where tokens cannot be forgotten, as `rectify` says."""
        if any(type(layer) is not RefreshLayer for layer in self.layers):
            raise NotImplementedError(
                "tokens of this RefreshCache cannot be computed again: rectify=True and lossless decoding need "
                "offload=False and full attention in every layer"
            )

    def _flags(self, name: str) -> Tensor:
        """The layers' flags of this name, (layers, B, L) bool, False for layers without any."""
        layers = self.refresh_layers()
        if not layers or layers[0].length == 0:
            raise ValueError(f"{name}: the cache is empty; run the model with it first")
        length, none = layers[0].length, torch.zeros_like(layers[0].full_steps[:, : layers[0].length])
        flags = [getattr(layer, name)[:, :length] if hasattr(layer, name) else none for layer in self.layers]
        return torch.stack([own.to(none.device) for own in flags])

    def refresh_layers(self) -> list[RefreshLayer]:
        """The full-attention layers."""
        return [layer for layer in self.layers if isinstance(layer, RefreshLayer)]


def layer_kind(config: RefreshConfig, offload: bool) -> type[RefreshLayer]:
    """The class of the layers of a cache with this schedule."""
    if not offload:
        return RefreshLayer
    return FetchingLayer if FetchingLayer.serves(config) else OffloadedLayer


def saved_config(model_config: PretrainedConfig, argument: str = "config") -> RefreshConfig:
    """The `RefreshConfig` under "refreshkv" in a model's configuration.

    Raises `SettingsError`, which names the argument to pass instead, if there is none.
    """
    values = getattr(model_config, "refreshkv", None)
    if values is None:
        raise SettingsError(f'the model has no "refreshkv" in its config.json: pass {argument}=RefreshConfig(...)')
    return RefreshConfig.from_dict(values)
