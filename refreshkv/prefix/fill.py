"""Copies stored keys and values into an empty cache.

Shapes: `B` batch rows, `Hkv` key/value heads, `D` head size.
"""

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from refreshkv.baselines.compact import CompactLayer
from refreshkv.cache.preallocated_layer import PreallocatedLayer
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class HostPrefix:
    """Keys and values, in host memory, of the first `columns` columns of a left-padded batch."""

    tensors: list[dict[str, Tensor]]
    """For each batch row "key.N" and "value.N" of each layer N, (tokens, Hkv, D) each; {} if all columns are padded."""
    paddings: list[int]
    """For each batch row its padded columns."""
    columns: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for row in self.tensors for tensor in row.values())

    def on_device(self, name: str, device: torch.device, columns: int) -> Tensor:
        """The first `columns` columns of one tensor as (B, Hkv, columns, D) on the device, padded in front."""
        like = next(row[name] for row in self.tensors if name in row)
        if len(self.tensors) == 1 and self.paddings[0] == 0:
            return like[:columns].to(device, non_blocking=True).transpose(0, 1).unsqueeze(0)
        block = torch.zeros(len(self.tensors), columns, *like.shape[1:], dtype=like.dtype, device=device)
        for number, (row, padding) in enumerate(zip(self.tensors, self.paddings, strict=True)):
            if name in row and columns > padding:
                block[number, padding:].copy_(row[name][: columns - padding], non_blocking=True)
        return block.transpose(1, 2)


def validate_takes_prefix(cache: Cache) -> None:
    """Raises `SettingsError` if the cache's strategy cannot go on from a stored prefix, as H2O cannot.

    H2O sums the attention of all of a prompt's queries, and a store holds keys and values only.
    """
    if any(not getattr(layer, "takes_prefix", True) for layer in cache.layers):
        raise SettingsError(
            f"{type(cache).__name__} depends on all queries of a prompt, which a prefix store does not hold: leave out "
            "the prefix store (--prefix-store), or this strategy"
        )


def fill_cache(cache: Cache, prefix: HostPrefix, devices: list[torch.device]) -> None:
    """Copies a prefix into an empty cache, whose layer N belongs on devices[N].

    On a GPU, layers with buffers are copied to on a stream of its own, and the first attention of each layer waits for
    that layer's copy only: layer 0 computes while the others are still being copied.
    """
    streams = {device: copy_stream(device) for device in set(devices) if device.type == "cuda"}
    buffered = {
        number: layer
        for number, (layer, device) in enumerate(zip(cache.layers, devices, strict=False))
        if device in streams and isinstance(layer, PreallocatedLayer) and not isinstance(layer, CompactLayer)
    }
    for number, layer in buffered.items():  # the buffers are allocated on the computation's stream
        layer.reserve(*_keys_values(prefix, number, devices[number], 0))
    for device, stream in streams.items():
        stream.wait_stream(torch.cuda.current_stream(device))
    for number, device in enumerate(devices):
        with torch.cuda.stream(streams[device]) if number in buffered else nullcontext():
            fill_layer(cache, number, *_keys_values(prefix, number, device, prefix.columns))
        if number in buffered:
            buffered[number].wait_for(streams[device])
    first = next(iter(buffered.values()), None)
    if first is not None:  # the model asks for this layer's length before its attention waits
        assert first.copies is not None  # `wait_for` recorded it
        torch.cuda.current_stream(first.device).wait_event(first.copies)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU for all such copies. Once a process has used more than about five streams, the GPU takes 0.3
    to 0.6 microseconds longer to begin each kernel (docs/results.md)."""
    return torch.cuda.Stream(device)


def _keys_values(prefix: HostPrefix, number: int, device: torch.device, columns: int) -> tuple[Tensor, Tensor]:
    """Keys and values of layer `number`, (B, Hkv, columns, D) each."""
    keys = prefix.on_device(f"key.{number}", device, columns)
    return keys, prefix.on_device(f"value.{number}", device, columns)


def fill_layer(cache: Cache, number: int, keys: Tensor, values: Tensor) -> None:
    """Puts keys and values (B, Hkv, n, D) into layer `number` of an empty cache."""
    layer = cache.layers[number] if number < len(cache.layers) else None
    if isinstance(layer, PreallocatedLayer):
        layer.load_prefix(keys, values)
    else:  # transformers' own layers take a prompt in any number of blocks
        cache.update(keys, values, number)
