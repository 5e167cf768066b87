"""StreamingLLM: the first tokens and the last ones.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, https://arxiv.org/abs/2309.17453.
There positions are counted inside the cache; here entries keep the positions that they were written with.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `P` prompt length.
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from refreshkv.baselines.compact import CompactLayer
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.config import RefreshConfig, validate_whole
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class StreamingConfig:
    """Settings of StreamingLLM. Raises `SettingsError` if the budget does not exceed the sink tokens."""

    budget: int | float = 0.125
    """Entries of the cache: a number of tokens, or a share of the prompt."""
    sink_tokens: int = 4
    """First tokens that never leave; the rest of the budget is for the last tokens."""

    def __post_init__(self) -> None:
        validate_whole("sink_tokens", self.sink_tokens, 0)
        if isinstance(self.budget, int) and self.budget <= self.sink_tokens:
            raise SettingsError(
                f"budget={self.budget} leaves no room beside sink_tokens={self.sink_tokens}: make it larger"
            )
        RefreshConfig(budget=self.budget)  # has the same range


class StreamingLayer(CompactLayer):
    """A layer that keeps the first tokens and the last ones."""

    def __init__(self, max_cache_len: int, settings: StreamingConfig):
        super().__init__(max_cache_len, settings.budget)
        self.sink_tokens = settings.sink_tokens

    def _prompt_entries(self, query, key, budgets, left_padding, capacity, scaling):
        length, kv_heads = key.shape[2], key.shape[1]
        entry = torch.arange(capacity, device=key.device)
        first, used = left_padding[:, None], torch.minimum(budgets, length - left_padding)[:, None]
        positions = torch.where(entry < self.sink_tokens, first + entry, length - used + entry)
        positions = positions.masked_fill(entry >= used, -1)[:, None].expand(-1, kv_heads, -1)
        return positions, key.new_zeros(key.shape[:3], dtype=torch.float32)


class StreamingCache(PreallocatedCache):
    """The cache of StreamingLLM; the settings are those of `StreamingConfig`."""

    def __init__(self, config: PretrainedConfig, max_cache_len: int, budget: int | float = 0.125, sink_tokens: int = 4):
        settings = StreamingConfig(budget, sink_tokens)
        super().__init__(config, max_cache_len, lambda: StreamingLayer(max_cache_len, settings))
