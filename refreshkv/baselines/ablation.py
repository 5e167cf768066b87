"""RefreshKV with one part changed: the paper's ablations (tables 4 and 8), for its fixed schedule, in plain PyTorch.

- `group`: how a step's scores of a group of query heads become one score for their key/value head (table 8).
- `selects=False`: full steps attend to all tokens but never choose again (table 4, "without refresh").
- `attends=False`: the step that chooses again attends to its small cache only (table 4, "without full attention").

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`, `D` head size, `L` tokens so far, `W`
slots of a selection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.cache.layer import RefreshLayer
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.preallocated_layer import Phase
from refreshkv.config import RefreshConfig
from refreshkv.ops.naive.selection import best_positions, observed_probabilities, pool
from refreshkv.ops.naive.step import decode
from refreshkv.ops.state import LAST_FULL, PADDING, PROMPT_LENGTH, FullSteps
from refreshkv.settings import SettingsError

GROUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda probabilities: probabilities.amax(dim=2),
    "mean": lambda probabilities: probabilities.mean(dim=2),
    "first": lambda probabilities: probabilities[:, :, 0],
}
"""Probabilities of the group's query heads (B, Hkv, G, N, L) -> scores of their key/value head (B, Hkv, N, L)."""


@dataclass(frozen=True)
class AblationConfig:
    """Settings of an ablation; the defaults are RefreshKV itself. Raises `SettingsError` for values outside their
    range."""

    budget: int | float = 0.125
    """Entries of the small cache: a number of tokens, or a share of the prompt."""
    stride: int = 10
    """Decoding steps from one full step to the next."""
    group: str = "max"
    """"max" or "mean" over the group's query heads, or "first": the group's first head alone."""
    selects: bool = True
    """Whether a full step chooses the next small cache."""
    attends: bool = True
    """Whether a full step attends to all tokens."""

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise SettingsError(f"group must be one of {', '.join(GROUPS)}, got {self.group!r}")
        RefreshConfig(budget=self.budget, stride=self.stride)  # has the same ranges


class AblationLayer(RefreshLayer):
    """A layer of RefreshKV with one part changed. It has the state of `RefreshLayer`."""

    takes_terms = takes_other_values = takes_look_ahead = False

    def __init__(self, max_cache_len: int, settings: AblationConfig):
        super().__init__(max_cache_len, RefreshConfig(budget=settings.budget, stride=settings.stride))
        self.settings = settings
        self.is_compileable = False  # the readable form reads the length back to the host

    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One decoding step: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D)."""
        self.phase = Phase.DECODING
        return self._readable_step(query, key, value, scaling)  # pyright: ignore[reportAttributeAccessIssue]  # disable()

    @torch.compiler.disable
    @torch.no_grad()
    def _readable_step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        position = int(self.cumulative_length)
        self.keys[:, :, position], self.values[:, :, position] = key[:, :, 0], value[:, :, 0]
        self.cumulative_length.add_(1)
        known, contents = self.keys[:, :, : position + 1], self.values[:, :, : position + 1]
        is_full = (position - (self.row_state[:, PROMPT_LENGTH] - 1)) % self.settings.stride == 0
        attends = is_full & self.settings.attends
        output = decode(query, known, contents, attends, self.row_state, self.selected.long(), scaling)
        self.full_steps[:, position] = attends
        if self.settings.selects and bool(is_full.any()):
            last = torch.full_like(self.row_state[:, PADDING], position)
            best = self._best(query, known, last, scaling)
            self.selected.copy_(torch.where(is_full[:, None, None], best, self.selected))
            self.row_state[:, LAST_FULL] = torch.where(is_full, last, self.row_state[:, LAST_FULL])
        return output.transpose(1, 2)

    def _select(self, observers: Tensor, last: Tensor, scaling: float, *changes: Any) -> Tensor:
        """As `RefreshLayer._select`. `changes`, of the softmax and the look-ahead queries, are none: this layer takes
        neither."""
        return self._best(observers[:, :, -1:], self._known_keys(), last, scaling)

    def _best(self, query: Tensor, key: Tensor, last: Tensor, scaling: float) -> Tensor:
        """The positions that a step at `last` (B,) keeps, by rank: query (B, H, 1, D), key (B, Hkv, L, D) ->
        (B, Hkv, W)."""
        _, budgets, left_padding, _ = self.row_state.unbind(1)
        options, positions = self.config.selection_options(), last[:, None]
        probabilities = observed_probabilities(query.unsqueeze(3), key, positions, left_padding, scaling)
        scores = GROUPS[self.settings.group](probabilities.squeeze(4))  # (B, Hkv, 1, L)
        scores = pool(scores, positions, left_padding, options.pool_kernel)
        steps = FullSteps(positions, budgets, left_padding, self.width, droppable=self.width)
        return best_positions(scores, steps, options).squeeze(2)


class AblationCache(PreallocatedCache):
    """The cache of an ablation; the settings are those of `AblationConfig`."""

    def __init__(
        self,
        config: PretrainedConfig,
        max_cache_len: int,
        budget: int | float = 0.125,
        stride: int = 10,
        group: str = "max",
        selects: bool = True,
        attends: bool = True,
    ):
        settings = AblationConfig(budget, stride, group, selects, attends)
        super().__init__(config, max_cache_len, lambda: AblationLayer(max_cache_len, settings))
