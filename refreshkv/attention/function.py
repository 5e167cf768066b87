"""The attention function registered with transformers: a simulated pass, a prompt block, or a decoding step.

Training and generation both call this function. With a `Simulation` it computes all positions of known tokens at once,
with a `RefreshCache` one token at a time; both equal `refreshkv.ops.naive`. Without either it is ordinary attention.

Shapes: `B` batch rows, `T` query positions, `L` key positions, `H` query heads, `Hkv` key/value heads, `D` head size,
`P` prompt length.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refreshkv import ops
from refreshkv.attention.chunks import chunked_prompt
from refreshkv.attention.dense import DenseAttention
from refreshkv.attention.look_ahead_module import Rotation, look_ahead_of
from refreshkv.attention.look_ahead_plan import plan_with_look_ahead
from refreshkv.attention.masks import padding_from_mask
from refreshkv.attention.split import SplitAtPrompt, computed_length
from refreshkv.attention.two_streams import simulate_streams
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.preallocated_layer import PreallocatedLayer
from refreshkv.config import Simulation, Trace
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.schedule import position_flags
from refreshkv.ops.state import SoftmaxTerms
from refreshkv.settings import SettingsError

UNSUPPORTED = ("position_bias",)
"""Keywords by which some models change the softmax, and which we do not support: without them the outputs would not be
the model's, so a simulation or a cache is refused."""


def refresh_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    simulation: Simulation | None = None,
    trace: Trace | None = None,
    refresh_cache: PreallocatedCache | None = None,
    prompt_attention: str = "sdpa",
    average_heads: Callable[[Tensor], Tensor] | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    rotation: Rotation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in transformers' interface.

    Args:
        module: the layer's attention module.
        query: (B, H, T, D), after the rotary embedding.
        key, value: (B, Hkv, L, D).
        attention_mask: what `left_padding_mask` returned.
        scaling: factor of the scores; None: `D ** -0.5`.
        dropout: refused for a simulation or a cache.
        sliding_window: the layer's window in tokens; such a layer keeps its ordinary attention.
        simulation: settings of a teacher-forced pass; the T positions are then whole sequences.
        trace: receives the layer's full and selecting steps.
        refresh_cache: the cache that this call appends to and decodes from.
        prompt_attention: transformers' attention for the prompt and for ordinary attention.
        average_heads: maps the mean query of this process's heads, (B, C, D), to the mean over all processes' heads.
        s_aux: (H,), attention sinks. softcap: bound of the logits. rotation: the rotary embedding, for look-ahead.

    Returns (B, T, H, D), and None instead of attention weights.
    """
    _validate_module(module, kwargs)
    factor: float = module.head_dim**-0.5 if scaling is None else scaling
    left_padding = padding_from_mask(attention_mask)
    terms = SoftmaxTerms(s_aux, softcap)
    dense = DenseAttention(module, left_padding, factor, dropout, sliding_window, prompt_attention, kwargs, terms)
    if sliding_window is not None or (simulation is None and refresh_cache is None):
        return dense(query, key, value), None
    _validate(dropout, kwargs)
    if simulation is not None:
        module.refreshkv_calls.note(module.layer_idx)
        if simulation.config.rectify:
            _validate_streams(simulation, average_heads, rotation)
            return simulate_streams(dense, query, key, value, simulation, trace), None
        return _simulate(dense, query, key, value, simulation, trace, average_heads, rotation), None
    assert refresh_cache is not None
    return _through_cache(dense, query, key, value, refresh_cache, rotation), None


def _validate_module(module: Any, kwargs: dict[str, Any]) -> None:
    """Refuses modules of models without `refreshkv.enable`, and bidirectional attention."""
    if not hasattr(module, "refreshkv_calls"):
        raise RuntimeError(
            f'a {type(module).__name__} has the attention "refreshkv" by its config, perhaps another model\'s, but '
            "refreshkv.enable(model) has not seen its model: call it"
        )
    causal = (kwargs.get("is_causal"), getattr(module, "is_causal", None), getattr(module.config, "is_causal", None))
    if any(value is False for value in causal):
        raise ValueError("the refresh attention is causal: is_causal=False is not supported")


def _changes_of(
    layer: PreallocatedLayer, terms: SoftmaxTerms, module: Any, query: Tensor, rotation: Rotation | None
) -> dict[str, Any]:
    """Further keywords of a layer's `end_block` and `step`: `terms`, the changes of the softmax, and `look_ahead`, the
    look-ahead queries of the call's last token, (B, H, m, D). Refuses those that the layer does not support."""
    changes: dict[str, Any] = {}
    if not terms.is_plain:
        if not layer.takes_terms:
            raise SettingsError(
                f"the model's attention has {'sinks' if terms.sinks is not None else 'a softcap'}, which "
                f"{type(layer).__name__} does not follow: decode with RefreshCache(..., offload=False) or FullCache"
            )
        changes["terms"] = terms
    look_ahead = look_ahead_of(module)
    if look_ahead is not None and layer.takes_look_ahead is not None:
        if not layer.takes_look_ahead:
            raise SettingsError(
                f"the model has look-ahead queries, which {type(layer).__name__} does not follow: decode with "
                "RefreshCache(..., offload=False), or call remove_look_ahead(model)"
            )
        assert rotation is not None  # the attention module's hook adds it
        last = Rotation(*(part[:, -1:] for part in rotation))
        with torch.no_grad():
            changes["look_ahead"] = look_ahead(query[:, :, -1:], last).squeeze(2)
    return changes


