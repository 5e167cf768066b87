"""Finds the generation settings of a model's own files (generation_config.json), and refuses those that change a text.

`generate()` applies all of them silently, beneath its arguments. Our commands apply only those that they print.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from refreshkv.settings import SettingsError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Part of the model: which tokens begin, end and fill a text."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Change nothing unless tokens are sampled."""

WITHOUT_EFFECT = (
    *("do_sample", "max_length", "max_new_tokens", "cache_implementation", "cache_config", "max_cache_len"),
    *("_from_model_config", "transformers_version", "decoder_start_token_id", "early_stopping", "length_penalty"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "is_assistant"),
    *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size", "use_mtp", "disable_compile"),
    *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "continuous_batching_config"),
)
"""Our commands always set these themselves, or these have no effect without beams, an assistant or an encoder."""

IGNORE_OPTION = "--ignore-generation-config"
"""The scripts' option to leave the model's own generation settings out."""


def own_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The generation settings of the model's files that differ from those of plain greedy decoding, by name.

    Settings without an effect on our commands, and the tokens that begin and end a text, are left out.
    """
    plain, known = GenerationConfig._get_default_generation_params(), GenerationConfig().to_dict()
    found = {}
    for name, value in model.generation_config.to_dict().items():
        is_off = value in (None, [], {}, "", 0, False) and name not in ("use_cache", "top_k")
        is_plain = value is None or is_off or value == plain.get(name)
        if name in known and not is_plain and name not in (*TOKENS, *WITHOUT_EFFECT):
            found[name] = value
    return found


def refuse_own_settings(model: PreTrainedModel, taken: Iterable[str] = (), samples: bool = False) -> None:
    """Raises `SettingsError` that names the first generation setting of the model's files that would change the text.

    Args:
        taken: settings that the caller takes and prints.
        samples: whether tokens are sampled, so that the settings of sampling matter.
    """
    passed = {*taken, *(() if samples else SAMPLING)}
    for name, value in own_settings(model).items():
        if name not in passed:
            raise SettingsError(
                f"--model: its generation_config.json sets {name}={value}, which would change what is generated: "
                f"leave its settings out with {IGNORE_OPTION}, or remove {name} there"
            )


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """While the block runs, `model.generate()` uses only its arguments and the model's special tokens."""
    owner = getattr(model, "module", model)  # DeepSpeed's engine passes attributes on to its module
    own = owner.generation_config
    owner.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in TOKENS})
    try:
        yield
    finally:
        owner.generation_config = own


def forget_own_settings(model: PreTrainedModel) -> None:
    """Removes the model's own generation settings for good, all but its special tokens."""
    own = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in TOKENS})
