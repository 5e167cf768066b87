"""The attention function registered with transformers: prompt, simulated rows, decoding steps.

Training and generation come through here: a `Simulation` computes all positions of known tokens at once, a
`RefreshCache` one token at a time, and both equal `refreshkv.ops.naive`. Without either, attention is the ordinary one.

Shapes: `B` batch rows, `T` query positions, `L` key positions, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from collections import Counter
from collections.abc import Callable
from copy import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refreshkv import ops, schedule
from refreshkv.cache import BufferedCache, BufferedLayer, check_room
from refreshkv.config import Simulation
from refreshkv.settings import SettingsError

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""torch's own order prefers its flash attention, which takes nearly twice cuDNN's time on Hopper GPUs. But with a
mask over 64 keys more than a multiple of 128, cuDNN's gradient of a query whose scores all lie below -88 is nan."""

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
    over all, where other processes have the rest (`refreshkv.parallel`). Returns (B, T, H, D) and None.
    """
    scaling = module.head_dim**-0.5 if scaling is None else scaling
    left_padding = _checked_padding(attention_mask)

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
    plan = schedule.plan(query.detach(), prompt, config.stride, config.threshold, average_heads)
    if simulation.record:
        simulation.full_steps[module.layer_idx] = _as_flags(plan.full_positions, length)
    if prompt == length:
        return ordinary(query, key, value)
    padding = _no_padding(query) if left_padding is None else left_padding
    arguments = (*plan, config.budgets(prompt - padding), padding)
    settings = {"scaling": scaling, **config.rows_settings(prompt, length, padded=left_padding is not None)}
    if dense and ops.takes_whole_rows(query, key, value, prompt, settings["uniform"]):
        return ops.whole_rows(query, key, value, *arguments, **settings)
    settings["uniform"] = settings["uniform"] and _is_familiar(simulation, query, key)
    computed = _computed_prompt(query, prompt) if dense else prompt
    parts = _SplitAtPrompt.apply(query, key, value, prompt, computed, config.observation_window)
    *early, late_query, key, value = parts
    output = ordinary(*early)[:, :prompt]
    decoded = ops.refresh_rows(late_query, key, value, *arguments, **settings)
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


def ordinary_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left_padding: Tensor | None,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    implementation: str,
    **kwargs,
) -> Tensor:
    """Causal attention by one of transformers' own implementations; the queries are the last T of L positions.

    Returns (B, T, H, D).
    """
    is_flash = implementation.startswith("flash")
    if is_flash:
        # transformers reads the implementation's name from the module's config, where ours stands
        config = copy(module.config)
        config._attn_implementation = implementation
        mask = _key_mask(left_padding, key.shape[2])
        module = SimpleNamespace(config=config, is_causal=True, layer_idx=module.layer_idx, modules=module.modules)
        kwargs.pop("position_ids", None)  # of the whole row, and packed sequences are refused anyway
    else:
        named = _has_a_name(left_padding, sliding_window, query)
        if named and implementation == "sdpa" and not dropout and ops.takes_block(query, key, value):
            return ops.block(query, key, value, scaling).transpose(1, 2)
        if named and query.shape[2] not in (1, key.shape[2]):
            mask = causal_lower_right(query.shape[2], key.shape[2])
        else:
            mask = _causal_mask(left_padding, query.shape[2], key.shape[2], sliding_window, query.device)
    first = 1 if isinstance(mask, Tensor) and key.shape[2] % 128 == 64 else 0
    with sdpa_kernel(FASTEST_FIRST[first:], set_priority=True):
        output, _ = ALL_ATTENTION_FUNCTIONS[implementation](
            module, query, key, value, mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window, **kwargs
        )
    return _UpstreamInLayout.apply(output) if output.requires_grad else output


class _UpstreamInLayout(torch.autograd.Function):
    """The same (B, T, H, D) tensor, whose gradient comes back laid out as itself.

    torch 2.11 keeps cuDNN's plan of a backward pass by the shapes and strides of query, key and value alone, but the
    plan holds the upstream gradient's strides too: one that comes with others, as a part cut out of longer rows does,
    would be read at the wrong places, or past its end.
    """

    @staticmethod
    def forward(ctx, output):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, upstream):
        return upstream.contiguous()


def _has_a_name(left_padding: Tensor | None, window: int | None, query: Tensor) -> bool:
    """Whether a prompt or a later block of it can tell the GPU's kernels its pattern by name: they then skip what is
    hidden, where a mask in full would be read, and grows with the product of the lengths."""
    plain = left_padding is None and window is None and not torch.compiler.is_compiling()
    return plain and query.is_cuda and query.dtype != torch.float64


def _key_mask(left_padding: Tensor | None, columns: int) -> Tensor | None:
    """(B, L) bool: the keys that exist; None if all do."""
    if left_padding is None:
        return None
    return torch.arange(columns, device=left_padding.device) >= left_padding[:, None]


def _causal_mask(
    left_padding: Tensor | None, rows: int, columns: int, window: int | None, device: torch.device
) -> Tensor | None:
    """(B or 1, 1, T, L) bool, or None where the implementation's own causal flag says the same."""
    if left_padding is None and (rows == 1 or rows == columns) and (window is None or columns <= window):
        return None
    column = torch.arange(columns, device=device)
    row = torch.arange(columns - rows, columns, device=device).unsqueeze(-1)
    mask = column <= row
    if window is not None:
        mask = mask & (column > row - window)
    if left_padding is not None:
        mask = mask & _key_mask(left_padding, columns).unsqueeze(1)
        mask = mask.unsqueeze(1)
    else:
        mask = mask[None, None]
    return mask


