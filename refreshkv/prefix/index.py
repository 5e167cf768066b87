"""Which stored prompt a new one begins with: by the longest common prefix of tokens, or by sentence embeddings."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from refreshkv.prefix.backends import Entry
from refreshkv.settings import SettingsError

BLOCK = 64
"""Tokens of a block, whose hash stands for it and all before it."""


class Finder(Protocol):
    """A way to find an entry."""

    def add(self, entry: Entry) -> None:
        """From now on the entry may be found."""

    def remove(self, entry: Entry) -> None:
        """From now on it may not."""

    def find(self, ids: np.ndarray, usable: Callable[[Entry], bool]) -> tuple[int, Entry | None]:
        """How many tokens of ids (P,) int64 an entry has in common with them, and the entry; 0 and None without one."""


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Number of equal tokens in front."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def longest(entries: list[Entry], ids: np.ndarray) -> tuple[int, Entry | None]:
    """The plain form: the entry with the longest common prefix, of equal ones the first; 0 and None without any."""
    depths = [common_prefix(entry.ids, ids) for entry in entries]
    best = max(depths, default=0)
    return (best, entries[depths.index(best)]) if best else (0, None)


class LongestPrefix:
    """The longest common prefix of tokens with any entry, whatever follows it.

    A hash for each block of 64 tokens and all before it, as serving engines have them, leads to the entries with the
    longest common prefix in whole blocks; their tokens themselves tell the depth. Looking up a prompt without any
    overlap costs one hash and the first block of each entry.
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

    def find(self, ids: np.ndarray, usable: Callable[[Entry], bool]) -> tuple[int, Entry | None]:
        levels = [self._entries]
        for digest in block_hashes(ids):
            if digest not in self._chains:
                break
            levels.append(self._chains[digest])
        for blocks in reversed(range(len(levels))):
            # none of these has the next block too, so the common prefix ends in it; what is equal the tokens tell
            depth, entry = longest([entry for entry in levels[blocks] if usable(entry)], ids[: (blocks + 1) * BLOCK])
            if entry is not None:
                return depth, entry
        return 0, None


def block_hashes(ids: np.ndarray) -> Iterator[bytes]:
    """For each whole block of ids (P,) int64 a hash of all tokens up to its end."""
    digest = b""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        digest = xxhash.xxh3_128_digest(digest + ids[start : start + BLOCK].tobytes())
        yield digest


class NearestSentence:
    """The entry whose text has the nearest sentence embedding, if all of it is in front of the new prompt: the way of
    *KV Cache Recycling to Expand Usable Context Capacity in Low Parameter LLMs* (arXiv 2512.11851).

    It finds nothing that `LongestPrefix` does not find: that one's depth is at least as large, always.

    Args:
        encoder: a folder or Hub id of a `sentence-transformers` model, or one that is loaded.
        tokenizer: makes text of tokens again.

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

    def find(self, ids: np.ndarray, usable: Callable[[Entry], bool]) -> tuple[int, Entry | None]:
        entries = [entry for entry in self._embeddings if usable(entry)]
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
        """(N, size) float32, each of length 1."""
        texts = [self._tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in prompts]
        return self._encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def _load_encoder(name: str | Path) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise SettingsError('sentence embeddings need an extra: pip install "refreshkv[embeddings]"') from None
    try:
        return SentenceTransformer(str(name))
    except Exception as error:  # what is raised differs by what is missing
        reason = " ".join(str(error).split())
        raise SettingsError(f"the encoder {name} could not be loaded: {reason}") from error
