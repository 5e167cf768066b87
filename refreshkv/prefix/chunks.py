"""Prompts of stored chunks: documents in any order and a question behind them (docs/specification.md, section 12).

    store = PrefixStore("documents", max_bytes=20 * 10**9, model=refreshkv.enable(model, config))
    ids = generate_from_chunks(store, [ids of a document, ids of another], ids of the question, max_new_tokens=256)

Each chunk was computed alone from position 0, perhaps for an earlier prompt. Its keys are turned to their place, and a
few of its tokens may be computed again with all that comes before them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from refreshkv.attention.chunks import validate_layers
from refreshkv.attention.model_call import NAME
from refreshkv.cache.keyword import as_keyword
from refreshkv.cache.refresh import RefreshCache
from refreshkv.config import RefreshConfig
from refreshkv.generation.decode_ahead import decode_ahead
from refreshkv.layers import layer_kinds
from refreshkv.prefix.blending import blend, most_changed
from refreshkv.prefix.entry import DamagedEntry, Ids, as_tokens
from refreshkv.prefix.fill import HostPrefix, fill_layer, validate_takes_prefix
from refreshkv.prefix.store import PrefixStore
from refreshkv.ranges import show
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class ChunkReuse:
    """What one request took from the store."""

    tokens: int
    """Tokens of all chunks."""
    known_tokens: int
    """Tokens of those chunks that the store had before."""
    recomputed_tokens: int
    """Tokens that were computed again after the tokens before them."""
    seconds: float
    """Host time of all of it. On a GPU copies may still run afterwards."""

    def __str__(self) -> str:
        return (
            f"chunks of {self.tokens} tokens, {self.known_tokens} of them known, {self.recomputed_tokens} computed "
            f"again, in {self.seconds:.3f} s"
        )


def generate_from_chunks(
    store: PrefixStore,
    chunks: Sequence[Ids],
    question: Ids,
    *,
    max_new_tokens: int,
    first: int = 0,
    changed: float = 0.0,
    refresh: RefreshConfig | None = None,
    **settings: Any,
) -> Any:
    """Generates after a prompt of chunks and a question, from a small cache: returns what `model.generate` does.

    Args:
        chunks: tokens of each chunk, (n,); chunks that the store lacks are computed and stored.
        question: (n,), the prompt's last chunk, which attends to all of them: at least two tokens, and as many as the
            observation window.
        first, changed: as in `load_chunks`.
        refresh: schedule and selection; None: those saved with the model.
        settings: of `model.generate`.

    Raises as `load_chunks`.
    """
    model, last = store.model, as_tokens(question)
    ids = torch.tensor([[token for part in (*map(as_tokens, chunks), last) for token in part]], device=model.device)
    cache = RefreshCache(model.config, ids.shape[1] + max_new_tokens, refresh)
    least = max(2, cache.config.observation_window)
    if len(last) < least:
        raise SettingsError(f"the question has {len(last)} tokens, but the selection needs the queries of {least}")
    load_chunks(store, cache, chunks, first=first, changed=changed)
    settings = {"attention_mask": torch.ones_like(ids), "custom_generate": decode_ahead, **settings}
    generate: Any = model.generate
    return generate(ids, **as_keyword(cache), max_new_tokens=max_new_tokens, **settings)


def load_chunks(
    store: PrefixStore, cache: Cache, chunks: Sequence[Ids], *, first: int = 0, changed: float = 0.0
) -> ChunkReuse:
    """Fills an empty cache of one batch row with chunks, one behind the other; the rest of the prompt has to follow.

    Args:
        cache: a `RefreshCache` or any other that goes on from a prefix.
        chunks: tokens of each chunk, (n,) int; those that the store lacks are computed and stored.
        first: how many of the first tokens of each chunk are computed again, attending to all before them.
        changed: or the share of all chunks' tokens that are computed again: those whose values in the second layer
            full attention changes most.

    Without either the prompt is that of `Simulation(chunks=...)`; with all tokens it is an ordinary prompt. The first
    chunk is never computed again, for nothing comes before it.

    Raises `SettingsError` if the model's or the cache's settings do not go together with chunks, or a chunk does not
    fit into the store, and `ValueError` if the cache holds tokens.
    """
    began = time.perf_counter()
    _validate_amounts(first, changed)
    _validate_model(store)
    _validate_cache(cache, len(chunks))
    parts = [as_tokens(chunk) for chunk in chunks]
    known = sum(len(part) for part in parts if store.match(part)[0] == len(part))
    states = _states(store, [_read(store, part) for part in parts])
    lengths = [len(part) for part in parts]
    ids = torch.tensor([[token for part in parts for token in part]], device=store.model.device)
    columns = ids.new_empty(0)
    if changed and len(parts) > 1:
        columns = most_changed(store.model, ids, states, changed, lengths[0])
    elif first:
        columns = torch.tensor(_first_tokens(lengths, first), dtype=torch.int64, device=ids.device)
    if len(columns):
        states = blend(store.model, ids, states, columns)
    for number, (keys, values) in enumerate(states):
        fill_layer(cache, number, keys, values)
    return ChunkReuse(ids.shape[1], known, len(columns), time.perf_counter() - began)


def _first_tokens(lengths: list[int], first: int) -> list[int]:
    """The columns of the first tokens of each chunk but the first one."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return [start + token for start, n in list(zip(starts, lengths, strict=True))[1:] for token in range(min(first, n))]


