"""Which layers of a model use full attention, and which keep a sliding window."""

from transformers import PretrainedConfig

from refreshkv.errors import NotRefreshable

KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention")


def layer_windows(model_config: PretrainedConfig) -> list[int | None]:
    """For each layer its sliding window in tokens, or None where it attends to everything.

    Raises `NotRefreshable` for layer types without an ordinary key/value cache.
    """
    config = model_config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    unknown = sorted(set(types) - set(KNOWN_LAYER_TYPES))
    if unknown:
        raise NotRefreshable(f"{config.model_type}: layers of type {', '.join(unknown)} have no refreshable cache")
    return [window if kind == "sliding_attention" else None for kind in types]
