"""A store of prompts' keys and values.

RefreshKV never drops a key or a value, so those of a prompt serve every later prompt that begins with the same tokens.
Source: *KV Cache Recycling to Expand Usable Context Capacity in Low Parameter LLMs* (arXiv 2512.11851); the way it
finds an entry is `refreshkv.prefix.index.NearestSentence`.

    store = PrefixStore("prompts", max_bytes=20 * 10**9, model=model)
    reuse = recycle(store, cache, ids)                      # refreshkv.prefix.recycling
    model.generate(ids, past_key_values=cache, ...)
    store.put(ids, cache)

Shapes: `P` tokens of a prompt.
"""

import time
from functools import cached_property
from pathlib import Path
from threading import RLock

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import Cache, PreTrainedModel

from refreshkv.attention.enable import attention_modules
from refreshkv.cache.keyword import as_keyword
from refreshkv.checksums import digest
from refreshkv.identity import changes, first_difference, identity
from refreshkv.layers import layer_kinds
from refreshkv.prefix.backend_folder import FolderBackend
from refreshkv.prefix.backend_memory import MemoryBackend
from refreshkv.prefix.entry import Backend, Entry, Ids, as_tokens, device_name
from refreshkv.prefix.entry_file import entry_bytes
from refreshkv.prefix.fill import HostPrefix, fill_cache, validate_takes_prefix
from refreshkv.prefix.index import Index, LongestPrefix, common_prefix
from refreshkv.prefix.prompt_cache import PromptCache, prompt_states
from refreshkv.prefix.rotary import Rotation, find_rotations
from refreshkv.settings import SettingsError


