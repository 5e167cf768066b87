"""Other ways to decode, in the same loop and through the same kernels, for comparison: full attention, StreamingLLM,
H2O and SnapKV. The last three hold K entries and no more: what they evict is gone.

    refreshkv.enable(model, config)
    model.generate(..., past_key_values=SnapKVCache(model.config, max_cache_len, budget=0.125))

Entries keep the rotary positions they were written with. A token sees the K entries and itself, then joins them, as in
RefreshKV's queue (specification, section 4).

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `P` prompt length, `C = K + 1` entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.cache import BufferedCache, BufferedLayer
from refreshkv.config import RefreshConfig, check_whole
from refreshkv.ops import naive
from refreshkv.ops.decode import COMPACT_STATE, compact_step, full_step
from refreshkv.settings import SettingsError


class FullLayer(BufferedLayer):
    """All tokens, all of them attended to in every step: what `RefreshLayer` is without the refresh."""

    row_state = ("keys", "values", "rows")
    tells_steps = False

    @torch.compiler.disable
    def begin(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        """Ends a prompt block; query (B, H, n, D), left_padding (B,) int64."""
        self._check_padding(left_padding, query.shape[2])
        zeros = torch.zeros_like(left_padding)
        self._keep("rows", torch.stack([zeros, zeros, left_padding, zeros], dim=1))
        self._end_prompt()

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One decoding step: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        self.awaits_attention = False
        state = (self.keys, self.values, self.cumulative_length, self.rows)
        return self.operator(full_step)(query, key, value, *state, scaling)


class FullCache(BufferedCache):
    """Full attention in every step, in buffers of fixed size: `max_cache_len` tokens per row."""

    def __init__(self, model_config: PretrainedConfig, max_cache_len: int):
        super().__init__(model_config, max_cache_len, lambda: FullLayer(max_cache_len))


class CompactLayer(BufferedLayer):
    """K entries of the prompt, and then whatever replaces them; subclasses choose the first ones in `_prompt_entries`.

    State: `keys`, `values` (B, Hkv, C, D), `rows` (B, 4), `slots` (B, Hkv), `scores`, `positions` (B, Hkv, C);
    `refreshkv.ops.decode.compact_step` says what they hold.
    """

    row_state = tuple(name for name in COMPACT_STATE if name != "length")
    sink_tokens = 0
    heavy = False

    def __init__(self, max_cache_len: int, budget: int | float):
        super().__init__(max_cache_len)
        self.config = RefreshConfig(budget=budget)
        self.prompt: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states[:, :, :0], value_states[:, :, :0])

    def _capacity(self) -> int:
        return 0  # nothing before the prompt's attention is done: only what is kept gets a place

    def _store(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        if start > 0 and self.prompt is None:
            raise ValueError(
                f"{type(self).__name__} keeps no prompt to attend to: give it in one block, without "
                "prefill_chunk_size, and call reset() before another"
            )
        if start > 0:  # what `fill` put in is the beginning of the prompt
            blocks = zip(self.prompt, (key_states, value_states), strict=True)
            key_states, value_states = (torch.cat(parts, dim=2) for parts in blocks)
        self.prompt = (key_states, value_states)
        return self.prompt

    def reset(self) -> None:
        super().reset()
        self.prompt = None

    def changed_by_step(self, length: int) -> tuple[str, ...]:
        # the token itself goes where the entry is that went before
        return ("rows", "slots", "scores", "positions") if self.heavy else ("rows", "slots")

    @torch.compiler.disable
    def begin(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        """Ends the prompt: keeps K of its tokens; query (B, H, n, D), of all P tokens that were not filled in;
        left_padding (B,) int64."""
        (key, value), length = self.prompt, self.length
        self.prompt = None
        least, most = self.sink_tokens + 1, max(self.sink_tokens + 1, self.max_cache_len)
        budgets = self.config.budgets(length - left_padding).clamp(least, most)
        capacity = min(max(self.config.largest_budget(length), least), most) + 1
        kept, scores = self._prompt_entries(query, key, budgets, left_padding, capacity, scaling)
        index = kept.clamp(min=0)
        rows = index.unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])
        used = torch.minimum(budgets, length - left_padding)
        self._keep("keys", key.gather(2, rows))
        self._keep("values", value.gather(2, rows))
        zeros = torch.zeros_like(used)
        self._keep("rows", torch.stack([used, budgets, zeros, zeros], dim=1))
        # a row with fewer tokens than its budget has room behind them, another one entry to spare
        self._keep("slots", used.unsqueeze(-1).expand(-1, key.shape[1]))
        self._keep("positions", kept)
        self._keep("scores", scores.gather(2, index).masked_fill(kept < 0, 0.0))
        self._end_prompt()

    def _prompt_entries(
        self, query: Tensor, key: Tensor, budgets: Tensor, left_padding: Tensor, capacity: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """The positions that are kept, (B, Hkv, C) int64, the first to go first, -1 past the end, and all positions'
        accumulated probabilities, (B, Hkv, P) float32, where they matter. query (B, H, n, D): of the last n of the P
        tokens of key (B, Hkv, P, D)."""
        raise NotImplementedError

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One decoding step: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        self.awaits_attention = False
        state = [self.cumulative_length if name == "length" else getattr(self, name) for name in COMPACT_STATE]
        return self.operator(compact_step)(query, key, value, *state, self.sink_tokens, self.heavy, scaling)


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


class H2OLayer(CompactLayer):
    """H2O (Zhang et al. 2023): half of the budget for the highest accumulated probability, half for the last tokens."""

    heavy = True
    needs_queries = True
    earlier_queries: Tensor | None = None

    def fill(self, key_states: Tensor, value_states: Tensor, query_states: Tensor | None = None) -> None:
        super().fill(key_states, value_states, query_states)
        self.earlier_queries = query_states

    def reset(self) -> None:
        super().reset()
        self.earlier_queries = None

    def _prompt_entries(self, query, key, budgets, left_padding, capacity, scaling):
        if self.earlier_queries is not None:
            query, self.earlier_queries = torch.cat([self.earlier_queries, query], dim=2), None
        scores = accumulated_probabilities(query, key, left_padding, scaling)
        column = torch.arange(key.shape[2], device=key.device)
        recent = column >= (key.shape[2] - budgets // 2)[:, None, None]
        return _best_first_last(scores, recent, budgets, left_padding, capacity), scores


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
        observers = naive._observers(query, last - missing, self.window)
        scores = [
            naive._observed_scores(queries, keys, last, left_padding, scaling)
            for queries, keys in zip(observers.chunk(key.shape[1], 1), key.split(1, 1), strict=True)
        ]  # one key/value head at a time: a window of 64 holds many scores
        scores = torch.cat(scores, dim=1)
        column = torch.arange(key.shape[2], device=key.device)
        recent = (column > key.shape[2] - 1 - self.window).expand(len(key), 1, -1)
        recent = recent & (self.window > 1)
        scores = scores.masked_fill(recent.unsqueeze(2), 0.0)  # what is kept anyway lifts no neighbour
        if self.pooling == "max":
            scores = naive._pool(scores, last, left_padding, self.kernel)
        else:
            scores = F.avg_pool1d(scores.squeeze(2), self.kernel, stride=1, padding=self.kernel // 2).unsqueeze(2)
        return _best_first_last(scores.squeeze(2), recent, budgets, left_padding, capacity), scores.squeeze(2)


def accumulated_probabilities(query: Tensor, key: Tensor, left_padding: Tensor, scaling: float) -> Tensor:
    """How much attention each position received from all later ones, mean over the group: (B, Hkv, P) float32.

    query (B, H, P, D), key (B, Hkv, P, D). Costs one more pass over the prompt, in chunks of queries.
    """
    (batch, heads, length, _), kv_heads = query.shape, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    column = torch.arange(length, device=key.device)
    total = torch.zeros(batch, kv_heads, length, dtype=wide, device=key.device)
    chunk = max(1, naive.MAX_SCORES // (batch * heads * length))
    for start in range(0, length, chunk):
        queries = query[:, :, start : start + chunk].unflatten(1, (kv_heads, -1)).flatten(2, 3).to(wide)
        row = torch.arange(start, min(start + chunk, length), device=key.device)
        visible = (column <= row[:, None]) & (column >= left_padding[:, None, None])
        visible |= (row < left_padding[:, None])[..., None]  # a padded row sees something, and counts for nothing
        logits = (queries @ key.to(wide).transpose(-1, -2) * scaling).unflatten(2, (-1, len(row)))
        probabilities = logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
        counted = (row >= left_padding[:, None])[:, None, None, :, None]
        total += (probabilities * counted).mean(dim=2).sum(dim=2)
    return total.float()


def _best_first_last(scores: Tensor, preferred: Tensor, budgets: Tensor, left_padding: Tensor, capacity: int) -> Tensor:
    """The K best positions, from the lowest score to the highest, ties to the lower position: (B, Hkv, C), -1 past the
    end. scores (B, Hkv, P); preferred (B, 1, P) bool: positions that come before all others."""
    length = scores.shape[-1]
    column = torch.arange(length, device=scores.device)
    bits = scores.clamp(min=0.0).contiguous().view(torch.int32).long()
    order = (preferred.long() << 62) + (bits << 31) + (length - 1 - column)
    order = order.masked_fill(column < left_padding[:, None, None], -1)
    best = order.topk(min(capacity, length), dim=-1).indices
    used = torch.minimum(budgets, length - left_padding)[:, None, None]
    rank = torch.arange(capacity, device=scores.device)
    from_last = (used - 1 - rank).clamp(min=0, max=best.shape[-1] - 1).expand(-1, scores.shape[1], -1)
    return best.gather(2, from_last).masked_fill(rank >= used, -1)


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


class H2OCache(BufferedCache):
    """H2O: half of `budget` (tokens, or a fraction of the prompt) for heavy hitters, half for the last tokens."""

    def __init__(self, model_config: PretrainedConfig, max_cache_len: int, budget: int | float = 0.125):
        super().__init__(model_config, max_cache_len, lambda: H2OLayer(max_cache_len, budget))


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
