"""One stored prompt, and what a backend does with it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Ids = Tensor | np.ndarray | list[int]


class DamagedEntry(Exception):
    """An entry's file cannot be read or does not hold what was written; or it has been removed meanwhile."""


@dataclass(eq=False)
class Entry:
    """A stored prompt. Entries are compared by identity."""

    name: str
    """Hash of the tokens; in a folder, the file's name without its ending."""
    ids: np.ndarray = field(repr=False)
    """(P,) int64: the prompt's tokens."""
    size: int
    """Bytes of keys, values, tokens and header together."""
    seconds: float | None
    """Time to compute the whole prompt, measured or estimated; None if unknown."""
    device: str
    """Kind of device of that time, see `device_name`."""
    model: str = ""
    """Hash of the identity of the model that computed it, see `refreshkv.identity`."""
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """In host memory "key.N" and "value.N" of each layer N, (P, Hkv, D) each; empty if they are in a file."""
    verified: dict[str, int] = field(default_factory=dict, repr=False)
    """By tensor: its first chunks whose checksums this process has compared."""


class Backend(Protocol):
    """Keeps the entries of a `PrefixStore`.

    Tensors are (tokens, heads, head size), tokens first, so that the first tokens of each are one contiguous piece.
    """

    def writing(self) -> AbstractContextManager:
        """A lock that one thread of one process holds at a time."""
        ...

    def entries(self) -> dict[Any, Entry]:
        """All complete entries whose header is intact, by a key that changes when an entry is replaced."""
        ...

    def by_last_use(self) -> list[tuple[str, int]]:
        """Name and bytes of everything that takes room, the least recently used first."""
        ...

    def write(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        """Adds an entry; readers see all of it or nothing."""

    def read(self, entry: Entry, tokens: int, names: list[str]) -> dict[str, Tensor]:
        """The first `tokens` tokens of the named tensors, in host memory. Raises `DamagedEntry`."""
        ...

    def touch(self, name: str) -> None:
        """Marks an entry as used now."""

    def remove(self, name: str) -> None:
        """Removes an entry if it is there."""


def as_tokens(ids: Ids) -> np.ndarray:
    """Token ids as (P,) int64. Raises `ValueError` unless they are one sequence, (P,) or (1, P), with P >= 1."""
    tokens = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    tokens = tokens[0] if tokens.ndim == 2 and len(tokens) == 1 else tokens
    if tokens.ndim != 1 or len(tokens) == 0:
        raise ValueError(f"a prompt is one row of at least one token, got the shape {tokens.shape}")
    return np.ascontiguousarray(tokens, dtype=np.int64)


def device_name(device: torch.device) -> str:
    """The kind of device, such as "cpu" or a GPU's model name: times compare only within one kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
