"""The attention function registered with transformers: prompt, simulated rows, decoding steps.

Training and generation come through here: a `Simulation` computes all positions of known tokens at once, a
`RefreshCache` one token at a time, and both equal `refreshkv.ops.naive`. Without either, attention is the ordinary one.

Shapes: `B` batch rows, `T` query positions, `L` key positions, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refreshkv import ops
from refreshkv.attention.dense import ordinary_attention
from refreshkv.attention.masks import padding_from_mask
from refreshkv.cache.buffers import BufferedCache, BufferedLayer
from refreshkv.config import Simulation
from refreshkv.ops.choice import CHOICE
from refreshkv.settings import SettingsError

PROMPT_STEP = 128
"""Prompts of simulated rows are computed up to a multiple of this on a GPU, the further rows for nothing: cuDNN makes a
plan for each new length, some ten milliseconds long, and takes tiles of 128 rows anyway."""

FAMILIAR = 8
"""Simulations of one shape after which its full steps go to cuDNN, which plans for each new one for some hundred
milliseconds in all. Where each step draws its prompt's length, few shapes come so often."""

_simulated: Counter[tuple] = Counter()
"""How many simulations each shape has had."""

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Changes of the softmax that some models ask for; ignoring one would give other numbers than the model's."""


def refresh_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    refresh: Simulation | None = None,
    refresh_cache: BufferedCache | None = None,
    prompt_attention: str = "sdpa",
    average_heads: Callable[[Tensor], Tensor] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer, in transformers' interface: query (B, H, T, D), key and value (B, Hkv, L, D).

    attention_mask: what `left_padding_mask` returned. average_heads: from the mean over these heads' queries to that
    over all, where other processes have the rest (`refreshkv.attention.sequence_parallel`). Returns (B, T, H, D) and
    None.
    """
    scaling = module.head_dim**-0.5 if scaling is None else scaling
    left_padding = padding_from_mask(attention_mask)

    def ordinary(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ordinary_attention(
            module, query, key, value, left_padding, scaling, dropout, sliding_window, prompt_attention, **kwargs
        )

    if sliding_window is not None or (refresh is None and refresh_cache is None):
        return ordinary(query, key, value), None

    _check_supported(dropout, kwargs)
    if torch.compiler.is_compiling() and query.shape[2] > 1 and kwargs.get("position_ids") is not None:
        consecutive = (kwargs["position_ids"].diff(dim=-1) == 1).all()
        torch._assert_async(consecutive, "packed sequences are not supported: give each row one sequence")
    if refresh is not None and refresh_cache is not None:
        raise ValueError("refresh=Simulation(...) and a RefreshCache exclude each other: pass one of them")
    if refresh is not None and left_padding is not None and bool((left_padding >= refresh.prompt_length).any()):
        raise SettingsError(f"prompt_length={refresh.prompt_length}: a row of the batch has only padding there")
    if refresh_cache is None:
        dense = prompt_attention == "sdpa"  # not one of the user's own choice
        return _simulate(
            module, query, key, value, left_padding, scaling, refresh, ordinary, dense, average_heads
        ), None
    layer = refresh_cache.layers[module.layer_idx]
    if layer.is_decoding:
        return layer.step(query, key, value, scaling), None
    return _prompt(layer, query, key, value, left_padding, scaling, ordinary), None


def _simulate(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left_padding: Tensor | None,
    scaling: float,
    simulation: Simulation,
    ordinary,
    dense: bool,
    average_heads: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """All positions of known tokens in one pass (specification, section 8): returns (B, T, H, D).

    dense: whether the prompt may be computed by whichever dense attention is the fastest.
    """
    length, prompt = query.shape[2], simulation.prompt_length
    config = simulation.config
    if key.shape[2] != length:
        raise ValueError("refresh=Simulation(...) takes whole rows: pass use_cache=False and no past_key_values")
    if prompt > length:
        raise SettingsError(f"prompt_length={prompt} is outside the row of {length} tokens")
    plan = config.plan(query, prompt, left_padding, average_heads=average_heads)
    if simulation.record:
        simulation.full_steps[module.layer_idx] = _as_flags(plan.full_positions, length)
    if prompt == length:
        return ordinary(query, key, value)
    options = config.selection_options()
    if dense and CHOICE.takes_whole_sequence(query, key, value, plan):
        return ops.whole_sequence(query, key, value, plan, options, scaling)
    plan = plan._replace(recurring=_is_familiar(simulation, query, key))
    computed = _computed_prompt(query, prompt) if dense else prompt
    parts = _SplitAtPrompt.apply(query, key, value, prompt, computed, config.observation_window)
    *early, late_query, key, value = parts
    output = ordinary(*early)[:, :prompt]
    decoded = ops.refresh_rows(late_query, key, value, plan, options, scaling)
    return torch.cat([output, decoded], dim=1)


def _is_familiar(simulation: Simulation, query: Tensor, key: Tensor) -> bool:
    """Whether plans for these shapes pay. Decided once for a simulation: layers that are computed again for the
    backward pass go the same way, to the last bit."""
    if torch.compiler.is_compiling():
        return True
    shape = (*query.shape, *key.shape, simulation.prompt_length, simulation.config.stride)
    if shape not in simulation.familiar:
        _simulated[shape] += 1
        simulation.familiar[shape] = _simulated[shape] > FAMILIAR
    return simulation.familiar[shape]


def _computed_prompt(query: Tensor, prompt: int) -> int:
    """How many rows of query (B, H, T, D) the prompt's attention is computed of: at least the prompt's."""
    return min(-(-prompt // PROMPT_STEP) * PROMPT_STEP, query.shape[2]) if query.is_cuda else prompt


class _SplitAtPrompt(torch.autograd.Function):
    """Query, key and value of the first `computed` positions; then the queries from the prompt's last `observing`
    positions on, and keys and values whole. Backward puts the gradients together in one pass, where autograd by itself
    would pad each with zeros; those of queries beyond the prompt are zero, for nobody uses what they computed."""

    @staticmethod
    def forward(ctx, query, key, value, prompt, computed, observing):
        ctx.prompt, ctx.computed, ctx.first = prompt, computed, max(0, prompt - observing)
        early = (tensor[:, :, :computed] for tensor in (query, key, value))
        return *early, query[:, :, ctx.first :], key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx, early_query, early_key, early_value, late_query, key, value):
        query = _positions_first(late_query, ctx.first + late_query.shape[2])
        query[:, :, : ctx.prompt] = early_query[:, :, : ctx.prompt]
        query[:, :, ctx.prompt :] = late_query[:, :, ctx.prompt - ctx.first :]
        query[:, :, ctx.first : ctx.prompt] += late_query[:, :, : ctx.prompt - ctx.first]
        for whole, early in ((key, early_key), (value, early_value)):
            whole[:, :, : ctx.computed] += early
        return query, key, value, None, None, None


def _positions_first(like: Tensor, length: int) -> Tensor:
    """An empty (B, H, length, D) tensor laid out as the projections of a model are, positions before heads."""
    batch, heads, _, head_dim = like.shape
    return like.new_empty(batch, length, heads, head_dim).transpose(1, 2)


@torch.compiler.disable
def _prompt(
    layer: BufferedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left_padding: Tensor | None,
    scaling: float,
    ordinary,
) -> Tensor:
    """A prompt block, or another turn's: ordinary attention, then the first selection: returns (B, T, H, D)."""
    output = ordinary(query, key, value)
    layer.begin(query, _no_padding(query) if left_padding is None else left_padding, scaling)
    return output


def _check_supported(dropout: float, kwargs: dict) -> None:
    if dropout:
        raise ValueError(f"attention dropout ({dropout}) is not simulated: set model.config.attention_dropout to 0")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"models whose attention uses {name} are not supported")


def _no_padding(query: Tensor) -> Tensor:
    return torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)


def _as_flags(full_positions: Tensor, length: int) -> Tensor:
    """(B, C) positions, -1 where none -> (B, length) bool."""
    flags = torch.zeros(full_positions.shape[0], length + 1, dtype=torch.bool, device=full_positions.device)
    return flags.scatter(1, full_positions.masked_fill(full_positions < 0, length), True)[:, :length]
