"""What StreamingLLM, H2O and SnapKV share: a cache layer that holds K entries and no more.

Entries keep the rotary positions that they were written with. A token attends to the K entries and itself, then joins
them, as in RefreshKV's queue (docs/specification.md, section 4).

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `P` prompt length, `C = K + 1` entries.
"""

import torch
from torch import Tensor

from refreshkv.cache.preallocated_layer import Phase, PreallocatedLayer
from refreshkv.config import RefreshConfig
from refreshkv.ops.state import CompactState
from refreshkv.ops.step.operators import compact_step


class CompactLayer(PreallocatedLayer):
    """K entries of the prompt, and then whatever replaces them; subclasses choose the first ones in `_prompt_entries`.

    State: `keys`, `values` (B, Hkv, C, D), `row_state` (B, 4), `slots` (B, Hkv), `scores`, `positions` (B, Hkv, C);
    `refreshkv.ops.state.CompactState` says what they hold.
    """

    batch_state = tuple(name for name in CompactState._fields if name != "length")
    sink_tokens = 0
    """First entries that never leave."""
    heavy = False
    """Whether the entry with the least accumulated attention leaves, and not the oldest one."""

    def __init__(self, max_cache_len: int, budget: int | float):
        super().__init__(max_cache_len)
        self.config = RefreshConfig(budget=budget)
        self.prompt: tuple[Tensor, Tensor] | None = None
        """Keys and values of the whole prompt, until its attention is done."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states[:, :, :0], value_states[:, :, :0])

    def _capacity(self) -> int:
        return 0  # buffers are made after the prompt's attention, for the entries that are kept

    def _store(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        if start > 0:
            if self.prompt is None:
                raise ValueError(
                    f"{type(self).__name__} keeps no prompt to attend to: give it in one block, without "
                    "prefill_chunk_size, and call reset() before another"
                )
            # `load_prefix` put in the beginning of the prompt
            blocks = zip(self.prompt, (key_states, value_states), strict=True)
            key_states, value_states = (torch.cat(parts, dim=2) for parts in blocks)
        self.prompt = (key_states, value_states)
        return self.prompt

    def reset(self) -> None:
        super().reset()
        self.prompt = None

    def state_changed_by_step(self, length: int) -> tuple[str, ...]:
        # the token is written over the entry that left in the step before
        return ("row_state", "slots", "scores", "positions") if self.heavy else ("row_state", "slots")

    @torch.compiler.disable
    def end_block(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        """Ends the prompt: keeps K of its tokens. query (B, H, n, D): the queries of the tokens after the prefix that
        was loaded; left_padding (B,) int64."""
        assert self.prompt is not None  # the block before this call
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
        self._keep("row_state", torch.stack([used, budgets, zeros, zeros], dim=1))
        # the free slot: behind the tokens of a row that has fewer than its budget, else the one entry to spare
        self._keep("slots", used.unsqueeze(-1).expand(-1, key.shape[1]))
        self._keep("positions", kept)
        self._keep("scores", scores.gather(2, index).masked_fill(kept < 0, 0.0))
        self._start_decoding()

    def _prompt_entries(
        self, query: Tensor, key: Tensor, budgets: Tensor, left_padding: Tensor, capacity: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Chooses the entries that are kept of a prompt.

        query (B, H, n, D): the queries of the last n of the P tokens of key (B, Hkv, P, D). Returns their positions,
        (B, Hkv, C) int64, the first to leave first, -1 past the end; and the accumulated probability of each position,
        (B, Hkv, P) float32, where the method uses it.
        """
        raise NotImplementedError

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One decoding step: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        self.phase = Phase.DECODING
        names = ("cumulative_length" if name == "length" else name for name in CompactState._fields)
        state = CompactState(*(getattr(self, name) for name in names))
        return self.operator(compact_step)(query, key, value, state, self.sink_tokens, self.heavy, scaling)


def best_first_last(scores: Tensor, preferred: Tensor, budgets: Tensor, left_padding: Tensor, capacity: int) -> Tensor:
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
