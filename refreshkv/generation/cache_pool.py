"""Caches that requests to one model take and return, so that most requests allocate no memory and capture no CUDA
graph."""

from typing import NamedTuple

from transformers import PretrainedConfig

from refreshkv.cache.refresh import RefreshCache
from refreshkv.config import RefreshConfig

CAPACITY_STEP = 128
"""Capacities are multiples of this many tokens."""
MOST_FREE = 8
"""Caches that are kept while no request uses them."""


class Shape(NamedTuple):
    """Properties of a request's cache besides its capacity."""

    rows: int
    """Batch rows."""
    refresh: RefreshConfig
    offload: bool


class CachePool:
    """The caches of one model. Not safe for threads by itself: `Turns` lets one request at a time use it."""

    def __init__(self) -> None:
        self.free: list[tuple[Shape, RefreshCache]] = []
        """The caches that no request uses, the latest last."""

    def take(self, model_config: PretrainedConfig, shape: Shape, tokens: int) -> RefreshCache:
        """An empty cache for `tokens` tokens per batch row: the smallest free one that is large enough, or a new one.

        A new one replaces the free ones of this shape, which are all smaller. A large cache also serves shorter texts,
        because on a GPU the step of another cache would be captured again.
        """
        fitting = [pair for pair in self.free if pair[0] == shape and pair[1].capacity >= tokens]
        if fitting:
            pair = min(fitting, key=lambda pair: pair[1].capacity)
            self.free.remove(pair)
            pair[1].reset()
            return pair[1]
        self.free = [pair for pair in self.free if pair[0] != shape]
        capacity = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
        return RefreshCache(config=model_config, max_cache_len=capacity, refresh=shape.refresh, offload=shape.offload)

    def give_back(self, shape: Shape, cache: RefreshCache) -> None:
        """Keeps a cache for later requests; if there are too many, drops the least recently used one."""
        self.free = [*self.free, (shape, cache)][-MOST_FREE:]
