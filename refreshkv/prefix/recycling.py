"""What a request does with a prefix store: fills its cache with the known tokens of its prompts, and stores new ones.

Shapes: `B` batch rows, `P` columns of a batch of prompts, padded on the left.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from refreshkv.cache.keyword import as_keyword
from refreshkv.prefix.entry import DamagedEntry, Entry, device_name
from refreshkv.prefix.fill import validate_takes_prefix
from refreshkv.prefix.index import BLOCK
from refreshkv.prefix.prompt_cache import PromptCache
from refreshkv.prefix.store import PrefixStore

STORE_BELOW = 0.9
"""`put_new` stores a prompt if a smaller share than this of it was reused: another question about the same book is not
worth the book's bytes again."""


@dataclass(frozen=True)
class Reuse:
    """What one request took from the store."""

    prompt_tokens: int
    """Tokens of all prompts of the batch, without padding."""
    tokens: int
    """Tokens of all prompts that were copied instead of computed."""
    bytes: int
    """Bytes of keys and values that were copied."""
    seconds: float
    """Host time of finding and copying. On a GPU copies may still run afterwards, beside the computation."""
    prompt_seconds: float | None
    """Estimated time to compute all prompts whole, from what the reused entries took on this kind of device; None if
    unknown."""

    @property
    def seconds_saved(self) -> float | None:
        """Estimated time saved: the reused tokens' share of `prompt_seconds`, less finding and copying them."""
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
    """Fills an empty cache with the first tokens of the prompts that the store has; `generate` computes the rest.

    A cache has one length for all batch rows, so a batch is filled up to the first column in which any row has a token
    that the store lacks. The last two tokens, or the whole observation window, are left to compute: the selection needs
    their queries.

    Args:
        ids, attention_mask: (B, P).
        least: fewer reused tokens than this per prompt are not worth their copies, and the cache stays empty.

    Raises `SettingsError` if the cache's strategy cannot go on from a prefix (H2O), `ValueError` if the cache holds
    tokens.
    """
    began = time.perf_counter()
    validate_takes_prefix(cache)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    paddings = (mask.shape[1] - mask.sum(dim=-1)).tolist()
    prompts = [row[padding:] for row, padding in zip(ids.cpu(), paddings, strict=True)]
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    most = ids.shape[1] - max([2, *(getattr(layer, "last_queries", 1) for layer in cache.layers)])
    while True:
        found = [store.match(prompt) for prompt in prompts]
        columns = min(most, *(padding + depth for padding, (depth, _) in zip(paddings, found, strict=True)))
        tokens = sum(max(0, columns - padding) for padding in paddings)
        if tokens < max(1, least) * len(prompts):
            return Reuse(prompt_tokens, 0, 0, time.perf_counter() - began, None)
        entries = [entry for _, entry in found]
        try:
            copied = store.load_batch(entries, cache, paddings, columns)
        except DamagedEntry:
            continue  # the store will not find it again
        seconds = time.perf_counter() - began
        return Reuse(prompt_tokens, tokens, copied, seconds, _prompt_seconds(entries, prompts, store.model.device))


def _prompt_seconds(entries: list[Entry | None], prompts: list[Tensor], device: torch.device) -> float | None:
    """Time to compute the prompts whole, at each entry's seconds a token; None if one is unknown."""
    here = device_name(device)
    seconds = []
    for entry, prompt in zip(entries, prompts, strict=True):
        if entry is None or entry.seconds is None or entry.device != here:
            return None
        seconds.append(entry.seconds / len(entry.ids) * len(prompt))
    return sum(seconds)


def put_new(store: PrefixStore, ids: Tensor, cache: Cache, reuse: Reuse, seconds: float) -> Entry | None:
    """Stores the prompt (1, P) of a request, unless nine tenths of it were reused; returns None if it was not stored.

    reuse: returned by `recycle` for this request. seconds: time to compute the rest of the prompt.
    """
    if reuse.tokens >= STORE_BELOW * reuse.prompt_tokens:
        return None
    return store.put(ids, cache, seconds=seconds if reuse.tokens == 0 else reuse.prompt_seconds)


@torch.no_grad()
def store_prompts(store: PrefixStore, ids: Tensor, attention_mask: Tensor) -> float:
    """Computes and stores those prompts of a batch that the store does not have whole; returns the seconds it took.

    Afterwards every strategy but H2O finds all but the last tokens of each prompt.

    Args:
        store: its model must be one that `refreshkv.enable` has seen.
        ids, attention_mask: (B, P), padded on the left.
    """
    began = time.perf_counter()
    lengths = attention_mask.sum(dim=-1).tolist()
    prompts = [row[len(row) - length :] for row, length in zip(ids, lengths, strict=True)]
    missing = [number for number, prompt in enumerate(prompts) if store.match(prompt)[0] < len(prompt)]
    if not missing:
        return time.perf_counter() - began
    model, columns = store.model, max(lengths[number] for number in missing)
    ids, mask = ids[missing, -columns:].to(model.device), attention_mask[missing, -columns:].to(model.device)
    cache = PromptCache(model.config, columns)
    reuse = recycle(store, cache, ids, mask)
    computed = _compute_rest(store, cache, ids, mask)
    whole = computed if reuse.tokens == 0 else reuse.prompt_seconds
    for row, number in enumerate(missing):
        share = None if whole is None else whole * lengths[number] / reuse.prompt_tokens
        store.put(prompts[number], cache, row, columns - lengths[number], share)
    return time.perf_counter() - began


def _compute_rest(store: PrefixStore, cache: PromptCache, ids: Tensor, mask: Tensor) -> float:
    """Runs the model on the columns of the prompts (B, P) that the cache lacks; returns the seconds it took."""
    began, model, known = time.perf_counter(), store.model, int(cache.get_seq_length())
    model(
        input_ids=ids[:, known:],
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0)[:, known:],
        **as_keyword(cache),
        use_cache=True,
        logits_to_keep=1,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began
