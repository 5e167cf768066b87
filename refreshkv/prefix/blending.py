"""Computes some tokens of a prompt again, over the stored keys and values of the others, in one pass.

Source of the idea: *CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion* (arXiv
2405.16444). In every layer the chosen tokens attend to all tokens up to themselves, whose entries are new where they
were chosen and stored ones elsewhere.

Shapes: `B` batch rows, `Hkv` key/value heads, `D` head size, `L` tokens of all chunks, `R` tokens to compute again.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from refreshkv.cache.keyword import as_keyword
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.preallocated_layer import Phase, PreallocatedLayer
from refreshkv.ops.state import PLAIN_SOFTMAX, SoftmaxTerms
from refreshkv.settings import SettingsError

JUDGED_LAYER = 1
"""The layer by whose values `most_changed` chooses: the first one whose input depends on the tokens before."""


class BlendingLayer(PreallocatedLayer):
    """A layer that holds all tokens and gets new entries for some of them."""

    takes_terms = takes_other_values = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Puts the entries (B, Hkv, R, D) of the tokens `columns` in their places; returns all (B, Hkv, L, D)."""
        assert self.columns is not None, "the cache says which tokens are computed again"
        self.keys[:, :, self.columns] = key_states
        self.values[:, :, self.columns] = value_states
        self.phase = Phase.BLOCK
        return self.keys, self.values

    def end_block(
        self, query: Tensor, left_padding: Tensor, scaling: float, terms: SoftmaxTerms = PLAIN_SOFTMAX
    ) -> None:
        self.phase = Phase.CONTINUING

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> int:
        return self.max_cache_len


class BlendingCache(PreallocatedCache):
    """Keys and values of L tokens, of which those in `columns` (R,) are computed again by the next pass."""

    def __init__(self, config: PretrainedConfig, states: list[tuple[Tensor, Tensor]], columns: Tensor):
        length = states[0][0].shape[2]
        super().__init__(config, length, lambda: BlendingLayer(length))
        self.columns = columns
        for layer, (keys, values) in zip(self.preallocated_layers(), states, strict=True):
            layer.load_prefix(keys, values)
            layer.columns = columns.to(keys.device)


@torch.no_grad()
def blend(
    model: PreTrainedModel, ids: Tensor, states: list[tuple[Tensor, Tensor]], columns: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The keys and values (1, Hkv, L, D) of each layer, with the tokens `columns` (R,), ascending, computed again.

    ids (1, L): all tokens. states: the keys and values of each layer, without those.
    """
    cache = BlendingCache(model.config, states, columns)
    positions = columns.unsqueeze(0)
    model.base_model(input_ids=ids[:, columns], position_ids=positions, **as_keyword(cache), use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.preallocated_layers()]


@torch.no_grad()
def most_changed(
    model: PreTrainedModel, ids: Tensor, states: list[tuple[Tensor, Tensor]], share: float, first_chunk: int
) -> Tensor:
    """The `share` of the tokens (1, L) whose values in layer 1 differ most from those under full attention, ascending:
    (R,) int64. Ties go to the lower position.

    The distance is Euclidean, over all heads. The `first_chunk` tokens of the first chunk have seen all before them:
    they are never chosen. Costs the first layer's attention over all tokens. Raises `SettingsError` for a model of one
    layer.
    """
    if len(states) <= JUDGED_LAYER:
        raise SettingsError("changed=SHARE compares the values of the second layer, and the model has one: use first=N")
    stored = states[JUDGED_LAYER][1]
    values = _values_under_full_attention(model, ids).to(stored.device)
    wide = torch.promote_types(stored.dtype, torch.float32)
    changes = (values.to(wide) - stored.to(wide)).square().sum(dim=(0, 1, 3))
    changes[:first_chunk] = -1
    count = math.ceil(share * ids.shape[1])
    chosen = changes.argsort(descending=True, stable=True)[: min(count, ids.shape[1] - first_chunk)]
    return chosen.sort().values.to(ids.device)


class _Reached(Exception):
    """The pass has come to the judged layer; the rest of it is not needed."""


class _UpToJudgedLayer(DynamicCache):
    """Breaks a pass off at the judged layer, and keeps that layer's values."""

    judged: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == JUDGED_LAYER:
            self.judged = value_states
            raise _Reached
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _values_under_full_attention(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The judged layer's values (1, Hkv, L, D) of all tokens (1, L) under full attention."""
    cache = _UpToJudgedLayer()
    try:
        model.base_model(input_ids=ids, **as_keyword(cache), use_cache=True)
    except _Reached:
        return cache.judged
    raise AssertionError("the pass did not come to the judged layer")
