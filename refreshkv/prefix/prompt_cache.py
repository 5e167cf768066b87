"""Caches that hold all that a prefix store keeps of a prompt, and how it is taken from them.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `P` tokens of a prompt.
"""

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from refreshkv.baselines.compact import CompactLayer
from refreshkv.baselines.full import FullLayer
from refreshkv.cache.preallocated import PreallocatedCache, PreallocatedLayer


class PromptLayer(FullLayer):
    """Full attention that also keeps the queries, if asked to: `queries` (B, H, L, D)."""

    def __init__(self, max_cache_len: int, keep_queries: bool):
        super().__init__(max_cache_len)
        self.needs_queries = keep_queries
        self.queries: Tensor | None = None

    def load_prefix(self, key_states: Tensor, value_states: Tensor, query_states: Tensor | None = None) -> None:
        super().load_prefix(key_states, value_states, query_states)
        self.queries = query_states if self.needs_queries else None

    @torch.compiler.disable
    def end_block(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        if self.needs_queries:
            self.queries = query if self.queries is None else torch.cat([self.queries, query], dim=2)
        super().end_block(query, left_padding, scaling)

    def reset(self) -> None:
        super().reset()
        self.queries = None


class PromptCache(PreallocatedCache):
    """Computes prompts for a `PrefixStore`: keys and values of all tokens, in sliding-window layers too, and with
    `keep_queries` the full-attention layers' queries, on which H2O depends."""

    def __init__(self, model_config: PretrainedConfig, max_cache_len: int, keep_queries: bool = False):
        super().__init__(model_config, max_cache_len, lambda: PromptLayer(max_cache_len, keep_queries))
        keep_all_tokens(self)


class WholeSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer that attends to its window and keeps all tokens, until rows are repeated or selected."""

    def __init__(self, sliding_window: int, **kwargs):
        super().__init__(sliding_window, **kwargs)
        self._blocks: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self._blocks.append((key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)

    def all_tokens(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all tokens so far, (B, Hkv, L, D) each; None without any."""
        return tuple(torch.cat(parts, dim=2) for parts in zip(*self._blocks, strict=True)) if self._blocks else None

    def reset(self) -> None:
        super().reset()
        self._blocks = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._blocks = []

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._blocks = []

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._blocks = []


def keep_all_tokens(cache: Cache) -> Cache:
    """Lets the sliding-window layers of an empty cache keep all tokens, as a store needs them; returns the cache."""
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[number] = WholeSlidingLayer(sliding_window=layer.sliding_window)
    return cache


def needs_queries(cache: Cache | None) -> bool:
    """Whether the strategy goes on from a prefix only with all of its queries, as H2O does; None: full attention."""
    return cache is not None and any(getattr(layer, "needs_queries", False) for layer in cache.layers)


def fill_layer(cache: Cache, number: int, key: Tensor, value: Tensor, query: Tensor | None) -> None:
    """Puts the first tokens of prompts into one layer of an empty cache: (B, Hkv, d, D), queries (B, H, d, D)."""
    if number < len(cache.layers) and isinstance(cache.layers[number], PreallocatedLayer):
        cache.layers[number].load_prefix(key, value, query)
    else:  # transformers' own layers take a prompt in any number of blocks
        cache.update(key, value, number)


def prompt_states(cache: Cache, row: int, start: int, end: int) -> dict[str, Tensor]:
    """What the cache holds of the prompt in columns `start .. end-1` of a batch row.

    Returns "key.0", "value.0", "key.1" and so on, by layer, (P, Hkv, D) each, and "query.0" (P, H, D) of the layers
    that keep queries; views as far as possible. Raises `ValueError` if a layer does not hold all of these tokens.
    """
    states = {}
    if not cache.layers:
        raise ValueError(f"this {type(cache).__name__} is empty: compute the prompt with it first")
    for number, layer in enumerate(cache.layers):
        kept = [("key", layer.keys), ("value", layer.values), ("query", getattr(layer, "queries", None))]
        if isinstance(layer, WholeSlidingLayer):
            kept = list(zip(("key", "value"), layer.all_tokens() or (None, None), strict=True))
        elif isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window:
            raise ValueError(
                f"layer {number} keeps only its window of {layer.sliding_window} tokens: call "
                "refreshkv.prefix.prompt_cache.keep_all_tokens(cache) before the prompt"
            )
        held = layer.exact_length if isinstance(layer, PreallocatedLayer) else layer.get_seq_length()
        if kept[0][1] is None or isinstance(layer, CompactLayer) or held < end:
            raise ValueError(
                f"layer {number} of this {type(cache).__name__} does not hold the prompt's {end} tokens as full "
                "attention leaves them: store a prompt before anything else follows it"
            )
        if isinstance(layer, PreallocatedLayer):
            layer.synchronize()
        for name, tensor in kept:
            if tensor is not None:
                states[f"{name}.{number}"] = tensor[row, :, start:end].detach().transpose(0, 1)
    return states
