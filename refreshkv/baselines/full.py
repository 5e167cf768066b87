"""Full attention in every decoding step, through the same kernels and loop as RefreshKV's."""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.cache.buffers import BufferedCache, BufferedLayer
from refreshkv.ops.step.operators import full_step


class FullLayer(BufferedLayer):
    """All tokens, all of them attended to in every step: what `RefreshLayer` is without the refresh."""

    per_row = ("keys", "values", "row_state")
    tells_steps = False

    @torch.compiler.disable
    def begin(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        """Ends a prompt block; query (B, H, n, D), left_padding (B,) int64."""
        self._check_padding(left_padding, query.shape[2])
        zeros = torch.zeros_like(left_padding)
        self._keep("row_state", torch.stack([zeros, zeros, left_padding, zeros], dim=1))
        self._end_prompt()

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One decoding step: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        self.awaits_attention = False
        state = (self.keys, self.values, self.cumulative_length, self.row_state)
        return self.operator(full_step)(query, key, value, *state, scaling)


class FullCache(BufferedCache):
    """Full attention in every step, in buffers of fixed size: `max_cache_len` tokens per row."""

    def __init__(self, model_config: PretrainedConfig, max_cache_len: int):
        super().__init__(model_config, max_cache_len, lambda: FullLayer(max_cache_len))