def left_padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """The mask function registered with transformers: the number of padded columns of each row, or None without any.

    Takes transformers' mask arguments; attention_mask (B, columns) bool. Returns (B, 1, 1, 1) int64, counted from the
    layer's first key; four dimensions because transformers hands those on untouched. Raises `ValueError` for padding
    elsewhere than on the left, packed sequences and static caches, whose masks the attention could not see.
    """
    if isinstance(q_offset, Tensor):
        if torch.compiler.is_compiling() and q_length == 1:
            return None  # a decoding step: its layers know their padding
        max_cache_len = getattr(q_offset, "refreshkv_max_cache_len", None)
        if max_cache_len is not None and q_length == 1:
            check_room(0 if attention_mask is None else attention_mask.shape[1], max_cache_len)
            return None
        if max_cache_len is not None:
            q_offset = int(q_offset)
            kv_length = q_offset + q_length
    if isinstance(q_offset, Tensor) or kv_length + kv_offset != q_offset + q_length:
        raise ValueError(
            "the refresh attention has no use for a static cache: pass past_key_values=RefreshCache(...), or for "
            'ordinary attention model.set_attn_implementation("sdpa")'
        )
    if torch.compiler.is_compiling() and attention_mask is None:
        return None  # transformers cannot tell packed sequences while it is traced: the attention looks at positions
    if not allow_is_causal_skip and q_length > 1:
        raise ValueError("packed sequences and custom masks are not supported: give each row one sequence")
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < kv_length + kv_offset:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {kv_length + kv_offset} tokens: it covers the "
            "cached ones too"
        )
    mask = attention_mask[:, : kv_length + kv_offset].bool()
    padding = (~mask).sum(dim=-1)
    if not bool(padding.any()):
        return None
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not bool((mask == (columns >= padding[:, None])).all()):
        raise ValueError('only left padding is supported: set tokenizer.padding_side = "left"')
    if bool((padding >= mask.shape[1]).any()):
        raise ValueError(
            "a row of the batch is padding only: every row needs at least one token, in the first chunk of a prompt too"
        )
    return (padding - kv_offset).clamp(min=0)[:, None, None, None]


def _checked_padding(attention_mask: Tensor | None) -> Tensor | None:
    """(B,) int64 from what `left_padding_mask` returned; anything else was not made for this attention."""
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.int64 or attention_mask.shape[1:] != (1, 1, 1):
        raise ValueError(
            "the refresh attention takes a (B, T) attention_mask with left padding, not a prepared 4D mask"
        )
    return attention_mask[:, 0, 0, 0]


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
