"""Caches for one batch after the other: one at a time, used again where the next batch has the same shape, because for
each new one a GPU compiles and records the steps anew. What is timed then is decoding, not compiling."""

import torch
from transformers import Cache, PreTrainedModel

from refreshkv import decode_ahead
from refreshkv.evaluation.strategies import Decoding

GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    **dict.fromkeys(("temperature", "top_p", "top_k")),
}
"""Arguments of `generate()` for greedy decoding, whatever the model's own generation settings are."""

RECORDED = 4
"""Tokens after which a step has been compiled and captured into a CUDA graph."""


class Caches:
    """Gives out empty caches for batches of one model.

    record: on a GPU, compile and record the steps of a cache before it is given out, which costs a prompt more: worth
    it where the next batches have the same shape and way to decode.
    """

    def __init__(self, model: PreTrainedModel, record: bool = True):
        self._model, self._records = model, record
        self._key: tuple | None = None
        self._cache: Cache | None = None

    def take(self, decoding: Decoding, rows: int, prompt: int, tokens: int) -> Cache:
        """An empty cache for `rows` rows of at most `tokens` tokens, the first `prompt` of them a prompt. The one given
        out before must not be used any more."""
        key = (decoding.name, tuple(decoding.settings.items()), rows, tokens)
        if self._key == key:
            self._cache.reset()
        else:
            self._key = self._cache = None  # its memory first
            self._cache = decoding.build_cache(self._model.config, tokens)
            if self._records and self._model.device.type == "cuda" and self._cache.is_compileable:
                self._record(rows, prompt, min(RECORDED, tokens - prompt))
            self._key = key
        return self._cache

    def _record(self, rows: int, prompt: int, new: int) -> None:
        ids = torch.zeros(rows, prompt, dtype=torch.int64, device=self._model.device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            custom_generate=decode_ahead,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            **GREEDY,
        )
        self._cache.reset()
