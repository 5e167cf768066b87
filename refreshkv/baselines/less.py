"""LESS: the first tokens and the last ones as in StreamingLLM, and a low-rank state of all tokens that left.

Dong et al., "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM Inference", ICML
2024, https://arxiv.org/abs/2402.09398. A token in the cache has the weight exp(q k) in the attention; one that left has
the weight phi(q) psi(k), so the sums of psi(k) v and psi(k) over all of these are enough, whatever their number. phi
and psi are small networks of each head, trained to give the output of full attention, the model itself unchanged:
`examples/less.py`.

Departures: the sparse policy is StreamingLLM's, one of the paper's; both networks have two layers; the entries keep the
positions that they were written with, and the prompt attends to all of itself, as in all baselines here.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `R` rank, `T` tokens, `E = K + 1`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from refreshkv.baselines.compact import CompactLayer
from refreshkv.baselines.streaming import StreamingConfig, StreamingLayer
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.preallocated_layer import Phase
from refreshkv.layers import layer_kinds
from refreshkv.settings import SettingsError


class LowRankKernels(nn.Module):
    """phi and psi of one layer: for each head a network with one hidden layer, whose output is made positive.

    A fresh one gives each token that left little weight, of which thousands make much: see `examples/less.py`.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, rank: int = 8, hidden: int = 64):
        super().__init__()
        self.query_in = nn.Parameter(torch.randn(heads, head_dim, hidden) / head_dim**0.5)
        self.query_out = nn.Parameter(torch.randn(heads, hidden, rank) * 0.1 / hidden**0.5)
        self.key_in = nn.Parameter(torch.randn(kv_heads, head_dim, hidden) / head_dim**0.5)
        self.key_out = nn.Parameter(torch.randn(kv_heads, hidden, rank) * 0.1 / hidden**0.5)

    def phi(self, query: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, T, R), at least 0."""
        return (nn.functional.gelu(query @ self.query_in) @ self.query_out).abs()

    def psi(self, key: Tensor) -> Tensor:
        """(B, Hkv, T, D) -> (B, Hkv, T, R), at least 0."""
        return (nn.functional.gelu(key @ self.key_in) @ self.key_out).abs()


def make_kernels(config: PretrainedConfig, rank: int = 8, hidden: int = 64) -> nn.ModuleList:
    """Untrained kernels, for each layer of full attention."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return nn.ModuleList(LowRankKernels(heads, kv_heads, head_dim, rank, hidden) for _ in range(_layers(config)))


def _layers(config: PretrainedConfig) -> int:
    return sum(kind.is_refreshed for kind in layer_kinds(config))


def held(length: int, prompt_length: int, budget: int, sink_tokens: int, positions: Tensor | None = None) -> Tensor:
    """Which of `length` tokens the cache holds at each query position, the token itself included: (Q, T) bool. All, in
    a prompt. positions (Q,): the query positions; None: all."""
    positions = torch.arange(length) if positions is None else positions
    row, column = positions[:, None], torch.arange(length, device=positions.device)
    recent = (column < sink_tokens) | (column >= row - (budget - sink_tokens)) | (row < prompt_length)
    return recent & (column <= row)


def parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernels: LowRankKernels,
    held_tokens: Tensor,
    scaling: float,
    positions: Tensor | None = None,
) -> Tensor:
    """The attention of Q known tokens at once, with gradients: query (B, H, Q, D), key, value (B, Hkv, T, D),
    held_tokens (Q, T) bool as from `held` -> (B, H, Q, D). positions (Q,): the query positions; None: all. Tokens
    before the query that are not held are in the low-rank state."""
    groups, column = query.shape[1] // key.shape[1], torch.arange(key.shape[2], device=key.device)
    causal = column <= (column if positions is None else positions)[:, None]
    logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    logits = logits.masked_fill(~held_tokens, -torch.inf)
    shift = logits.amax(-1, keepdim=True).clamp(min=0.0).detach()  # at least 0, so that exp(-shift) stays finite
    left = kernels.phi(query) @ kernels.psi(key).repeat_interleave(groups, 1).transpose(-1, -2)
    weights = (logits - shift).exp() + (left * (-shift).exp()).masked_fill(held_tokens | ~causal, 0.0)
    return weights @ value.repeat_interleave(groups, 1) / weights.sum(-1, keepdim=True)


