"""A whole model whose attention is Algorithm 1 taken literally, for prompts in several turns. Slow; for tests only.

    model.set_attn_implementation(literal.NAME)
    model(ids, blocks=[(0, 9), (20, 24)], config=config)

Positions 0-8 are the prompt, 20-23 a second turn; all others are decoded one by one. Differentiable.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from refreshkv.attention.masks import left_padding_mask
from tests.helpers.reference import sequential_attention

NAME = "literal"


def literal_attention(module, query, key, value, attention_mask, scaling, blocks, config, **kwargs):
    """query (B, H, T, D), key and value (B, Hkv, T, D), attention_mask (B, 1, 1, 1) padded columns -> (B, T, H, D)."""
    length, rows = query.shape[2], []
    padding = [0] * len(query) if attention_mask is None else attention_mask.flatten().tolist()
    for row, start in enumerate(padding):
        parts = [torch.zeros_like(query[row, :, :start])]
        ends = [first for first, _ in blocks[1:]] + [length]
        for (first, last), end in zip(blocks, ends, strict=True):
            seen = (tensor[row, :, start:end] for tensor in (query, key, value))
            output, *_ = sequential_attention(*seen, last - start, config, scaling)
            parts.append(output[:, max(first - start, 0) :])
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows).transpose(1, 2), None


AttentionInterface.register(NAME, literal_attention)
AttentionMaskInterface.register(NAME, left_padding_mask)
