"""Finds the stored prompt that a new one begins like: by common tokens, or by sentence embeddings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from refreshkv.prefix.entry import Entry
from refreshkv.settings import SettingsError

BLOCK = 64
"""Tokens of a block. A block's hash covers the block and all tokens before it."""


class Index(Protocol):
    """Finds entries by their tokens."""

    def add(self, entry: Entry) -> None:
        """Makes an entry findable."""

    def remove(self, entry: Entry) -> None:
        """Undoes `add`."""

    def find(self, ids: np.ndarray) -> tuple[int, Entry | None]:
        """The entry to reuse for a prompt (P,) int64, and how many of its first tokens are the prompt's; (0, None) if
        there is none."""
        ...


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Number of equal tokens at the beginning of two sequences."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def longest(entries: list[Entry], ids: np.ndarray) -> tuple[int, Entry | None]:
    """The entry with the longest common prefix, by comparing all of them; the first of several, (0, None) of none.

    The definition of `LongestPrefix.find`.
    """
    depths = [common_prefix(entry.ids, ids) for entry in entries]
    best = max(depths, default=0)
    return (best, entries[depths.index(best)]) if best else (0, None)


class LongestPrefix:
    """Finds the entry with the longest common prefix of tokens; what follows in the entry does not matter.

    Entries are listed under a hash of each block of 64 tokens and all tokens before it, as serving engines do it. The
    prompt's hashes lead to the entries that share the most whole blocks; comparing their tokens gives the depth, so no
    hash is trusted. A prompt without any overlap costs one hash, and comparing the first block of each entry.
    """

    def __init__(self) -> None:
        self._entries: dict[Entry, None] = {}
        self._chains: dict[bytes, dict[Entry, None]] = {}

    def add(self, entry: Entry) -> None:
        self._entries[entry] = None
        for digest in block_hashes(entry.ids):
            self._chains.setdefault(digest, {})[entry] = None

    def remove(self, entry: Entry) -> None:
        self._entries.pop(entry, None)
        for digest in block_hashes(entry.ids):
            self._chains.get(digest, {}).pop(entry, None)
            if not self._chains.get(digest):
                self._chains.pop(digest, None)

    def find(self, ids: np.ndarray) -> tuple[int, Entry | None]:
        levels = [self._entries]
        for digest in block_hashes(ids):
            if digest not in self._chains:
                break
            levels.append(self._chains[digest])
        for blocks in reversed(range(len(levels))):
            # no entry of this level shares the next block, so the common prefix ends within that block
            depth, entry = longest(list(levels[blocks]), ids[: (blocks + 1) * BLOCK])
            if entry is not None:
                return depth, entry
        return 0, None


def block_hashes(ids: np.ndarray) -> Iterator[bytes]:
    """A hash for each whole block of ids (P,) int64, over all tokens up to the block's end."""
    digest = b""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        digest = xxhash.xxh3_128_digest(digest + ids[start : start + BLOCK].tobytes())
        yield digest


class NearestSentence:
    """Finds the entry whose text has the nearest sentence embedding, if the new prompt begins with all of it.

    Source: *KV Cache Recycling to Expand Usable Context Capacity in Low Parameter LLMs* (arXiv 2512.11851). The depth
    is never larger than that of `LongestPrefix` over the same entries.

    Args:
        encoder: a folder or Hub id of a `sentence-transformers` model, or a loaded one.
        tokenizer: decodes tokens to the text that is embedded.

    Raises `SettingsError` if the encoder cannot be loaded.
    """

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        self._encoder = _load_encoder(encoder) if isinstance(encoder, (str, Path)) else encoder
        self._tokenizer = tokenizer
        self._embeddings: dict[Entry, np.ndarray | None] = {}

    def add(self, entry: Entry) -> None:
        self._embeddings[entry] = None

    def remove(self, entry: Entry) -> None:
        self._embeddings.pop(entry, None)

    def find(self, ids: np.ndarray) -> tuple[int, Entry | None]:
        entries = list(self._embeddings)
        if not entries:
            return 0, None
        self._embed([entry for entry in entries if self._embeddings[entry] is None])
        query = self._encode([ids])[0]
        nearest = max(entries, key=lambda entry: float(self._embeddings[entry] @ query))
        is_prefix = common_prefix(nearest.ids, ids) == len(nearest.ids)
        return (len(nearest.ids), nearest) if is_prefix else (0, None)

    def _embed(self, entries: list[Entry]) -> None:
        if entries:
            embeddings = self._encode([entry.ids for entry in entries])
            self._embeddings |= dict(zip(entries, embeddings, strict=True))

    def _encode(self, prompts: list[np.ndarray]) -> np.ndarray:
        """Embeddings of N prompts, (N, size) float32, each of norm 1."""
        texts = [self._tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in prompts]
        return self._encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def _load_encoder(name: str | Path) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise SettingsError('sentence embeddings need an extra: pip install "refreshkv[embeddings]"') from None
    try:
        return SentenceTransformer(str(name), trust_remote_code=False)
    except Exception as error:  # the library raises many types
        reason = " ".join(str(error).split())
        raise SettingsError(f"the encoder {name} could not be loaded: {reason}") from error