class LessLayer(StreamingLayer):
    """A layer in plain PyTorch; decoding steps are not captured into a CUDA graph.

    State: `keys`, `values` (B, Hkv, E, D), the last entry for the token that attends; `positions` (B, Hkv, E), -1 for
    none; `low_rank` (B, Hkv, R, D) and `mass` (B, Hkv, R): the sums of psi(k) v and psi(k) over the tokens that left.
    """

    batch_state = (*CompactLayer.batch_state, "low_rank", "mass")
    positions: Tensor
    low_rank: Tensor
    mass: Tensor

    def __init__(self, max_cache_len: int, settings: StreamingConfig, kernels: LowRankKernels):
        super().__init__(max_cache_len, settings)
        self.kernels = kernels
        self.is_compileable = False

    def state_changed_by_step(self, length: int) -> tuple[str, ...]:
        return "keys", "values", "positions", "row_state", "low_rank", "mass"

    @torch.no_grad()
    def end_block(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        assert self.prompt is not None  # the block before this call
        key, value = self.prompt
        rank = self.kernels.key_out.shape[-1]
        self._keep("low_rank", key.new_zeros(*key.shape[:2], rank, value.shape[-1]))
        self._keep("mass", key.new_zeros(*key.shape[:2], rank))
        super().end_block(query, left_padding, scaling)  # pyright: ignore[reportAttributeAccessIssue]  # disable()
        column = torch.arange(key.shape[2], device=key.device)
        kept = (self.positions.unsqueeze(-1) == column).any(2)
        has_left = ~kept & (column >= left_padding[:, None, None])
        features = self.kernels.psi(key) * has_left.unsqueeze(-1)
        self.low_rank.copy_(features.transpose(-1, -2) @ value)
        self.mass.copy_(features.sum(2))

    @torch.no_grad()
    def step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.phase = Phase.DECODING
        self.keys[:, :, -1:], self.values[:, :, -1:] = key, value
        self.positions[..., -1] = self.cumulative_length
        self.cumulative_length += 1
        output = self._attend(query, scaling)
        self._replace_oldest()
        return output.transpose(1, 2)

    def _attend(self, query: Tensor, scaling: float) -> Tensor:
        """(B, H, 1, D) -> the same: the entries by their softmax weights, and what left by its state."""
        groups = query.shape[1] // self.keys.shape[1]
        keys, values, positions, low_rank, mass = (
            state.repeat_interleave(groups, 1)
            for state in (self.keys, self.values, self.positions, self.low_rank, self.mass)
        )
        logits = (query @ keys.transpose(-1, -2) * scaling).masked_fill((positions < 0).unsqueeze(2), -torch.inf)
        shift = logits.amax(-1, keepdim=True).clamp(min=0.0)
        weights, left = (logits - shift).exp(), self.kernels.phi(query) * (-shift).exp()
        total = weights.sum(-1, keepdim=True) + left @ mass.unsqueeze(-1)
        return (weights @ values + left @ low_rank) / total

    def _replace_oldest(self) -> None:
        """The token takes a free entry, or that of the oldest token behind the sink tokens, which joins the state."""
        used, budgets = self.row_state[:, 0], self.row_state[:, 1]
        entry = torch.arange(self.positions.shape[-1], device=self.positions.device)
        may_leave = (self.positions >= 0) & (entry >= self.sink_tokens) & (entry < entry[-1])
        oldest = self.positions.masked_fill(~may_leave, torch.iinfo(torch.int64).max).argmin(-1, keepdim=True)
        is_full = (used >= budgets)[:, None, None]
        place = torch.where(is_full, oldest, used[:, None, None])
        rows = place.unsqueeze(-1).expand(-1, -1, -1, self.keys.shape[-1])
        features = self.kernels.psi(self.keys.gather(2, rows)) * is_full.unsqueeze(-1)
        self.low_rank += features.transpose(-1, -2) @ self.values.gather(2, rows)
        self.mass += features.squeeze(2)
        self.keys.scatter_(2, rows, self.keys[:, :, -1:].clone())
        self.values.scatter_(2, rows, self.values[:, :, -1:].clone())
        self.positions.scatter_(2, place, self.positions[..., -1:].clone())
        self.row_state[:, 0] = torch.minimum(used + 1, budgets)


class LessCache(PreallocatedCache):
    """The cache of LESS: `kernels` for each layer as from `make_kernels`, trained; the rest as in `StreamingConfig`.

    Raises `SettingsError` unless there are kernels for each layer of full attention.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        max_cache_len: int,
        kernels: Iterable[LowRankKernels],
        budget: int | float = 0.125,
        sink_tokens: int = 4,
    ):
        settings, parts, layers = StreamingConfig(budget, sink_tokens), list(kernels), _layers(config)
        if len(parts) != layers:
            raise SettingsError(f"kernels are for {len(parts)} layers, the model has {layers}: train others")
        following = iter(parts)
        super().__init__(config, max_cache_len, lambda: LessLayer(max_cache_len, settings, next(following)))
