"""SnapKV (Li et al., 2024, arXiv 2404.14469): what the prompt's last queries attend to, chosen once."""

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from refreshkv.baselines.compact import CompactLayer, best_first_last
from refreshkv.cache.buffers import BufferedCache
from refreshkv.config import RefreshConfig
from refreshkv.ops.naive.selection import observed_scores, observing_queries, pool
from refreshkv.settings import SettingsError


class SnapKVLayer(CompactLayer):
    """SnapKV (Li et al. 2024): what the prompt's last queries attend to, pooled over neighbours, and those queries' own
    tokens if there are several."""

    def __init__(self, max_cache_len: int, budget: int | float, observation_window: int, kernel: int, pooling: str):
        super().__init__(max_cache_len, budget)
        self.window, self.kernel, self.pooling = observation_window, kernel, pooling
        self.last_queries = observation_window

    def _prompt_entries(self, query, key, budgets, left_padding, capacity, scaling):
        missing = key.shape[2] - query.shape[2]
        if missing and query.shape[2] < self.window:
            raise ValueError(
                f"a block of {query.shape[2]} tokens follows what the cache was filled with, but "
                f"observation_window={self.window}: leave that many tokens of the prompt to compute"
            )
        last = torch.full_like(left_padding, key.shape[2] - 1).unsqueeze(-1)
        observers = observing_queries(query, last - missing, self.window)
        scores = [
            observed_scores(queries, keys, last, left_padding, scaling)
            for queries, keys in zip(observers.chunk(key.shape[1], 1), key.split(1, 1), strict=True)
        ]  # one key/value head at a time: a window of 64 holds many scores
        scores = torch.cat(scores, dim=1)
        column = torch.arange(key.shape[2], device=key.device)
        recent = (column > key.shape[2] - 1 - self.window).expand(len(key), 1, -1)
        recent = recent & (self.window > 1)
        scores = scores.masked_fill(recent.unsqueeze(2), 0.0)  # what is kept anyway lifts no neighbour
        if self.pooling == "max":
            scores = pool(scores, last, left_padding, self.kernel)
        else:
            scores = F.avg_pool1d(scores.squeeze(2), self.kernel, stride=1, padding=self.kernel // 2).unsqueeze(2)
        return best_first_last(scores.squeeze(2), recent, budgets, left_padding, capacity), scores.squeeze(2)


class SnapKVCache(BufferedCache):
    """SnapKV: `budget` entries (tokens, or a fraction of the prompt) chosen once, after the prompt.

    The defaults are those of the RefreshKV paper. The SnapKV authors' own: observation_window=64, kernel=5,
    pooling="average". The group's highest probability counts for all its heads in both.
    """

    def __init__(
        self,
        model_config: PretrainedConfig,
        max_cache_len: int,
        budget: int | float = 0.125,
        observation_window: int = 1,
        kernel: int = 7,
        pooling: str = "max",
    ):
        if pooling not in ("max", "average"):
            raise SettingsError(f'pooling must be "max" or "average", got {pooling!r}')
        RefreshConfig(
            budget=budget, pool_kernel=kernel, observation_window=observation_window
        )  # refuses what it cannot
        super().__init__(
            model_config, max_cache_len, lambda: SnapKVLayer(max_cache_len, budget, observation_window, kernel, pooling)
        )
