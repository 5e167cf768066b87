"""Learned look-ahead: trained queries, further observers beside a step's own query (docs/specification.md, section 13).

Each full-attention layer gets a `LookAhead` as a child of its attention module.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refreshkv.attention.look_ahead_config import LookAheadConfig
from refreshkv.attention.look_ahead_module import CHILD, LookAhead, Rotation, look_ahead_of, turned_back
from refreshkv.config import RefreshConfig, Simulation, Trace
from refreshkv.errors import NotRefreshable
from refreshkv.settings import SettingsError

CONFIG_KEY = "refreshkv_look_ahead"
"""Entry of a model's config.json with the number of queries and their rank. The weights are in a file beside it."""

PROBED_TOKENS = 8
"""Number of equal tokens in the pass by which `add_look_ahead` finds how a model rotates its queries."""

CHANGING_FREQUENCIES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length of the text."""


def look_ahead_modules(model: nn.Module) -> dict[int, LookAhead]:
    """The look-ahead queries of each layer, by the layer's number; empty without any."""
    owners: Any = (module for module in model.modules() if look_ahead_of(module) is not None)
    return {module.layer_idx: module.look_ahead for module in owners}


def add_look_ahead(model: PreTrainedModel, queries: int = 2, rank: int = 8, seed: int = 0) -> PreTrainedModel:
    """Adds look-ahead queries to each full-attention layer of an enabled model; returns the model.

    From then on simulated passes and `RefreshCache` use them; untrained, they change nothing. They are parameters of
    the model; `save_look_ahead` saves them, and `enable` loads them.

    Raises `NotRefreshable` unless each layer rotates the whole head by a rotary embedding of the usual form, which a
    pass over a few equal tokens checks.
    """
    LookAheadConfig(queries=queries, rank=rank)
    calls: Any = getattr(model, "refreshkv_calls", None)
    if calls is None:
        raise SettingsError("call refreshkv.enable(model) before look-ahead queries are added")
    if look_ahead_modules(model):
        raise SettingsError("the model has look-ahead queries already: call remove_look_ahead(model) first")
    _validate_frequencies(model)
    attention: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "refreshkv_calls") and getattr(module, "layer_idx", None) in calls.refreshable
    ]
    generator = torch.Generator().manual_seed(seed)
    for module in attention:
        weight = next(module.parameters())
        kv_heads = _kv_heads(module)
        floating = weight.dtype if weight.is_floating_point() else torch.float32
        added = LookAhead(kv_heads, module.head_dim, queries, rank, dtype=floating, device=weight.device)
        start = torch.randn(added.down.shape, generator=generator) * module.head_dim**-0.5
        with torch.no_grad():
            added.down.copy_(start)
        module.add_module(CHILD, added)
    try:
        _find_frequencies(model)
    except BaseException:
        remove_look_ahead(model)
        raise
    model.config.refreshkv_look_ahead = {"queries": queries, "rank": rank}
    return model


def ensure_look_ahead(model: PreTrainedModel, settings: LookAheadConfig, seed: int) -> None:
    """Adds look-ahead queries of these settings to an enabled model, unless it has them from an earlier training."""
    found = getattr(model.config, CONFIG_KEY, None)
    wanted = {"queries": settings.queries, "rank": settings.rank}
    if found is None:
        add_look_ahead(model, settings.queries, settings.rank, seed)
    elif found != wanted:
        raise SettingsError(
            f"look_ahead: the model has {found['queries']} look-ahead queries of rank {found['rank']}, not "
            f"{settings.queries} of rank {settings.rank}: set the same, or call remove_look_ahead(model) before"
        )


def mean_divergence(model: nn.Module, trace: Trace) -> Tensor:
    """The mean over layers of the divergences in the trace of a pass, a scalar; 0 for a plain pass. Every look-ahead
    parameter gets a gradient from it, perhaps zero."""
    found = list(trace.look_ahead_divergences.values())
    parts = [part for module in look_ahead_modules(model).values() for part in module.parameters()]
    nothing = torch.stack([part.float().sum() for part in parts]).sum() * 0.0
    return torch.stack(found).float().mean() + nothing if found else nothing


def remove_look_ahead(model: PreTrainedModel) -> PreTrainedModel:
    """Removes the look-ahead queries from a model; returns the model."""
    for module in [module for module in model.modules() if look_ahead_of(module) is not None]:
        del module._modules[CHILD]
    if hasattr(model.config, CONFIG_KEY):
        delattr(model.config, CONFIG_KEY)
    return model


def freeze_model(model: nn.Module) -> list[nn.Parameter]:
    """Freezes all parameters but the look-ahead queries; returns the parameters that it froze."""
    own = {id(part) for module in look_ahead_modules(model).values() for part in module.parameters()}
    frozen = [part for part in model.parameters() if part.requires_grad and id(part) not in own]
    for part in frozen:
        part.requires_grad_(False)
    return frozen


def _kv_heads(module: Any) -> int:
    heads = module.config.num_attention_heads
    return heads // getattr(module, "num_key_value_groups", 1)


def _validate_frequencies(model: PreTrainedModel) -> None:
    """Refuses rotary embeddings whose frequencies depend on the length: those of look-ahead queries are fixed."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    changing = [kind.get("rope_type") for kind in kinds if kind.get("rope_type") in CHANGING_FREQUENCIES]
    if changing:
        raise NotRefreshable(
            f"look-ahead: the model's rotary embedding ({changing[0]}) changes its frequencies with the length of the "
            "text, and those of look-ahead queries are fixed: use the model without look-ahead"
        )


@torch.no_grad()
def _find_frequencies(model: PreTrainedModel) -> None:
    """Sets each layer's rotary frequencies by a pass over equal tokens at different positions.

    With equal tokens a layer's query before the rotary embedding is the same at every position. Raises `NotRefreshable`
    for a layer whose queries, rotated back, are not equal.
    """
    seen: dict[int, tuple[Tensor, Rotation]] = {}
    layers = look_ahead_modules(model)

    def note(number: int) -> Any:
        return lambda module, args, output: seen.__setitem__(number, args)

    handles = [module.register_forward_hook(note(number)) for number, module in layers.items()]
    ids = torch.full((1, PROBED_TOKENS), model.config.get_text_config(decoder=True).vocab_size // 2)
    was_training = model.training
    try:
        model.eval()
        every = Simulation(1, RefreshConfig(budget=PROBED_TOKENS, stride=1))
        model(ids.to(model.device), simulation=every, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for number, module in layers.items():
        query, rotation = seen[number]
        cos, sin = (part.float() for part in rotation)
        # the angles are 0 at position 0, and the frequencies at position 1
        module.frequencies.copy_(torch.atan2(sin[0, 1], cos[0, 1])[: cos.shape[-1] // 2])
        before = turned_back(query.float(), cos[:, None], sin[:, None])
        tolerance = max(torch.finfo(part.dtype).eps for part in (query, torch.zeros(1))) ** 0.5
        if not (before - before[:, :, :1]).abs().max() <= tolerance * before.abs().max():
            raise NotRefreshable(
                f"look-ahead: layer {number} rotates its queries in another way than look-ahead queries do, or not at "
                "all: use the model without look-ahead"
            )