def _read(store: PrefixStore, ids: Any) -> dict[str, Tensor]:
    """Keys and values of a chunk's tokens (n,) in host memory, as in `Entry.tensors`; computes what the store lacks."""
    while True:
        entry = store.put_chunk(ids)
        if entry is None:
            raise SettingsError(
                f"max_bytes={store.max_bytes} of the prefix store holds no chunk of {len(ids)} tokens: give it more, "
                "or make shorter chunks"
            )
        try:
            return store.read(entry, len(ids))
        except DamagedEntry:
            continue  # the store will not find it again


def _states(store: PrefixStore, chunks: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Keys, turned to their places, and values of all chunks, (1, Hkv, L, D) each, on the device of each layer."""
    states, rotations = [], store.rotations if len(chunks) > 1 else None
    for number, device in enumerate(store.devices):
        start, keys, values = 0, [], []
        for chunk in chunks:
            length = len(chunk[f"key.{number}"])
            prefix = HostPrefix([chunk], [0], length)
            key = prefix.on_device(f"key.{number}", device, length)
            rotation = None if rotations is None else rotations[number]
            keys.append(key if rotation is None else rotation.turn(key, start))
            values.append(prefix.on_device(f"value.{number}", device, length))
            start += length
        states.append((torch.cat(keys, dim=2), torch.cat(values, dim=2)))
    return states


def _validate_amounts(first: int, changed: float) -> None:
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise SettingsError(f"first must be a whole number >= 0, got {show(first)}")
    if isinstance(changed, bool) or not isinstance(changed, (int, float)) or not 0 <= changed <= 1:
        raise SettingsError(f"changed must be a share from 0 to 1, got {show(changed)}")
    if first and changed:
        raise SettingsError(f"first={first} and changed={changed:g} exclude each other: set one of them to 0")


def _validate_model(store: PrefixStore) -> None:
    """Refuses models whose layers, or whose attention, know no chunks."""
    model: Any = store.model
    if not hasattr(model, "refreshkv_calls") or model.config._attn_implementation != NAME:
        raise SettingsError("chunks need the refresh attention: call refreshkv.enable(model) before")
    kinds = layer_kinds(model.config)
    validate_layers(sum(kind.is_refreshed for kind in kinds), len(kinds))


def _validate_cache(cache: Cache, chunks: int) -> None:
    """Refuses caches that cannot be filled, and selections that chunks computed apart do not allow."""
    if chunks == 0:
        raise SettingsError("chunks is empty: give at least one")
    held = int(cache.get_seq_length())
    if held > 0:
        raise ValueError(f"a cache that holds {held} tokens cannot be filled: call reset() first")
    validate_takes_prefix(cache)
    sinks = cache.config.sink_tokens if isinstance(cache, RefreshCache) else 0
    if sinks and chunks > 1:
        raise SettingsError(
            f"sink_tokens={sinks}: chunks that were computed apart have not seen a prompt's first tokens: set "
            "sink_tokens=0"
        )
