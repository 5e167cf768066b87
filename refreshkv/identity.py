"""Identifies the model that computed keys and values, so that they are reused with the same model only."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

from refreshkv.layers import layer_windows
from refreshkv.settings import SettingsError

SAMPLED_VALUES = 64
"""At least this many values of each weight, evenly spaced, enter a model's fingerprint (all, if it has fewer)."""

LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length of the whole input: a prefix has other keys in each."""


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256, in hex, of the model's class, dtype, and a sample of each weight: training changes it."""
    digest = hashlib.sha256(f"{type(model).__name__} {model.dtype}".encode())
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED_VALUES)]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that a prompt's keys and values depend on besides its tokens, as JSON values by name.

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
    """The first name in `here` whose value `there` lacks or has differently; None if there is none."""
    return next((name for name, value in here.items() if there.get(name) != value), None)
