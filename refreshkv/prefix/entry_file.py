"""The file of one entry: safetensors with the prompt's tokens, keys and values, and checksums of all of them.

Each tensor has a checksum for every `CHUNK_TOKENS` tokens, so that a reader verifies only the tokens it uses. The
checksums themselves, the tokens and the other facts have one checksum in the file's metadata.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refreshkv.prefix.entry import Entry

SUFFIX = ".safetensors"

CHUNK_TOKENS = 1024
"""Tokens of a tensor that share a checksum."""

HEADER_BYTES = 256
"""An upper bound of what a file's header takes for each tensor."""

UNREADABLE = (OSError, RuntimeError, SafetensorError, ValueError, KeyError, IndexError, TypeError)
"""What reading a damaged or removed file raises; RuntimeError comes from torch, for a file that it cannot map."""

FACTS = ("seconds", "device", "model")
"""Fields of `Entry` in the file's metadata."""


def entry_bytes(tensors: dict[str, Tensor], ids: np.ndarray) -> int:
    """An upper bound, by less than 4 KB, of the bytes of an entry's file."""
    content = sum(tensor.nbytes + len(tensor) // CHUNK_TOKENS * 8 + HEADER_BYTES for tensor in tensors.values())
    return content + ids.nbytes + 4 * HEADER_BYTES


def write_entry(file: Path, entry: Entry, tensors: dict[str, Tensor]) -> None:
    """Writes an entry and its tensors, (P, Hkv, D) each on any device. Raises `OSError` or `SafetensorError`."""
    host = {name: tensors[name].contiguous().cpu() for name in _with_checksums(tensors)}
    sums = torch.tensor([_checksums(tensor) for tensor in host.values()], dtype=torch.int64)
    ids = torch.from_numpy(entry.ids)
    facts = json.dumps({name: getattr(entry, name) for name in FACTS})
    metadata = {"facts": facts, "checksum": _head_checksum(facts, ids, sums)}
    save_file({"ids": ids, "checksums": sums, **host}, file, metadata=metadata)


def read_entry(file: Path) -> Entry:
    """The entry of a file, from its beginning; keys and values are not read. Raises one of `UNREADABLE`."""
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
        ids, sums = content.get_tensor("ids"), content.get_tensor("checksums")
    if metadata["checksum"] != _head_checksum(metadata["facts"], ids, sums):
        raise ValueError("the checksum of its beginning is wrong")
    facts = json.loads(metadata["facts"])
    size = file.stat().st_size
    return Entry(file.name.removesuffix(SUFFIX), ids.numpy().copy(), size, *(facts[name] for name in FACTS))


def read_tensors(file: Path, entry: Entry, tokens: int, names: list[str]) -> dict[str, Tensor]:
    """The first `tokens` tokens of the named tensors, (tokens, Hkv, D) each, memory-mapped.

    Compares the checksums of those tokens that no earlier call has verified. Raises one of `UNREADABLE`.
    """
    with safe_open(file, framework="pt") as content:
        order = {name: line for line, name in enumerate(_with_checksums(content.keys()))}
        sums = content.get_tensor("checksums")
        tensors = {name: content.get_tensor(name) for name in names}
    if any(len(tensor) != len(entry.ids) for tensor in tensors.values()):
        raise ValueError("its tensors do not have its number of tokens")
    for name, tensor in tensors.items():
        _verify(entry, name, tensor, tokens, sums[order[name]])
    return {name: tensor[:tokens] for name, tensor in tensors.items()}


def _verify(entry: Entry, name: str, tensor: Tensor, tokens: int, sums: Tensor) -> None:
    """Compares checksums of the chunks with the first `tokens` tokens, each chunk once a process.

    Once is enough to notice a damaged file; reading gigabytes twice would take longer than copying them.
    """
    chunks = -(-tokens // CHUNK_TOKENS)
    first = entry.verified.get(name, 0)
    part = tensor[first * CHUNK_TOKENS : chunks * CHUNK_TOKENS]
    if first < chunks and _checksums(part) != sums[first:chunks].tolist():
        raise ValueError(f"the checksum of {name} is wrong")
    entry.verified[name] = max(first, chunks)


def _with_checksums(names: Iterable[str]) -> list[str]:
    """Names of the tensors that have checksums, in the order of the lines of `checksums`."""
    return sorted(name for name in names if name not in ("ids", "checksums"))


def _checksums(tensor: Tensor) -> list[int]:
    """The 64-bit xxh3, as a signed integer, of each chunk of tokens of a contiguous host tensor."""
    parts = (part.view(torch.uint8).numpy() for part in tensor.split(CHUNK_TOKENS))
    # pyright knows arrays as buffers from Python 3.12 on
    digests = (xxhash.xxh3_64_intdigest(part) for part in parts)  # pyright: ignore[reportArgumentType]
    return [digest - (digest >> 63 << 64) for digest in digests]


def _head_checksum(facts: str, ids: Tensor, sums: Tensor) -> str:
    digest = xxhash.xxh3_128(facts.encode())
    digest.update(ids.numpy().tobytes())
    digest.update(sums.numpy().tobytes())
    return digest.hexdigest()
