"""SnapKV: the entries that the prompt's last queries attend to, chosen once.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, https://arxiv.org/abs/2404.14469.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `P` prompt length.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from refreshkv.baselines.compact import CompactLayer, best_first_last
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.config import RefreshConfig
from refreshkv.ops.naive.selection import observed_scores, observing_queries, pool
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class SnapKVConfig:
    """Settings of SnapKV. The defaults are those of the RefreshKV paper.

    The SnapKV authors' own are observation_window=64, kernel=5, pooling="average". In both, the group's highest
    probability counts for all its heads. Raises `SettingsError` for values outside their range.
    """

    budget: int | float = 0.125
    """Entries of the cache: a number of tokens, or a share of the prompt."""
    observation_window: int = 1
    """Last queries whose scores are averaged. Their own tokens are kept too if there are several."""
    kernel: int = 7
    """Width of the pooling over neighbouring positions (odd)."""
    pooling: str = "max"
    """How neighbouring positions' scores are pooled: "max" or "average"."""

    def __post_init__(self) -> None:
        if self.pooling not in ("max", "average"):
            raise SettingsError(f'pooling must be "max" or "average", got {self.pooling!r}')
        # has the same ranges
        RefreshConfig(budget=self.budget, pool_kernel=self.kernel, observation_window=self.observation_window)


class SnapKVLayer(CompactLayer):
    """A layer that keeps what the prompt's last queries attend to, pooled over neighbours."""

    def __init__(self, max_cache_len: int, settings: SnapKVConfig):
        super().__init__(max_cache_len, settings.budget)
        self.settings = settings
        self.last_queries = settings.observation_window

    def _prompt_entries(self, query, key, budgets, left_padding, capacity, scaling):
        window, kernel = self.settings.observation_window, self.settings.kernel
        missing = key.shape[2] - query.shape[2]
        if missing and query.shape[2] < window:
            raise ValueError(
                f"a block of {query.shape[2]} tokens follows what the cache was filled with, but "
                f"observation_window={window}: leave that many tokens of the prompt to compute"
            )
        last = torch.full_like(left_padding, key.shape[2] - 1).unsqueeze(-1)
        observers = observing_queries(query, last - missing, window)
        scores = [
            observed_scores(queries, keys, last, left_padding, scaling)
            for queries, keys in zip(observers.chunk(key.shape[1], 1), key.split(1, 1), strict=True)
        ]  # one key/value head at a time: a window of 64 queries has many scores
        scores = torch.cat(scores, dim=1)
        column = torch.arange(key.shape[2], device=key.device)
        recent = (column > key.shape[2] - 1 - window).expand(len(key), 1, -1)
        recent = recent & (window > 1)
        # positions that are kept anyway must not raise their neighbours' scores
        scores = scores.masked_fill(recent.unsqueeze(2), 0.0)
        if self.settings.pooling == "max":
            scores = pool(scores, last, left_padding, kernel)
        else:
            scores = F.avg_pool1d(scores.squeeze(2), kernel, stride=1, padding=kernel // 2).unsqueeze(2)
        return best_first_last(scores.squeeze(2), recent, budgets, left_padding, capacity), scores.squeeze(2)


class SnapKVCache(PreallocatedCache):
    """The cache of SnapKV; the settings are those of `SnapKVConfig`."""

    def __init__(
        self,
        config: PretrainedConfig,
        max_cache_len: int,
        budget: int | float = 0.125,
        observation_window: int = 1,
        kernel: int = 7,
        pooling: str = "max",
    ):
        settings = SnapKVConfig(budget, observation_window, kernel, pooling)
        super().__init__(config, max_cache_len, lambda: SnapKVLayer(max_cache_len, settings))
