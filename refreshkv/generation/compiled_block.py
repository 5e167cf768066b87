"""The pass of a block of drafts, compiled: one compilation for all numbers of drafts.

Shapes: `B` batch rows, `n` tokens of the block, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refreshkv.cache.keyword import as_keyword
from refreshkv.cache.refresh import RefreshCache


def block_inputs(tokens: Tensor, positions: Tensor, padding: Tensor | None, cache: RefreshCache) -> dict[str, Any]:
    """The keywords of the model's call for tokens (B, n) at positions (B, n) in rows with this padding (B,)."""
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions, **as_keyword(cache)}
    if padding is not None:  # in the mask's prepared form, for which the host need not wait for the device
        inputs["attention_mask"] = padding[:, None, None, None]
    return inputs | {"use_cache": True, "return_dict": True}


def compiled_block(model: Any, backend: str = "inductor") -> Callable[..., Tensor]:
    """The compiled call of a block of at least two tokens.

    It takes tokens (B, n), positions (B, n), the rows' padding (B,), columns (n,) and the cache, after
    `RefreshCache.verify(columns, compiled=True)`, and returns logits (B, n, V) float32. It captures no CUDA graph of
    its own, so one can hold it.
    """
    call = torch.compile(model.__call__, fullgraph=True, dynamic=False, backend=backend)

    def run(tokens: Tensor, positions: Tensor, padding: Tensor, columns: Tensor, cache: RefreshCache) -> Tensor:
        for tensor in (tokens, positions, columns):
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.ndim - 1)
        return call(**block_inputs(tokens, positions, padding, cache)).logits.float()

    return run
