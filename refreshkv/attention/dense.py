"""Ordinary causal attention, by the fastest of torch's and transformers' implementations.

Shapes: `B` batch rows, `T` query positions, `L` key positions, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from copy import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refreshkv import ops
from refreshkv.ops.choice import CHOICE

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""torch's own order prefers its flash attention, which takes nearly twice cuDNN's time on Hopper GPUs. But with a
mask over 64 keys more than a multiple of 128, cuDNN's gradient of a query whose scores all lie below -88 is nan."""


def ordinary_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left_padding: Tensor | None,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    implementation: str,
    **kwargs,
) -> Tensor:
    """Causal attention by one of transformers' own implementations; the queries are the last T of L positions.

    Returns (B, T, H, D).
    """
    is_flash = implementation.startswith("flash")
    if is_flash:
        # transformers reads the implementation's name from the module's config, where ours stands
        config = copy(module.config)
        config._attn_implementation = implementation
        mask = _key_mask(left_padding, key.shape[2])
        module = SimpleNamespace(config=config, is_causal=True, layer_idx=module.layer_idx, modules=module.modules)
        kwargs.pop("position_ids", None)  # of the whole row, and packed sequences are refused anyway
    else:
        named = _has_a_name(left_padding, sliding_window, query)
        if named and implementation == "sdpa" and not dropout and CHOICE.takes_prompt_block(query, key, value):
            return ops.prompt_block(query, key, value, scaling).transpose(1, 2)
        if named and query.shape[2] not in (1, key.shape[2]):
            mask = causal_lower_right(query.shape[2], key.shape[2])
        else:
            mask = _causal_mask(left_padding, query.shape[2], key.shape[2], sliding_window, query.device)
    first = 1 if isinstance(mask, Tensor) and key.shape[2] % 128 == 64 else 0
    with sdpa_kernel(FASTEST_FIRST[first:], set_priority=True):
        output, _ = ALL_ATTENTION_FUNCTIONS[implementation](
            module, query, key, value, mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window, **kwargs
        )
    return _UpstreamInLayout.apply(output) if output.requires_grad else output


class _UpstreamInLayout(torch.autograd.Function):
    """The same (B, T, H, D) tensor, whose gradient comes back laid out as itself.

    torch 2.11 keeps cuDNN's plan of a backward pass by the shapes and strides of query, key and value alone, but the
    plan holds the upstream gradient's strides too: one that comes with others, as a part cut out of longer rows does,
    would be read at the wrong places, or past its end.
    """

    @staticmethod
    def forward(ctx, output):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, upstream):
        return upstream.contiguous()


def _has_a_name(left_padding: Tensor | None, window: int | None, query: Tensor) -> bool:
    """Whether a prompt or a later block of it can tell the GPU's kernels its pattern by name: they then skip what is
    hidden, where a mask in full would be read, and grows with the product of the lengths."""
    plain = left_padding is None and window is None and not torch.compiler.is_compiling()
    return plain and query.is_cuda and query.dtype != torch.float64


def _key_mask(left_padding: Tensor | None, columns: int) -> Tensor | None:
    """(B, L) bool: the keys that exist; None if all do."""
    if left_padding is None:
        return None
    return torch.arange(columns, device=left_padding.device) >= left_padding[:, None]


def _causal_mask(
    left_padding: Tensor | None, rows: int, columns: int, window: int | None, device: torch.device
) -> Tensor | None:
    """(B or 1, 1, T, L) bool, or None where the implementation's own causal flag says the same."""
    if left_padding is None and (rows == 1 or rows == columns) and (window is None or columns <= window):
        return None
    column = torch.arange(columns, device=device)
    row = torch.arange(columns - rows, columns, device=device).unsqueeze(-1)
    mask = column <= row
    if window is not None:
        mask = mask & (column > row - window)
    if left_padding is not None:
        mask = mask & _key_mask(left_padding, columns).unsqueeze(1)
        mask = mask.unsqueeze(1)
    else:
        mask = mask[None, None]
    return mask