class PrefixStore:
    """Keeps prompts' keys and values, found by their tokens, in host memory or in a folder.

    Processes share a folder: any number read, one at a time writes. Before a write the least recently used entries are
    removed until all fit into `max_bytes`. A cache gets exactly the bits that were stored.

    Args:
        folder: made if it does not exist; None for this process's memory.
        max_bytes: most bytes of all entries together.
        model: whose prompts these are. It must stay as it is, its active adapters included, while it has a store.
        index: finds the entries; None for `LongestPrefix`.
        setting: how errors name the folder's setting.
        shared: other users may use the folder too. Without it the folder is private (0700, its files 0600), and what
            other users have put there is not read.

    Raises `SettingsError` if the folder was made by another model (`refreshkv.identity`), belongs to another user and
    is not shared, or cannot be used; and later, if the model has changed meanwhile.
    """

    def __init__(
        self,
        folder: str | Path | None,
        max_bytes: int,
        model: PreTrainedModel,
        index: Index | None = None,
        setting: str = "the prefix store",
        shared: bool = False,
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise SettingsError(f"max_bytes of the prefix store must be a whole number >= 1, got {max_bytes!r}")
        _validate_layers(model, setting)
        self.max_bytes = max_bytes
        self.model = model
        self._setting, self._identity, self._changes = setting, identity(model), changes(model)
        self._backend: Backend = (
            MemoryBackend() if folder is None else FolderBackend(folder, self._identity, setting, shared)
        )
        self._index = LongestPrefix() if index is None else index
        self._indexed: dict[object, Entry] = {}
        self._lock = RLock()

    @property
    def size(self) -> int:
        """Bytes of all entries together."""
        return sum(size for _, size in self._backend.by_last_use())

    @property
    def entries(self) -> list[Entry]:
        """All entries of this moment, other processes' included."""
        with self._lock:
            return list(self._synchronise().values())

    def match(self, ids: Ids) -> tuple[int, Entry | None]:
        """How many first tokens of a prompt (P,) the store has, and the entry with them; (0, None) if it has none."""
        self._validate_same_model()
        with self._lock:
            self._synchronise()
            return self._index.find(as_tokens(ids))

    def put(self, ids: Ids, cache: Cache, row: int = 0, start: int = 0, seconds: float | None = None) -> Entry | None:
        """Stores a prompt (P,) and removes the entries that it begins with, because it serves in their place.

        Args:
            cache: holds the prompt in columns `start .. start+P-1` of batch row `row`.
            seconds: time to compute the whole prompt.

        Returns None if the entry alone is larger than `max_bytes`. Raises `ValueError` if the cache does not hold all
        of the prompt, or decoded some of it from a small cache, and `SettingsError` if the folder cannot be written to.
        """
        self._validate_same_model()
        ids = as_tokens(ids)
        states = prompt_states(cache, row, start, start + len(ids))
        self._validate_dtype(states)
        size = entry_bytes(states, ids)
        if size > self.max_bytes:
            return None
        name = xxhash.xxh3_128_hexdigest(ids.tobytes())
        entry = Entry(name, ids, size, seconds, device_name(states["key.0"].device), digest(self._identity))
        with self._lock, self._backend.writing():
            present = next((known for known in self.entries if np.array_equal(known.ids, ids)), None)
            if present is None:
                self._make_room(size, name)
                self._synchronise()  # drops the last references to removed entries before memory is taken
                self._backend.write(entry, states)
                self._remove_covered(entry)
                self._synchronise()
        self.touch(present or entry)
        return present or entry

    @torch.no_grad()
    def put_chunk(self, ids: Ids) -> Entry | None:
        """Computes a chunk (n,) alone, from position 0, and stores it, unless a stored prompt begins with all of it.

        Returns the entry whose first n tokens are the chunk's, for `refreshkv.prefix.chunks.load_chunks` at any place
        of a prompt; None if the chunk alone is larger than `max_bytes`. Raises as `put`.
        """
        ids = as_tokens(ids)
        depth, known = self.match(ids)
        if known is not None and depth == len(ids):
            self.touch(known)
            return known
        began, tokens = time.perf_counter(), torch.from_numpy(ids).to(self.model.device).unsqueeze(0)
        cache = PromptCache(self.model.config, len(ids))
        self.model.base_model(input_ids=tokens, **as_keyword(cache), use_cache=True)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self.put(ids, cache, seconds=time.perf_counter() - began)

    def read(self, entry: Entry, tokens: int) -> dict[str, Tensor]:
        """Keys and values of the entry's first tokens in host memory, as in `Entry.tensors`. Raises `DamagedEntry`."""
        names = [f"{kind}.{number}" for number in range(len(self.devices)) for kind in ("key", "value")]
        return self._backend.read(entry, tokens, names)

    @property
    def devices(self) -> list[torch.device]:
        """The device of each layer's attention."""
        return [next(module.parameters()).device for module in attention_modules(self.model)]

    @cached_property
    def rotations(self) -> list[Rotation | None]:
        """How the rotary embedding turns each layer's keys. Raises `SettingsError` as `find_rotations`."""
        return find_rotations(self.model)

    def _validate_same_model(self) -> None:
        """Raises `SettingsError` if the model has changed since the store was opened, such as its active adapter.

        Weights are read again only if `changes` tells of one.
        """
        now = changes(self.model)
        if now == self._changes:
            return
        different = first_difference(self._identity, identity(self.model))
        if different:
            raise SettingsError(
                f"{self._setting}: the model has changed since this store was opened (not the same {different}): open "
                "another store for it"
            )
        self._changes = now

    def _validate_dtype(self, states: dict[str, Tensor]) -> None:
        others = {tensor.dtype for tensor in states.values()} - {self.model.dtype}
        if others:
            raise ValueError(f"the cache holds {others.pop()}, but the store is for {self.model.dtype}")

    def _make_room(self, size: int, name: str) -> None:
        """Removes the least recently used entries until `size` bytes more fit. A file called `name` does not count: the
        new entry replaces it, and it is damaged or the entry would have been found."""
        others = [(other, taken) for other, taken in self._backend.by_last_use() if other != name]
        total = sum(taken for _, taken in others)
        for other, taken in others:
            if total + size <= self.max_bytes:
                return
            self._backend.remove(other)
            total -= taken

    def _remove_covered(self, entry: Entry) -> None:
        """Removes the other entries that `entry` begins with."""
        for other in self.entries:
            if other.name != entry.name and common_prefix(other.ids, entry.ids) == len(other.ids):
                self._backend.remove(other.name)

    def touch(self, entry: Entry) -> None:
        """Marks the entry as used now."""
        self._backend.touch(entry.name)

    def load(self, entry: Entry, cache: Cache, depth: int | None = None) -> int:
        """Fills an empty cache of one batch row with the entry's first `depth` tokens (None: all); returns the bytes
        copied.

        The rest of the prompt must be more than one token, because a single token is a decoding step, and at least the
        strategy's observation window; `refreshkv.prefix.recycling.recycle` leaves that many.

        Raises `DamagedEntry` if the entry is damaged or gone: the cache is then unchanged, and `match` will not find
        the entry again. Raises `ValueError` if the cache holds tokens or the entry has fewer than `depth`, and
        `SettingsError` if the cache's strategy cannot go on from a prefix.
        """
        return self.load_batch([entry], cache, [0], len(entry.ids) if depth is None else depth)

    def load_batch(self, entries: list[Entry | None], cache: Cache, paddings: list[int], columns: int) -> int:
        """Fills the first `columns` columns of an empty cache; returns the bytes copied and raises as `load`.

        Batch row `b` gets `paddings[b]` padded columns and then the first tokens of `entries[b]`, which may be None if
        all of its columns are padded.
        """
        self._validate_same_model()
        lengths = [columns - padding for padding in paddings]
        _validate_load(entries, cache, lengths)
        tensors = [
            self.read(entry, length) if entry is not None and length > 0 else {}
            for entry, length in zip(entries, lengths, strict=True)
        ]
        prefix = HostPrefix(tensors, paddings, columns)
        fill_cache(cache, prefix, self.devices)
        for entry in filter(None, entries):
            self.touch(entry)
        return prefix.nbytes

    def _synchronise(self) -> dict[object, Entry]:
        """Brings the index up to date with what this and other processes have stored and removed; returns all entries
        by the backend's keys."""
        there = self._backend.entries()
        for key in self._indexed.keys() - there.keys():
            self._index.remove(self._indexed.pop(key))
        for key, entry in there.items():
            if key not in self._indexed:
                self._indexed[key] = entry
                self._index.add(entry)
        return there


def _validate_layers(model: PreTrainedModel, setting: str) -> None:
    """Raises `SettingsError` for a model with layers that hold something else than each token's key and value."""
    if any(not kind.attends for kind in layer_kinds(model.config)):
        raise SettingsError(
            f"{setting}: {type(model).__name__} has recurrent layers, whose state after one prompt says nothing of the "
            "state after its first tokens: leave out the prefix store for this model"
        )


def _validate_load(entries: list[Entry | None], cache: Cache, lengths: list[int]) -> None:
    """Raises `ValueError` or `SettingsError` unless the cache is empty, takes a prefix, and the entries are as long."""
    held = int(cache.get_seq_length())
    if held > 0:
        raise ValueError(f"a cache that holds {held} tokens cannot be filled: call reset() first")
    validate_takes_prefix(cache)
    for entry, length in zip(entries, lengths, strict=True):
        stored = 0 if entry is None else len(entry.ids)
        if length > stored:
            raise ValueError(f"{length} tokens were asked of an entry that holds {stored}")
