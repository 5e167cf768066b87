"""Attention of a simulated prompt in chunks (docs/specification.md, section 12).

Each chunk is an ordinary causal attention over few keys, so no mask over the whole prompt exists. The definition is
`refreshkv.ops.naive.chunked_prompt`.

Shapes: `B` batch rows, `P` prompt length, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from refreshkv.attention.dense import DenseAttention
from refreshkv.config import Simulation
from refreshkv.settings import SettingsError

OTHER_LAYERS = (
    "chunks need full attention in every layer, and this model has others (sliding windows, recurrent layers): compute "
    "its prompts whole"
)


def chunked_prompt(dense: DenseAttention, query: Tensor, key: Tensor, value: Tensor, simulation: Simulation) -> Tensor:
    """Attention of a prompt in the chunks of `simulation`: query (B, H, P, D), key (B, Hkv, P, D), value (B, Hkv, P, E)
    -> (B, P, H, E). Padded columns are zero.

    Raises `SettingsError` if the chunks are given for another number of batch rows.
    """
    rows, sinks = len(query), simulation.config.sink_tokens
    ends = simulation.chunk_ends(rows)
    paddings = [0] * rows if dense.left_padding is None else dense.left_padding.tolist()
    dense = replace(dense, left_padding=None)
    if len({*zip(ends, paddings, strict=True)}) == 1:
        return _attend(dense, (query, key, value), ends[0], paddings[0], sinks)
    parts = []
    for row, (own_ends, padding) in enumerate(zip(ends, paddings, strict=True)):
        tensors = tuple(tensor[row : row + 1] for tensor in (query, key, value))
        parts.append(_attend(dense, tensors, own_ends, padding, sinks))
    return torch.cat(parts)


def _attend(
    dense: DenseAttention, tensors: tuple[Tensor, ...], ends: tuple[int, ...], padding: int, sinks: int
) -> Tensor:
    """Attention of batch rows with the same chunks and `padding` padded columns."""
    query, key, value = tensors
    parts = [query.new_zeros(len(query), padding, query.shape[1], value.shape[-1])]
    start, sinks_end = padding, padding + sinks
    for end in ends:
        if end <= start:  # padding only
            continue
        is_last = end == ends[-1]
        seen = [tensor[:, :, padding if is_last or start <= sinks_end else start : end] for tensor in (key, value)]
        if not is_last and padding < sinks_end < start:
            first = [tensor[:, :, padding:sinks_end] for tensor in (key, value)]
            seen = [torch.cat(pair, dim=2) for pair in zip(first, seen, strict=True)]
        parts.append(dense(query[:, :, start:end], *seen))
        start = end
    return torch.cat(parts, dim=1)


def validate_layers(full_attention_layers: int, layers: int) -> None:
    """Raises `SettingsError` unless all layers of the model have full attention."""
    if full_attention_layers != layers:
        raise SettingsError(OTHER_LAYERS)
