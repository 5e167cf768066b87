"""Prompts in chunks, `generate(prefill_chunk_size=...)`: tells the cache which tokens belong to the prompt.

The last chunk of a prompt may be a single token, which looks like a decoding step: the model is called with the same
arguments. The one place where transformers says what a call is for is `prepare_inputs_for_generation`, the method of a
model that its generation loops call before each pass, and which models override as they need it.
"""

from functools import partial, update_wrapper
from typing import Any

from transformers import PreTrainedModel

from refreshkv.cache.preallocated import PreallocatedCache


def announce_chunks(model: PreTrainedModel) -> None:
    """Gives `model` a `prepare_inputs_for_generation` that first tells a `PreallocatedCache` of chunks of a prompt."""
    if "prepare_inputs_for_generation" not in vars(model) and hasattr(model, "prepare_inputs_for_generation"):
        generating: Any = model  # PreTrainedModel does not declare what generate() calls
        prepare = type(generating).prepare_inputs_for_generation  # whose signature generate() reads
        generating.prepare_inputs_for_generation = update_wrapper(partial(_prepare_inputs, model), prepare)


def _prepare_inputs(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The model's own `prepare_inputs_for_generation`, after the cache was told if the tokens are a chunk."""
    cache = kwargs.get("past_key_values")
    # Only for a chunk of a prompt does transformers (5.17 to 5.23) not say how many of the tokens the cache lacks.
    # Releases that say whether the prompt is being processed say so for a chunk.
    is_chunk = "next_sequence_length" not in kwargs and kwargs.get("is_first_iteration", True)
    if is_chunk and isinstance(cache, PreallocatedCache):
        cache.continue_prompt()
    return type(model).prepare_inputs_for_generation(model, *args, **kwargs)
