"""The mask function registered with transformers: it returns the batch rows' left padding and refuses other masks."""

import torch
from torch import Tensor

from refreshkv.cache.preallocated_layer import validate_room


def left_padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """Returns the number of padded columns of each batch row, or None without padding.

    Takes transformers' mask arguments; attention_mask is (B, columns) bool. Returns (B, 1, 1, 1) int64, counted from
    the layer's first key, because transformers passes a mask of four dimensions on unchanged. Raises `ValueError` for
    padding that is not on the left, and for packed sequences, whose masks the attention would not get.
    """
    if isinstance(q_offset, Tensor):  # the length is on the device, and kv_length is the cache's room
        if q_length == 1:  # a decoding step: the cache's layers know their padding
            if not torch.compiler.is_compiling():
                validate_room(0 if attention_mask is None else attention_mask.shape[1], kv_length)
            return None
        if attention_mask is not None:
            kv_length = int(q_offset) + q_length
    if torch.compiler.is_compiling() and attention_mask is None:
        return None  # while it is traced transformers cannot see packed sequences: `validate_inputs` does
    if not allow_is_causal_skip and q_length > 1:
        raise ValueError(
            "packed sequences and custom masks are not supported: give each batch row one sequence; images "
            "whose tokens attend to later ones (Gemma 3) are not supported either"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < kv_length + kv_offset:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {kv_length + kv_offset} tokens: it must cover "
            "the cached ones too; to begin another text, call reset() first"
        )
    mask = attention_mask[:, : kv_length + kv_offset].bool()
    padding = (~mask).sum(dim=-1)
    if not bool(padding.any()):
        return None
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not bool((mask == (columns >= padding[:, None])).all()):
        raise ValueError(
            'only left padding is supported: set tokenizer.padding_side = "left"; without attention_mask, generate() '
            "takes each padding token of a text for padding: give it attention_mask=torch.ones_like(input_ids)"
        )
    if bool((padding >= mask.shape[1]).any()):
        raise ValueError(
            "a batch row is padding only: each needs at least one token, in the first chunk of a prompt too"
        )
    return (padding - kv_offset).clamp(min=0)[:, None, None, None]


def padding_from_mask(attention_mask: Tensor | None) -> Tensor | None:
    """The left padding (B,) int64 from what `left_padding_mask` returned; raises `ValueError` for any other mask."""
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.int64 or attention_mask.shape[1:] != (1, 1, 1):
        raise ValueError(
            "the refresh attention takes a (B, T) attention_mask with left padding, not a prepared 4D mask"
        )
    return attention_mask[:, 0, 0, 0]
