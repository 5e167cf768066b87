"""What a request does with a prefix store: fills its cache with what is known of the prompts, and stores new ones.

Shapes: `B` batch rows, `P` columns of a batch of prompts, padded on the left.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from refreshkv.prefix.backends import DamagedEntry, Entry
from refreshkv.prefix.index import BLOCK
from refreshkv.prefix.prompt_cache import PromptCache, needs_queries
from refreshkv.prefix.store import PrefixStore, device_name

STORE_BELOW = 0.9
"""`put_new` stores a prompt if less than this share of it was reused: another question about the same book is not worth
the book's bytes again, and at least so much of each prompt that comes back is always there."""


@dataclass(frozen=True)
class Reuse:
    """What one request took from the store."""

    prompt_tokens: int
    """Of all rows, without padding; and so the next."""
    tokens: int
    """Tokens that were not computed again: the depth of the reuse."""
    bytes: int
    """Keys, values and queries that were copied."""
    seconds: float
    """Of the host, for finding and copying. On a GPU copies may still be under way, beside the computation."""
    prompt_seconds: float | None
    """About what computing the prompts whole takes, by what the reused ones took on this device; None if unknown."""

    @property
    def seconds_saved(self) -> float | None:
        """About what was saved: the reused tokens' share of the whole prompt's time, less finding and copying them."""
        if self.prompt_seconds is None:
            return None
        return self.prompt_seconds * self.tokens / self.prompt_tokens - self.seconds

    def __str__(self) -> str:
        saved = "" if self.seconds_saved is None else f", about {self.seconds_saved:.2f} s saved"
        return (
            f"reused {self.tokens} of {self.prompt_tokens} prompt tokens, {self.bytes / 1e6:.1f} MB in "
            f"{self.seconds:.3f} s{saved}"
        )


def recycle(
    store: PrefixStore, cache: Cache, ids: Tensor, attention_mask: Tensor | None = None, least: int = BLOCK
) -> Reuse:
    """Fills an empty cache with what the store has of the prompts; `generate` then computes the rest.

    ids, attention_mask (B, P). A cache has one length for all rows, so a batch is filled up to the first column in
    which any row has a token that the store lacks. The last tokens are always left, since a selection needs their
    queries: two, or the observation window. A reuse of fewer than `least` tokens a row is not worth its copies and
    leaves the cache empty.
    """
    began = time.perf_counter()
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    paddings = (mask.shape[1] - mask.sum(dim=-1)).tolist()
    rows = [row[padding:] for row, padding in zip(ids.cpu(), paddings, strict=True)]
    real = sum(len(row) for row in rows)
    queries = needs_queries(cache)
    left = max([2, *(getattr(layer, "last_queries", 1) for layer in cache.layers)])
    while True:
        found = [store.match(row, queries) for row in rows]
        ends = [padding + depth for padding, (depth, _) in zip(paddings, found, strict=True)]
        columns = min(*ends, ids.shape[1] - left)
        tokens = sum(max(0, columns - padding) for padding in paddings)
        if tokens < max(1, least) * len(rows):
            return Reuse(real, 0, 0, time.perf_counter() - began, None)
        entries = [entry for _, entry in found]
        try:
            size = store.load_rows(entries, cache, paddings, columns)
        except DamagedEntry:
            continue  # the store will not find it again
        break
    seconds = time.perf_counter() - began
    return Reuse(real, tokens, size, seconds, _prompt_seconds(entries, rows, store.model.device))


def _prompt_seconds(entries: list[Entry | None], rows: list[Tensor], device: torch.device) -> float | None:
    here = device_name(device)
    if any(entry is None or entry.seconds is None or entry.device != here for entry in entries):
        return None
    return sum(entry.seconds / len(entry.ids) * len(row) for entry, row in zip(entries, rows, strict=True))


def put_new(store: PrefixStore, ids: Tensor, cache: Cache, reuse: Reuse, seconds: float) -> Entry | None:
    """Stores the prompt (1, P) of a request that `recycle` began, unless most of it was there; None if it was not.

    seconds: what computing the rest of the prompt took.
    """
    if reuse.tokens >= STORE_BELOW * reuse.prompt_tokens:
        return None
    return store.put(ids, cache, seconds=seconds if reuse.tokens == 0 else reuse.prompt_seconds)


@torch.no_grad()
def store_prompts(store: PrefixStore, ids: Tensor, attention_mask: Tensor, with_queries: bool = False) -> float:
    """Computes and stores those prompts of a batch that the store does not hold whole; returns the seconds it took.

    ids, attention_mask (B, P), padded on the left. The model must be one that `refreshkv.enable` has seen. Afterwards
    any strategy finds all but the last tokens of each prompt, H2O only `with_queries`.
    """
    began = time.perf_counter()
    lengths = attention_mask.sum(dim=-1).tolist()
    rows = [row[len(row) - length :] for row, length in zip(ids, lengths, strict=True)]
    missing = [number for number, row in enumerate(rows) if store.match(row, with_queries)[0] < len(row)]
    if not missing:
        return time.perf_counter() - began
    model, columns = store.model, max(lengths[number] for number in missing)
    ids, mask = ids[missing, -columns:].to(model.device), attention_mask[missing, -columns:].to(model.device)
    cache = PromptCache(model.config, columns, keep_queries=with_queries)
    reuse = recycle(store, cache, ids, mask)
    known = int(cache.get_seq_length())
    computing = time.perf_counter()
    model(
        input_ids=ids[:, known:],
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0)[:, known:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    whole = time.perf_counter() - computing if reuse.tokens == 0 else reuse.prompt_seconds
    for place, number in enumerate(missing):
        share = None if whole is None else whole * lengths[number] / reuse.prompt_tokens
        store.put(rows[number], cache, place, columns - lengths[number], share)
    return time.perf_counter() - began
