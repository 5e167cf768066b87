"""A store of prompt caches: a prompt that begins like an earlier one pays for the rest only.

RefreshKV never loses a key or a value, so what it has computed of a prompt stays exact for every prompt that begins
with the same tokens. Source: *KV Cache Recycling to Expand Usable Context Capacity in Low Parameter LLMs* (arXiv
2512.11851); its way to find an entry is `refreshkv.prefix.index.NearestSentence`.

    store = PrefixStore("prompts", max_bytes=20 * 10**9, model=model)
    reuse = recycle(store, cache, ids)                      # refreshkv.prefix.recycling
    model.generate(ids, past_key_values=cache, ...)
    store.put(ids, cache)

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `P` tokens of a prompt.
"""

from contextlib import nullcontext
from pathlib import Path
from threading import RLock

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import Cache, PreTrainedModel

from refreshkv.attention.enable import attention_modules
from refreshkv.baselines.compact import CompactLayer
from refreshkv.cache.preallocated import PreallocatedLayer
from refreshkv.identity import identity
from refreshkv.prefix.backends import Entry, FolderPlace, MemoryPlace, entry_bytes
from refreshkv.prefix.index import Finder, LongestPrefix, common_prefix
from refreshkv.prefix.prompt_cache import fill_layer, needs_queries, prompt_states
from refreshkv.settings import SettingsError

Ids = Tensor | np.ndarray | list[int]