def _simulate(
    dense: DenseAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    simulation: Simulation,
    trace: Trace | None,
    average_heads: Callable[[Tensor], Tensor] | None,
    rotation: Rotation | None,
) -> Tensor:
    """Attention of all positions of known tokens in one pass (specification, section 8): returns (B, T, H, D)."""
    length, prompt, config = query.shape[2], simulation.prompt_length, simulation.config
    _validate_prompt(simulation, length, key.shape[2], dense.left_padding)
    plan = config.plan(query, prompt, dense.left_padding, recurring=simulation.recurring, average_heads=average_heads)
    if trace is not None:
        trace.full_steps[dense.module.layer_idx] = position_flags(plan.full_positions, length)
        if plan.selecting_positions is not None:
            trace.selecting_steps[dense.module.layer_idx] = position_flags(plan.selecting_positions, length)
    if simulation.chunks is not None:
        _validate_chunks(average_heads)
    if prompt == length:
        return _prompt(dense, query, key, value, simulation)
    if (look_ahead := look_ahead_of(dense.module)) is not None:
        plan = plan_with_look_ahead(look_ahead, dense, query, key, plan, simulation, trace, rotation)
    options = config.selection_options()
    may_choose = dense.implementation == "sdpa" and dense.terms.is_plain  # the user chose any other attention
    may_choose = may_choose and simulation.chunks is None  # the fast forms know one chunk only
    if may_choose and CHOICE.takes_whole_sequence(query, key, value, plan):
        return ops.whole_sequence(query, key, value, plan, options, dense.scaling)
    computed = computed_length(query, prompt) if may_choose else prompt
    parts = SplitAtPrompt.apply(query, key, value, prompt, computed, config.observation_window)
    early_query, early_key, early_value, late_query, key, value = parts
    output = _prompt(dense, early_query, early_key, early_value, simulation)[:, :prompt]
    decoded = ops.refresh_rows(late_query, key, value, plan, options, dense.scaling, dense.terms)
    return torch.cat([output, decoded], dim=1)


def _prompt(dense: DenseAttention, query: Tensor, key: Tensor, value: Tensor, simulation: Simulation) -> Tensor:
    """Attention of a simulated prompt, whole or in chunks: query (B, H, T, D) -> (B, T, H, D)."""
    if simulation.chunks is None:
        return dense(query, key, value)
    return chunked_prompt(dense, query, key, value, simulation)


def _through_cache(
    dense: DenseAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PreallocatedCache,
    rotation: Rotation | None,
) -> Tensor:
    """Attention of a prompt's block or of a decoding step: query (B, H, T, D) -> (B, T, H, D)."""
    module: Any = dense.module
    layer: Any = cache.layers[module.layer_idx]
    if not torch.compiler.is_compiling() and not layer.stores_compiled_block:
        layer.validate_attention(query, key, value)
    module.refreshkv_calls.note(module.layer_idx)
    changes = _changes_of(layer, dense.terms, module, query, rotation)
    if layer.is_decoding:
        return layer.step(query, key, value, dense.scaling, **changes)
    if layer.stores_compiled_block:
        return layer.compiled_block(query, key, value, dense.left_padding, dense.scaling)
    block: Any = _prompt_block  # torch.compiler.disable hides its signature
    return block(dense, query, key, value, layer, changes)


@torch.compiler.disable
def _prompt_block(
    dense: DenseAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: PreallocatedLayer,
    changes: dict[str, Any],
) -> Tensor:
    """Ordinary attention of a prompt block, then the layer's selection after its last token: returns (B, T, H, D)."""
    output = (dense if layer.columns is None else replace(dense, columns=layer.columns))(query, key, value)
    left_padding = _no_padding(query) if dense.left_padding is None else dense.left_padding
    layer.end_block(query, left_padding, dense.scaling, **changes)
    return output


def _validate(dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuses arguments that simulations and caches do not support."""
    if dropout:
        raise ValueError(f"attention dropout ({dropout}) is not simulated: set model.config.attention_dropout to 0")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"models whose attention uses {name} are not supported")


def _validate_prompt(simulation: Simulation, length: int, keys: int, left_padding: Tensor | None) -> None:
    """Refuses a simulation of tokens that follow others, and a prompt length outside the tokens or inside padding."""
    prompt = simulation.prompt_length
    if left_padding is not None and bool((left_padding >= prompt).any()):
        raise SettingsError(f"prompt_length={prompt}: a row of the batch has only padding there")
    if keys != length:
        raise ValueError("simulation=Simulation(...) takes whole rows: pass use_cache=False and no cache")
    if prompt > length:
        raise SettingsError(f"prompt_length={prompt} is outside the row of {length} tokens")


def _validate_streams(
    simulation: Simulation, average_heads: Callable[[Tensor], Tensor] | None, rotation: Rotation | None
) -> None:
    """Refuses `rectify` for a model with look-ahead queries, and for sequences that are spread over processes, each of
    which would double its own columns."""
    if rotation is not None:
        raise SettingsError(
            "rectify=True does not follow look-ahead queries: set rectify=False, or call remove_look_ahead(model)"
        )
    if average_heads is not None:
        raise SettingsError("rectify=True with parallel.sequence > 1 is not supported: set parallel.sequence=1")


def _validate_chunks(average_heads: Callable[[Tensor], Tensor] | None) -> None:
    """Refuses chunks for sequences that are spread over processes: no test covers them."""
    if average_heads is not None:
        raise SettingsError("chunks with parallel.sequence > 1 are not supported: set parallel.sequence=1")


def _no_padding(query: Tensor) -> Tensor:
    return torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
