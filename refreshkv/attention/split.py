"""Splits a layer's queries, keys and values into what the prompt needs and what the positions after it need.

Shapes: `B` batch rows, `T` positions, `H` query heads, `Hkv` key/value heads, `D` head size, `P` prompt length.
"""

import torch
from torch import Tensor

LENGTH_STEP = 128
"""On a GPU the prompt's attention is computed for a multiple of this many positions, and the surplus outputs are
dropped: cuDNN takes some ten milliseconds to plan for each new length, and it computes tiles of 128 positions
anyway."""


def computed_length(query: Tensor, prompt_length: int) -> int:
    """How many positions of query (B, H, T, D) the prompt's attention is computed for: at least P."""
    if not query.is_cuda:
        return prompt_length
    return min(-(-prompt_length // LENGTH_STEP) * LENGTH_STEP, query.shape[2])


class SplitAtPrompt(torch.autograd.Function):
    """Query, key and value of the first `computed` positions; then the queries from the prompt's last `observing`
    positions on, and the whole keys and values.

    Backward adds the gradients in one pass; autograd by itself would first pad each of them with zeros. Queries beyond
    the prompt get no gradient from the prompt's part, because its surplus outputs are dropped.
    """

    @staticmethod
    def forward(ctx, query, key, value, prompt_length, computed, observing):
        ctx.prompt, ctx.computed, ctx.first = prompt_length, computed, max(0, prompt_length - observing)
        early = (tensor[:, :, :computed] for tensor in (query, key, value))
        return *early, query[:, :, ctx.first :], key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx, early_query, early_key, early_value, late_query, key, value):
        query = _empty_like_projections(late_query, ctx.first + late_query.shape[2])
        query[:, :, : ctx.prompt] = early_query[:, :, : ctx.prompt]
        query[:, :, ctx.prompt :] = late_query[:, :, ctx.prompt - ctx.first :]
        query[:, :, ctx.first : ctx.prompt] += late_query[:, :, : ctx.prompt - ctx.first]
        for whole, early in ((key, early_key), (value, early_value)):
            whole[:, :, : ctx.computed] += early
        return query, key, value, None, None, None


def _empty_like_projections(like: Tensor, length: int) -> Tensor:
    """An empty (B, H, length, D) tensor with a model's projections' memory layout, positions before heads."""
    batch, heads, _, head_dim = like.shape
    return like.new_empty(batch, length, heads, head_dim).transpose(1, 2)
