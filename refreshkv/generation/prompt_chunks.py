"""Tells a cache what only `generate()` knows: whether a call's tokens belong to the prompt, and all tokens so far.

A prompt may come in chunks, `generate(prefill_chunk_size=...)`, and a cache may still hold another text.

The last chunk of a prompt may be a single token, which looks like a decoding step: the model is called with the same
arguments. Only `prepare_inputs_for_generation` shows what a call is for: transformers' generation loops call this
method of a model before each pass, and some models override it.
"""

from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreshkv.cache.keyword import given_cache
from refreshkv.cache.preallocated import PreallocatedCache


def announce_chunks(model: PreTrainedModel) -> None:
    """Gives `model` a `prepare_inputs_for_generation` that first announces chunks of a prompt to a
    `PreallocatedCache`."""
    if "prepare_inputs_for_generation" not in vars(model) and hasattr(model, "prepare_inputs_for_generation"):
        generating: Any = model  # PreTrainedModel does not declare what generate() calls
        prepare = type(generating).prepare_inputs_for_generation  # whose signature generate() reads
        generating.prepare_inputs_for_generation = update_wrapper(partial(_prepare_inputs, model), prepare)


def _prepare_inputs(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Tells the cache if the tokens are a chunk of a prompt, then calls the model's own method."""
    cache = given_cache(kwargs)
    # transformers (5.17 to 5.24) passes `next_sequence_length` except for a chunk of a prompt. Releases that pass
    # `is_first_iteration` set it for a chunk.
    is_chunk = "next_sequence_length" not in kwargs and kwargs.get("is_first_iteration", True)
    if is_chunk and isinstance(cache, PreallocatedCache):
        cache.continue_prompt()
    if isinstance(cache, PreallocatedCache):
        if kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = cache.begin_step()
        ids = args[0] if args else kwargs["input_ids"]
        new, has_embeddings = kwargs.get("next_sequence_length"), kwargs.get("inputs_embeds") is not None
        _compare_tokens(cache, ids, None if has_embeddings else new, is_chunk or kwargs.get("is_first_iteration"))
    return type(model).prepare_inputs_for_generation(model, *args, **kwargs)


def _compare_tokens(cache: PreallocatedCache, ids: Tensor, new: int | None, is_prompt: Any) -> None:
    """Refuses a prompt that does not begin with the tokens in the cache, and remembers the tokens.

    ids: (B, L), of which the last `new` are not in the cache yet; `new` is None where `ids` are not all tokens, as in a
    chunk of a prompt. The first decoding step then makes the comparison. The host waits for it once for each prompt.
    """
    if is_prompt:
        cache.tokens_are_compared = False
    past = cache.known_length
    if new is None or past is None or ids.shape[1] != past + new:
        return
    known = cache.tokens
    if known is not None and not cache.tokens_are_compared and len(known) == len(ids):
        columns = min(known.shape[1], past)
        if not torch.equal(known[:, :columns], ids[:, :columns].to(known.device)):
            raise ValueError(
                f"input_ids do not begin with the {past} tokens that the {type(cache).__name__} holds: to begin "
                "another text, call reset() first"
            )
    cache.tokens, cache.tokens_are_compared = ids, True
