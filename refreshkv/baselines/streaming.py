"""StreamingLLM (Xiao et al., 2024, arXiv 2309.17453): the first tokens and the last ones."""

import torch
from transformers import PretrainedConfig

from refreshkv.baselines.compact import CompactLayer
from refreshkv.cache.buffers import BufferedCache
from refreshkv.config import check_whole
from refreshkv.settings import SettingsError


class StreamingLayer(CompactLayer):
    """StreamingLLM (Xiao et al. 2024): the first tokens and the last ones."""

    def __init__(self, max_cache_len: int, budget: int | float, sink_tokens: int):
        super().__init__(max_cache_len, budget)
        self.sink_tokens = sink_tokens

    def _prompt_entries(self, query, key, budgets, left_padding, capacity, scaling):
        length, kv_heads = key.shape[2], key.shape[1]
        entry = torch.arange(capacity, device=key.device)
        first, used = left_padding[:, None], torch.minimum(budgets, length - left_padding)[:, None]
        positions = torch.where(entry < self.sink_tokens, first + entry, length - used + entry)
        positions = positions.masked_fill(entry >= used, -1)[:, None].expand(-1, kv_heads, -1)
        return positions, key.new_zeros(key.shape[:3], dtype=torch.float32)


class StreamingCache(BufferedCache):
    """StreamingLLM: `sink_tokens` first and `budget - sink_tokens` last tokens.

    budget: tokens, or a fraction of the prompt. Raises `SettingsError` if it does not exceed the sink tokens.
    """

    def __init__(
        self, model_config: PretrainedConfig, max_cache_len: int, budget: int | float = 0.125, sink_tokens: int = 4
    ):
        check_whole("sink_tokens", sink_tokens, 0)
        if isinstance(budget, int) and budget <= sink_tokens:
            raise SettingsError(f"budget={budget} leaves no room beside sink_tokens={sink_tokens}: make it larger")
        super().__init__(model_config, max_cache_len, lambda: StreamingLayer(max_cache_len, budget, sink_tokens))
