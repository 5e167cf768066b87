"""Empty caches for one batch after another.

The next batch of the same shape gets the same cache, emptied: for each new cache a GPU compiles the steps and captures
them in a CUDA graph, which would be timed with the decoding.
"""

import torch
from transformers import Cache, PreTrainedModel

from refreshkv import decode_ahead
from refreshkv.cache.keyword import as_keyword
from refreshkv.evaluation.strategies import Strategy
from refreshkv.generation.inherited import without_own_settings

GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    **dict.fromkeys(("temperature", "top_p", "top_k")),
}
"""Arguments of `generate()` for greedy decoding, to be called inside `without_own_settings(model)`."""

STEPS_TO_CAPTURE = 4
"""Tokens after which a step has been compiled and captured in a CUDA graph."""


class Caches:
    """Hands out empty caches for batches of one model, one at a time.

    record: on a GPU, compile and capture the steps of a new cache before handing it out. This costs another prompt, and
    pays if the next batches have the same shape and strategy.
    """

    def __init__(self, model: PreTrainedModel, record: bool = True):
        self._model, self._records = model, record
        self._key: tuple | None = None
        self._cache: Cache | None = None

    def take(self, strategy: Strategy, sequences: int, prompt_length: int, tokens: int) -> Cache:
        """An empty cache for a batch of this many sequences, each of at most `tokens` tokens, prompt included.

        The cache handed out before must not be used any more.
        """
        key = (strategy.name, tuple(strategy.settings.items()), sequences, tokens)
        if self._cache is not None and self._key == key:
            self._cache.reset()
        else:
            self._key = self._cache = None  # frees the earlier cache's memory first
            self._cache = strategy.build_cache(self._model.config, tokens)
            if self._records and self._model.device.type == "cuda" and self._cache.is_compileable:
                self._record(self._cache, sequences, prompt_length, min(STEPS_TO_CAPTURE, tokens - prompt_length))
            self._key = key
        return self._cache

    def _record(self, cache: Cache, sequences: int, prompt_length: int, new_tokens: int) -> None:
        ids = torch.zeros(sequences, prompt_length, dtype=torch.int64, device=self._model.device)
        with without_own_settings(self._model):
            self._model.generate(  # pyright: ignore[reportCallIssue]  # a mixin of the models' classes
                ids,
                attention_mask=torch.ones_like(ids),
                **as_keyword(cache),
                custom_generate=decode_ahead,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                **GREEDY,
            )
        cache.reset()
