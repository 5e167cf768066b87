"""enable(): attaches the refresh attention to a transformers model, without patching or copying it."""

from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from refreshkv.attention.function import refresh_attention
from refreshkv.attention.masks import left_padding_mask
from refreshkv.cache.buffers import BufferedCache
from refreshkv.cache.refresh import saved_config
from refreshkv.config import RefreshConfig
from refreshkv.layers import layer_windows
from refreshkv.settings import SettingsError

NAME = "refreshkv"
PROMPT_ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")

AttentionInterface.register(NAME, refresh_attention)
AttentionMaskInterface.register(NAME, left_padding_mask)


def enable(
    model: PreTrainedModel, config: RefreshConfig | None = None, prompt_attention: str = "sdpa"
) -> PreTrainedModel:
    """Gives `model` the refresh attention and returns it.

    Afterwards `model(ids, refresh=Simulation(...))` simulates the pattern over known tokens,
    `model.generate(..., past_key_values=RefreshCache(...))` decodes with it, and calls with neither use full attention.

    Args:
        model: a transformers decoder whose attention goes through `AttentionInterface`.
        config: written to `model.config.refreshkv`, and so into an exported config.json; None reads that key back.
        prompt_attention: transformers' attention for prompts, sliding-window layers and calls without refresh.

    Raises `SettingsError` if the model cannot be refreshed, or has no saved configuration and none is given.
    """
    if prompt_attention not in PROMPT_ATTENTIONS:
        raise SettingsError(f"prompt_attention must be one of {', '.join(PROMPT_ATTENTIONS)}, got {prompt_attention!r}")
    config = config or saved_config(model.config)
    modules = attention_modules(model)
    windows = layer_windows(model.config)
    if len(modules) != len(windows):
        raise SettingsError(
            f"{type(model).__name__} has {len(windows)} layers but {len(modules)} attention modules of the usual form"
        )
    if all(window is not None for window in windows):
        raise SettingsError(
            f"every layer of this model has a sliding window ({windows[0]} tokens), so there is no full cache to "
            "refresh; if its checkpoint allows it, set config.sliding_window=None"
        )
    if getattr(model.config.get_text_config(decoder=True), "attention_dropout", 0.0):
        raise SettingsError("attention dropout is not simulated: set attention_dropout=0 in the model's config")
    model.set_attn_implementation(NAME)
    model.config.refreshkv = config.to_dict()
    for module in modules:
        _attach(module, prompt_attention)
    return model


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a transformers decoder, one per layer."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]


def _attach(module: nn.Module, prompt_attention: str) -> None:
    """Passes the layer's cache on to the attention function, which transformers does not."""
    if not hasattr(module, "refreshkv_prompt_attention"):
        module.register_forward_pre_hook(_add_keywords, with_kwargs=True)
    module.refreshkv_prompt_attention = prompt_attention


def _add_keywords(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    cache = kwargs.get("past_key_values")
    added = {"prompt_attention": module.refreshkv_prompt_attention}
    if isinstance(cache, BufferedCache):
        if kwargs.get("use_cache") is False:
            raise ValueError(f"use_cache=False and a {type(cache).__name__} exclude each other: leave one out")
        added["refresh_cache"] = cache
    return args, {**kwargs, **added}
