"""The definition of every operation of the refresh pattern in plain PyTorch, on any device, forward and backward.

Faster forms have the same signatures and are tested against these.
"""

from refreshkv.ops.naive.attention import grouped_attention
from refreshkv.ops.naive.chunks import chunk_mask, chunked_prompt
from refreshkv.ops.naive.rectified import rectified_rows
from refreshkv.ops.naive.rows import refresh_rows, visible_keys, whole_sequence
from refreshkv.ops.naive.score_keys import empty_score_keys, write_score_keys
from refreshkv.ops.naive.selection import select, selection_sizes
from refreshkv.ops.naive.step import (
    choose_step,
    compact_step,
    copy_tokens,
    decode,
    decode_step,
    fetching_step,
    full_step,
    gather_tokens,
    hold_positions,
    move_tokens,
    place_chosen,
    place_near,
    small_cache,
)

__all__ = [
    "choose_step",
    "chunk_mask",
    "chunked_prompt",
    "compact_step",
    "copy_tokens",
    "decode",
    "decode_step",
    "empty_score_keys",
    "fetching_step",
    "full_step",
    "gather_tokens",
    "grouped_attention",
    "hold_positions",
    "move_tokens",
    "place_chosen",
    "place_near",
    "rectified_rows",
    "refresh_rows",
    "select",
    "selection_sizes",
    "small_cache",
    "visible_keys",
    "whole_sequence",
    "write_score_keys",
]
