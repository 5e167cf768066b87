"""enable(): attaches the refresh attention to a model, through transformers' registries and torch's hooks."""

import copy
import inspect
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from refreshkv.attention.function import refresh_attention
from refreshkv.attention.look_ahead_file import load_saved
from refreshkv.attention.masks import left_padding_mask
from refreshkv.attention.model_call import NAME, ModelCalls, attach
from refreshkv.cache.refresh import saved_config
from refreshkv.config import RefreshConfig
from refreshkv.errors import NotRefreshable
from refreshkv.generation.prompt_chunks import announce_chunks
from refreshkv.layers import LayerKind, layer_kinds
from refreshkv.settings import SettingsError

PROMPT_ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")

AttentionInterface.register(NAME, refresh_attention)
AttentionMaskInterface.register(NAME, left_padding_mask)


def enable(
    model: PreTrainedModel, config: RefreshConfig | None = None, prompt_attention: str = "sdpa"
) -> PreTrainedModel:
    """Gives `model` the refresh attention and returns it.

    Afterwards `model(ids, simulation=Simulation(...))` simulates the refresh pattern over known tokens (`refresh=` is
    the older name of this keyword), `trace=Trace()` records its full steps, `model.generate(...,
    past_key_values=RefreshCache(...))` decodes with the pattern, and calls with neither use full attention. Each such
    call checks that all full-attention layers took part in it. Look-ahead queries that were saved with the model
    (`save_look_ahead`) are loaded with it.

    Args:
        model: a transformers decoder whose attention goes through `AttentionInterface`.
        config: written to `model.config.refreshkv`, and so into an exported config.json; None takes what is there.
        prompt_attention: transformers' attention for prompts, sliding-window layers and calls without refresh.

    Raises `NotRefreshable`, a `SettingsError`, if the model's layers cannot be refreshed, and `SettingsError` if it has
    no saved configuration and none is given.
    """
    if prompt_attention not in PROMPT_ATTENTIONS:
        raise SettingsError(f"prompt_attention must be one of {', '.join(PROMPT_ATTENTIONS)}, got {prompt_attention!r}")
    kinds = layer_kinds(model.config)
    modules = _modules_of(model, kinds)
    for module in modules:
        forms = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in forms:
            raise NotRefreshable(f"{type(module).__name__} takes no further keywords, so no simulation can reach it")
    config = config or saved_config(model.config)
    if getattr(model.config.get_text_config(decoder=True), "attention_dropout", 0.0):
        raise SettingsError("attention dropout is not simulated: set attention_dropout=0 in the model's config")
    _own_config(model)
    model.set_attn_implementation(_attention_names(model.config))
    model.config.refreshkv = config.to_dict()
    attach(model, _decoders(model), modules, ModelCalls(kinds, prompt_attention))
    announce_chunks(model)
    load_saved(model)
    return model


def _modules_of(model: PreTrainedModel, kinds: list[LayerKind]) -> list[Any]:
    """The attention modules of the layers that have attention.

    Raises `NotRefreshable` unless each such layer has exactly one, and at least one layer has full attention.
    """
    attending = [number for number, kind in enumerate(kinds) if kind.attends]
    if not any(kind.is_refreshed for kind in kinds):
        windows = sorted({kind.window for kind in kinds if kind.window is not None})
        what = f"has a sliding window ({windows[0]} tokens)" if windows else "keeps a state of fixed size"
        way_out = "; if its checkpoint allows it, set config.sliding_window=None" if windows else ""
        raise NotRefreshable(f"every layer of this model {what}, so there is no full cache to refresh{way_out}")
    modules: list[Any] = [module for module in attention_modules(model) if module.layer_idx in attending]
    name = type(model).__name__
    if len(modules) > len(attending):  # decoders of encoder-decoder models also have cross-attention
        modules = [module for module in modules if module.is_causal]
    elif modules and not any(module.is_causal for module in modules):
        raise NotRefreshable(
            f"{name} attends in both directions: for a causal language model set config.is_decoder=True"
        )
    if not modules or not _uses_interface(model):
        raise NotRefreshable(f"{name} computes its attention by itself, not through transformers' attention interface")
    if sorted(module.layer_idx for module in modules) != attending:
        raise NotRefreshable(
            f"{name} has {len(attending)} layers with attention but {len(modules)} attention modules of the usual form"
        )
    if any(hasattr(module, "expand_kv") for module in modules):
        raise NotRefreshable(
            f"{type(model).__name__} caches one compressed vector a token (MLA) instead of keys and values: a small "
            "cache would need a selection and an attention on compressed keys, with the projections absorbed"
        )
    return modules


def _uses_interface(model: PreTrainedModel) -> bool:
    """Whether transformers can replace the attention of the model's decoder, according to transformers itself."""
    holders = [module for module in (model, *model.modules()) if isinstance(module, PreTrainedModel)]
    innermost: Any = [holder for holder in holders if attention_modules(holder)][-1]
    can_exchange = getattr(innermost, "_can_set_attn_implementation", None)  # not a public name
    return can_exchange is None or can_exchange()


def _own_config(model: PreTrainedModel) -> None:
    """Gives `model` a copy of its configuration, so that other models with the same one stay as they are."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)  # `copies` then has the copies of sub-configurations too
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and id(config) in copies:
            module.config = copies[id(config)]


def _attention_names(config: PretrainedConfig) -> str | dict[str, str]:
    """The refresh attention for the decoder; other parts, such as image encoders, keep theirs."""
    decoder = config.get_text_config(decoder=True)
    if decoder is config:
        return NAME
    return {"": NAME, **{name: NAME for name in config.sub_configs if getattr(config, name, None) is decoder}}


def _decoders(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of `model`, perhaps itself, that take tokens and contain its attention modules."""
    inner = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module is not model and attention_modules(module)
    ]
    return [model.base_model, *inner]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a transformers decoder, one per layer."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
