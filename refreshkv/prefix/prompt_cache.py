"""Caches that keep all tokens of a prompt, and how a store reads a prompt from a cache.

Shapes: `B` batch rows, `Hkv` key/value heads, `D` head size, `P` tokens of a prompt, `L` tokens so far.
"""

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from refreshkv.baselines.compact import CompactLayer
from refreshkv.baselines.full import FullCache
from refreshkv.cache.preallocated_layer import PreallocatedLayer


class PromptCache(FullCache):
    """Computes prompts for a `PrefixStore`: keeps keys and values of all tokens, in sliding-window layers too."""

    def __init__(self, model_config: PretrainedConfig, max_cache_len: int):
        super().__init__(model_config, max_cache_len)
        keep_all_tokens(self)


class WholeSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer that attends to its window and keeps all tokens.

    Reordering, selecting or repeating batch rows drops the tokens beyond the window.
    """

    def __init__(self, sliding_window: int, **kwargs):
        super().__init__(sliding_window, **kwargs)
        self._blocks: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self._blocks.append((key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)

    def all_tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of all tokens so far, (B, Hkv, L, D) each; (None, None) if there are none."""
        if not self._blocks:
            return None, None
        keys, values = zip(*self._blocks, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def reset(self) -> None:
        super().reset()
        self._blocks = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._blocks = []

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._blocks = []

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._blocks = []


def keep_all_tokens(cache: Cache) -> Cache:
    """Replaces the sliding-window layers of an empty cache by ones that keep all tokens, so that a store can take the
    prompt from it; returns the cache."""
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[number] = WholeSlidingLayer(sliding_window=layer.sliding_window)
    return cache


def prompt_states(cache: Cache, row: int, start: int, end: int) -> dict[str, Tensor]:
    """Keys and values of the prompt in columns `start .. end-1` of a batch row.

    Returns "key.N" and "value.N" of each layer N, (P, Hkv, D) each: views, except in sliding-window layers. Raises
    `ValueError` if a layer does not hold all of these tokens as full attention computes them.
    """
    if not cache.layers:
        raise ValueError(f"this {type(cache).__name__} is empty: compute the prompt with it first")
    states = {}
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, CacheLayerMixin)  # the model has attention layers only
        keys, values = _held_tokens(cache, number, layer, end)
        for name, tensor in (("key", keys), ("value", values)):
            states[f"{name}.{number}"] = tensor[row, :, start:end].detach().transpose(0, 1)
    return states


def _held_tokens(cache: Cache, number: int, layer: CacheLayerMixin, end: int) -> tuple[Tensor, Tensor]:
    """The layer's keys and values, (B, Hkv, any, D) each, once they are written.

    Raises `ValueError` unless the layer holds the first `end` tokens.
    """
    if (
        isinstance(layer, DynamicSlidingWindowLayer)
        and not isinstance(layer, WholeSlidingLayer)
        and layer.get_seq_length() >= layer.sliding_window
    ):
        raise ValueError(
            f"layer {number} keeps only its window of {layer.sliding_window} tokens: call "
            "refreshkv.prefix.prompt_cache.keep_all_tokens(cache) before the prompt"
        )
    keys, values = layer.all_tokens() if isinstance(layer, WholeSlidingLayer) else (layer.keys, layer.values)
    held = layer.exact_length if isinstance(layer, PreallocatedLayer) else layer.get_seq_length()
    if keys is None or values is None or isinstance(layer, CompactLayer) or held < end:
        raise ValueError(
            f"layer {number} of this {type(cache).__name__} does not hold the prompt's {end} tokens as full "
            "attention leaves them: store a prompt before anything else follows it"
        )
    if isinstance(layer, PreallocatedLayer):
        layer.synchronize()
    return keys, values
