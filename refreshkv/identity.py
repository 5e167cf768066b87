"""Which model computed something: what has to be equal for its keys and values to be another run's too."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

from refreshkv.layers import layer_windows
from refreshkv.settings import SettingsError

SAMPLED_VALUES = 64
"""Values of each weight that a model's fingerprint looks at."""

LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies follow the length of the whole input, so that a prefix has no keys of its own."""


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the model's type, data type and a sample of each of its weights: it changes when they are trained."""
    digest = hashlib.sha256(f"{type(model).__name__} {model.dtype}".encode())
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED_VALUES)]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """All that the keys and values of a prompt depend on, beside its tokens, as plain values by name.

    Raises `SettingsError` for rotary embeddings that depend on the length of the whole input.
    """
    config = model.config.get_text_config(decoder=True)
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = {rotary.get("rope_type"), *(part.get("rope_type") for part in rotary.values() if isinstance(part, dict))}
    for kind in sorted(kinds & set(LENGTH_DEPENDENT_ROTARY)):
        raise SettingsError(
            f"rope_type={kind}: the keys of a prefix change with the length of the prompt, so they cannot be reused; "
            "leave out the prefix store for this model"
        )
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "rotary": json.loads(json.dumps(rotary, sort_keys=True, default=str)),
        "layers": [window or "full" for window in layer_windows(model.config)],
        "heads": [config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)],
        "weights": fingerprint(model),
    }


def first_difference(here: dict[str, Any], there: dict[str, Any]) -> str | None:
    """The name of the first entry of `here` that `there` has otherwise or lacks; None if all are equal."""
    return next((name for name, value in here.items() if there.get(name) != value), None)