class PrefixStore:
    """Prompts' keys and values by their tokens, in host memory or in a folder.

    A folder is shared: any number of processes read it, one at a time writes. Beyond `max_bytes` the entries that have
    not been used for longest leave. What a cache is filled with is what was computed, bit by bit.

    Args:
        place: a folder, made if need be, or None for this process's memory.
        max_bytes: most bytes of all entries together.
        model: whose prompts these are; its weights must not change while it has a store.
        finder: how entries are found; None: by the longest common prefix of tokens.
        setting: what errors call the folder.

    Raises `SettingsError` if the folder was made by a model with other weights, another dtype or other rotary settings,
    or cannot be used.
    """

    def __init__(
        self,
        place: str | Path | None,
        max_bytes: int,
        model: PreTrainedModel,
        finder: Finder | None = None,
        setting: str = "the prefix store",
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise SettingsError(f"max_bytes of the prefix store must be a whole number >= 1, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.model = model
        who = identity(model)
        self._place = MemoryPlace() if place is None else FolderPlace(place, who, setting)
        self._finder = LongestPrefix() if finder is None else finder
        self._indexed: dict[object, Entry] = {}
        self._lock = RLock()

    @property
    def size(self) -> int:
        """Bytes of all entries together."""
        return sum(size for _, size in self._place.by_last_use())

    @property
    def entries(self) -> list[Entry]:
        """All entries that are there now, other processes' included."""
        with self._lock:
            return list(self._refresh().values())

    def match(self, ids: Ids, with_queries: bool = False) -> tuple[int, Entry | None]:
        """The entry to use for a prompt (P,), and how many tokens of the prompt it holds; 0 and None without one.

        with_queries: only entries that hold the prompt's queries too.
        """
        with self._lock:
            self._refresh()
            return self._finder.find(as_tokens(ids), lambda entry: entry.has_queries or not with_queries)

    def put(self, ids: Ids, cache: Cache, row: int = 0, start: int = 0, seconds: float | None = None) -> Entry | None:
        """Stores a prompt (P,) whose tokens are in columns `start .. start+P-1` of a row of the cache.

        seconds: what computing the whole prompt took. Entries whose prompts this one begins with leave: it serves
        in their place. Returns None if it alone is larger than `max_bytes`. Raises `ValueError` if the cache does not
        hold all of the prompt, or decoded some of it from a small cache, and `SettingsError` if the folder cannot be
        written to.
        """
        ids = as_tokens(ids)
        states = prompt_states(cache, row, start, start + len(ids))
        self._check_type(states)
        has_queries = any(name.startswith("query") for name in states)
        size = entry_bytes(states, ids)
        if size > self.max_bytes:
            return None
        name = xxhash.xxh3_128_hexdigest(ids.tobytes()) + ("-queries" if has_queries else "")
        device = states["key.0"].device
        entry = Entry(name, ids, size, has_queries, seconds, device_name(device))
        with self._lock, self._place.writing():
            same = [known for known in self.entries if np.array_equal(known.ids, ids)]
            present = next((known for known in same if known.has_queries >= has_queries), None)
            if present is None:
                del same
                self._make_room(size, beside=name)
                self._refresh()  # nothing holds on to what has left while the new one comes
                self._place.write(entry, states)
                self._drop_covered(entry)
                self._refresh()
        self.touch(present or entry)
        return present or entry

    def _check_type(self, states: dict[str, Tensor]) -> None:
        types = {tensor.dtype for tensor in states.values()} - {self.model.dtype}
        if types:
            raise ValueError(f"the cache holds {types.pop()}, but the store is for {self.model.dtype}")

    def _make_room(self, size: int, beside: str) -> None:
        """Removes the least recently used until `size` more fit. An unreadable file of the same name is replaced."""
        others = [(name, taken) for name, taken in self._place.by_last_use() if name != beside]
        total = sum(taken for _, taken in others)
        for name, taken in others:
            if total + size <= self.max_bytes:
                return
            self._place.remove(name)
            total -= taken

    def _drop_covered(self, entry: Entry) -> None:
        for other in self.entries:
            begins = common_prefix(other.ids, entry.ids) == len(other.ids)
            if begins and other.name != entry.name and entry.has_queries >= other.has_queries:
                self._place.remove(other.name)

    def touch(self, entry: Entry) -> None:
        """Marks the entry as used now."""
        self._place.touch(entry.name)

    def load(self, entry: Entry, cache: Cache, depth: int | None = None) -> int:
        """Fills an empty cache of one row with the entry's first `depth` tokens (None: all); returns the bytes moved.

        The rest of the prompt has to be more than one token, for one alone would be taken for a decoding step, and at
        least as many as the strategy's observation window; `refreshkv.prefix.recycling.recycle` sees to that. Raises
        `DamagedEntry` if the entry is damaged or gone, and then leaves the cache as it was; `match` will not find the
        entry again.
        """
        return self.load_rows([entry], cache, [0], len(entry.ids) if depth is None else depth)

    def load_rows(self, entries: list[Entry | None], cache: Cache, paddings: list[int], columns: int) -> int:
        """Fills the first `columns` columns of an empty cache; row `b` has `paddings[b]` padded ones and then the
        tokens of `entries[b]`, which may be None where all columns are padded. As `load` otherwise."""
        layers = [cache.layers[n] if n < len(cache.layers) else None for n in range(len(attention_modules(self.model)))]
        self._check_load(entries, cache, [columns - padding for padding in paddings])
        names = [f"{kind}.{number}" for number in range(len(layers)) for kind in ("key", "value")]
        names += [f"query.{number}" for number, layer in enumerate(layers) if getattr(layer, "needs_queries", False)]
        parts = []
        for entry, padding in zip(entries, paddings, strict=True):
            tokens = columns - padding
            parts.append(self._place.read(entry, tokens, names) if entry is not None and tokens > 0 else {})
        _fill(cache, layers, self._devices(), parts, paddings, columns)
        for entry in filter(None, entries):
            self.touch(entry)
        return sum(tensor.nbytes for part in parts for tensor in part.values())

    @staticmethod
    def _check_load(entries: list[Entry | None], cache: Cache, tokens: list[int]) -> None:
        length = int(cache.get_seq_length())
        if length > 0:
            raise ValueError(f"a cache that holds {length} tokens cannot be filled: call reset() first")
        for entry, wanted in zip(entries, tokens, strict=True):
            there = 0 if entry is None else len(entry.ids)
            if wanted > there:
                raise ValueError(f"{wanted} tokens were asked of an entry that holds {there}")
            if entry is not None and needs_queries(cache) and not entry.has_queries:
                raise ValueError(f"{type(cache).__name__} depends on all queries of a prompt: store them with it")

    def _devices(self) -> list[torch.device]:
        """Where each layer's cache belongs."""
        return [next(module.parameters()).device for module in attention_modules(self.model)]

    def _refresh(self) -> dict[object, Entry]:
        """Follows what this and other processes have put and removed."""
        there = self._place.entries()
        for key in self._indexed.keys() - there.keys():
            self._finder.remove(self._indexed.pop(key))
        for key, entry in there.items():
            if key not in self._indexed:
                self._indexed[key] = entry
                self._finder.add(entry)
        return there


def as_tokens(ids: Ids) -> np.ndarray:
    """Token ids as (P,) int64; `ValueError` unless they are one row of at least one token."""
    ids = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"a prompt is one row of at least one token, got the shape {ids.shape}")
    return np.ascontiguousarray(ids, dtype=np.int64)


def device_name(device: torch.device) -> str:
    """What kind of device: times on one say nothing of another."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _fill(
    cache: Cache,
    layers: list,
    devices: list[torch.device],
    parts: list[dict[str, Tensor]],
    paddings: list[int],
    columns: int,
) -> None:
    """Copies host tensors into the layers, in their order.

    On a GPU, layers with buffers are copied to on a stream of its own, and the first attention to each waits for its
    own copy only: layer 0 computes while the others are still on their way.
    """
    aside = {device: torch.cuda.Stream(device) for device in set(devices) if device.type == "cuda"}
    streams = [
        aside.get(device) if _has_buffers(layer) else None for layer, device in zip(layers, devices, strict=True)
    ]
    for number, stream in enumerate(streams):
        if stream is not None:  # the buffers belong to the computation's stream
            blocks = [_block(parts, f"{kind}.{number}", paddings, 0, devices[number]) for kind in ("key", "value")]
            layers[number].reserve(*blocks)
    for device, stream in aside.items():
        stream.wait_stream(torch.cuda.current_stream(device))
    for number, stream in enumerate(streams):
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            blocks = [
                _block(parts, f"{kind}.{number}", paddings, columns, devices[number])
                for kind in ("key", "value", "query")
            ]
            fill_layer(cache, number, *blocks)
        if stream is not None:
            layers[number].wait_for(stream)
    copied = [layer for layer, stream in zip(layers, streams, strict=True) if stream is not None]
    for layer in copied[:1]:  # its length is asked for before its attention comes
        torch.cuda.current_stream(layer.device).wait_event(layer.arrival)


def _has_buffers(layer: object) -> bool:
    return isinstance(layer, PreallocatedLayer) and not isinstance(layer, CompactLayer) and not layer.needs_queries


def _block(
    parts: list[dict[str, Tensor]], name: str, paddings: list[int], columns: int, device: torch.device
) -> Tensor | None:
    """The rows' (tokens, heads, D) as (B, heads, columns, D) on the device, padded in front; None if no row has it."""
    like = next((part[name] for part in parts if name in part), None)
    if like is None:
        return None
    if len(parts) == 1 and paddings[0] == 0:
        return like[:columns].to(device, non_blocking=True).transpose(0, 1).unsqueeze(0)
    block = torch.zeros(len(parts), columns, *like.shape[1:], dtype=like.dtype, device=device)
    for row, (part, padding) in enumerate(zip(parts, paddings, strict=True)):
        if name in part and columns > padding:
            block[row, padding:].copy_(part[name][: columns - padding], non_blocking=True)
    return block.transpose(1, 2)
