"""What each layer of a model is to the cache: full attention, which is refreshed, or a layer of transformers' own."""

from typing import Any, NamedTuple

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from refreshkv.errors import NotRefreshable

FULL, SLIDING, RECURRENT, EMPTY = "full", "sliding", "recurrent", "empty"
"""Full attention; attention to a window; a state of fixed size (linear attention, convolutions); nothing to cache."""


class LayerKind(NamedTuple):
    """What one decoder layer keeps of the tokens before."""

    name: str
    """FULL, SLIDING, RECURRENT or EMPTY."""
    window: int | None = None
    """Tokens of a sliding window."""

    @property
    def is_refreshed(self) -> bool:
        """Whether the layer decodes from a small cache."""
        return self.name == FULL

    @property
    def attends(self) -> bool:
        """Whether the layer has keys and values of its own."""
        return self.name in (FULL, SLIDING)


def layer_kinds(model_config: PretrainedConfig) -> list[LayerKind]:
    """The kind of each decoder layer, as transformers' own cache for this configuration has it.

    Raises `NotRefreshable` for layers whose keys and values are not those of an ordinary attention.
    """
    config = model_config.get_text_config(decoder=True)
    _validate_types(config)
    kinds = [_kind(layer, config.model_type) for layer in own_layers(model_config)]
    layers = getattr(config, "num_hidden_layers", len(kinds))
    if len(kinds) != layers or not kinds:
        raise NotRefreshable(
            f"{config.model_type}: transformers' cache has {len(kinds)} layers and the model {layers}: layers that "
            "share the keys and values of others cannot be refreshed"
        )
    return kinds


def own_layers(model_config: PretrainedConfig) -> list[Any]:
    """transformers' own cache layers for a configuration, one for each decoder layer.

    Raises `NotRefreshable` if it has none.
    """
    config = model_config.get_text_config(decoder=True)
    try:
        return DynamicCache(config=model_config).layers
    except Exception as error:  # the type depends on what the configuration lacks
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NotRefreshable(
            f"{config.model_type}: transformers makes no key/value cache for it ({type(error).__name__}: {reason})"
        ) from error


def has_recurrent_layers(model_config: PretrainedConfig) -> bool:
    """Whether some layer keeps a state of fixed size instead of keys and values."""
    return any(kind.name == RECURRENT for kind in layer_kinds(model_config))


def _validate_types(config: PretrainedConfig) -> None:
    """Refuses layers that look ordinary to a cache and are not."""
    types = getattr(config, "layer_types", None)
    if types is None and getattr(config, "attention_chunk_size", None) is not None:
        types = ["chunked_attention"]
    if "chunked_attention" in (types or ()):
        raise NotRefreshable(
            f"{config.model_type}: layers of type chunked_attention attend to their own chunk of the text, which the "
            "refresh attention has no mask for"
        )
    shared = getattr(config, "num_kv_shared_layers", None) or "reuse" in (
        getattr(config, "kv_sharing_modes", None) or ()
    )
    if shared:
        raise NotRefreshable(
            f"{config.model_type}: some layers read the keys and values of others, which a small cache of their own "
            "would need a selection for"
        )


def _kind(layer: Any, model_type: str) -> LayerKind:
    """The kind of one of transformers' cache layers, by its class itself: subclasses keep more than these."""
    if type(layer) is DynamicLayer:
        return LayerKind(FULL)
    if type(layer) is DynamicSlidingWindowLayer:
        return LayerKind(SLIDING, layer.sliding_window)
    if type(layer) is LinearAttentionLayer:
        return LayerKind(RECURRENT)
    if type(layer).__name__ == "DummyLayer":  # which some releases of transformers do not have
        return LayerKind(EMPTY)
    raise NotRefreshable(
        f"{model_type}: layers with a {type(layer).__name__} of transformers have no refreshable cache"
    )
