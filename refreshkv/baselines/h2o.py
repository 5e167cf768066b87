"""H2O: the tokens with the most accumulated attention, and the last ones.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023,
https://arxiv.org/abs/2306.14048. As there, half of the budget is for heavy hitters and half for the last tokens. The
attention that a query pays to a position is the maximum over the query heads of the position's key/value head, as in
the RefreshKV paper (appendix A.1).

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `P` prompt length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.baselines.compact import CompactLayer, best_first_last
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.config import RefreshConfig
from refreshkv.ops.naive.selection import MAX_SCORES


@dataclass(frozen=True)
class H2OConfig:
    """Settings of H2O. Raises `SettingsError` for values outside their range."""

    budget: int | float = 0.125
    """Entries of the cache: a number of tokens, or a share of the prompt. One half is for the last tokens."""

    def __post_init__(self) -> None:
        RefreshConfig(budget=self.budget)  # has the same range


class H2OLayer(CompactLayer):
    """A layer that keeps half of its budget for the highest accumulated probability, half for the last tokens."""

    heavy = True
    takes_prefix = False  # the accumulated probabilities need the queries of all tokens of the prompt

    def __init__(self, max_cache_len: int, settings: H2OConfig):
        super().__init__(max_cache_len, settings.budget)

    def _prompt_entries(self, query, key, budgets, left_padding, capacity, scaling):
        scores = accumulated_probabilities(query, key, left_padding, scaling)
        column = torch.arange(key.shape[2], device=key.device)
        recent = column >= (key.shape[2] - budgets // 2)[:, None, None]
        return best_first_last(scores, recent, budgets, left_padding, capacity), scores


def accumulated_probabilities(query: Tensor, key: Tensor, left_padding: Tensor, scaling: float) -> Tensor:
    """The probabilities with which a position and all later ones attend to it, each the maximum over the group's heads,
    summed: (B, Hkv, P) float32.

    query (B, H, P, D), key (B, Hkv, P, D). Costs one more pass over the prompt, in chunks of queries.
    """
    (batch, heads, length, _), kv_heads = query.shape, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    column = torch.arange(length, device=key.device)
    total = torch.zeros(batch, kv_heads, length, dtype=wide, device=key.device)
    chunk = max(1, MAX_SCORES // (batch * heads * length))
    for start in range(0, length, chunk):
        queries = query[:, :, start : start + chunk].unflatten(1, (kv_heads, -1)).flatten(2, 3).to(wide)
        row = torch.arange(start, min(start + chunk, length), device=key.device)
        visible = (column <= row[:, None]) & (column >= left_padding[:, None, None])
        visible |= (row < left_padding[:, None])[..., None]  # a padded query needs one visible key; it is not counted
        logits = (queries @ key.to(wide).transpose(-1, -2) * scaling).unflatten(2, (-1, len(row)))
        probabilities = logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
        counted = (row >= left_padding[:, None])[:, None, None, :, None]
        total += (probabilities * counted).amax(dim=2).sum(dim=2)
    return total.float()


class H2OCache(PreallocatedCache):
    """The cache of H2O; `budget` as in `H2OConfig`."""

    def __init__(self, config: PretrainedConfig, max_cache_len: int, budget: int | float = 0.125):
        settings = H2OConfig(budget)
        super().__init__(config, max_cache_len, lambda: H2OLayer(max_cache_len, settings))
