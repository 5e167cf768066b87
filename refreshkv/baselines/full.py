"""Full attention in every decoding step, through the same kernels and loop as RefreshKV's. It has no settings.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.preallocated_layer import Phase, PreallocatedLayer
from refreshkv.ops import naive
from refreshkv.ops.state import PLAIN_SOFTMAX, SoftmaxTerms
from refreshkv.ops.step.operators import full_step


class FullLayer(PreallocatedLayer):
    """A layer that attends to all tokens in every step: `RefreshLayer` without the refresh."""

    batch_state = ("keys", "values", "row_state")
    takes_terms = takes_other_values = True

    @torch.compiler.disable
    def end_block(
        self, query: Tensor, left_padding: Tensor, scaling: float, terms: SoftmaxTerms = PLAIN_SOFTMAX
    ) -> None:
        """Ends a prompt block; query (B, H, n, D), left_padding (B,) int64."""
        self._validate_padding(left_padding, query.shape[2])
        zeros = torch.zeros_like(left_padding)
        self._keep("row_state", torch.stack([zeros, zeros, left_padding, zeros], dim=1))
        self._start_decoding()

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, terms: SoftmaxTerms = PLAIN_SOFTMAX
    ) -> Tensor:
        """One decoding step: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        self.phase = Phase.DECODING
        state = (self.keys, self.values, self.cumulative_length, self.row_state)
        if self.keys.shape[-1] != self.values.shape[-1]:
            plain_step: Any = torch.compiler.disable(naive.full_step)
            return plain_step(query, key, value, *state, scaling, terms)
        return self.operator(full_step)(query, key, value, *state, scaling, *terms)


class FullCache(PreallocatedCache):
    """Full attention in every step, in buffers of fixed size: `max_cache_len` tokens per batch row."""

    def __init__(self, config: PretrainedConfig, max_cache_len: int):
        super().__init__(config, max_cache_len, lambda: FullLayer(max_cache_len))
