"""Ordinary causal attention, by the fastest of torch's and transformers' implementations.

Shapes: `B` batch rows, `T` query positions, `L` key positions, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refreshkv import ops
from refreshkv.attention.softmax_terms import attention_with_sinks, capped_attention
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import PLAIN_SOFTMAX, SoftmaxTerms
from refreshkv.settings import SettingsError

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""torch's own order prefers its flash attention, which takes nearly twice cuDNN's time on Hopper GPUs."""


@dataclass(frozen=True)
class DenseAttention:
    """Causal attention of one layer's call by one of transformers' own implementations, with all settings fixed."""

    module: Any
    left_padding: Tensor | None
    """(B,) int64: padded columns of each batch row; None: no padding."""
    scaling: float
    dropout: float
    sliding_window: int | None
    """Window of the layer in tokens; None: full attention."""
    implementation: str
    """Name of the implementation in transformers."""
    keywords: dict[str, Any]
    """The further keywords that transformers gave the attention function."""
    terms: SoftmaxTerms = PLAIN_SOFTMAX
    """Changes of the softmax in this model."""
    columns: Tensor | None = None
    """(T,) int64: the columns of the queries; None: the last T of the keys' columns."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B, H, T, D): the last T of L positions, or those of `columns`; key and value (B, Hkv, L, D).

        Returns (B, T, H, D).
        """
        if not self.terms.is_plain:
            output = self._with_terms(query, key, value)
        elif self.implementation.startswith("flash") and self.columns is not None:
            raise SettingsError(
                f"prompt_attention={self.implementation} knows no tokens that are computed again: set it to sdpa"
            )
        elif self.implementation.startswith("flash"):
            output = self._flash(query, key, value)
        elif self._is_block(query, key, value):
            return ops.prompt_block(query, key, value, self.scaling).transpose(1, 2)
        elif self._is_short_block(query, key, value):
            output = ops.short_block(query, key, value, self.left_padding, self.scaling, self.columns).transpose(1, 2)
        else:
            output = self._masked(query, key, value)
        return _UpstreamInLayout.apply(output) if output.requires_grad else output

    def _with_terms(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention with sinks or a softcap: returns (B, T, H, D)."""
        if self.implementation != "sdpa" or self.dropout:
            setting = f"dropout={self.dropout}" if self.dropout else f"prompt_attention={self.implementation}"
            raise SettingsError(
                f"{setting} is not supported for a model with attention sinks or a softcap: set attention_dropout=0 "
                "and prompt_attention=sdpa"
            )
        queries, keys = query.shape[2], key.shape[2]
        mask = self._visible(queries, keys, query.device)
        if self.terms.softcap is not None:
            return capped_attention(query, key, value, mask, self.scaling, self.terms).transpose(1, 2)
        assert self.terms.sinks is not None
        return attention_with_sinks(query, key, value, mask, self.scaling, self.terms.sinks).transpose(1, 2)

    def _is_block(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the project's kernel for a later block of a prompt is the fastest for these tensors."""
        is_plain = self.implementation == "sdpa" and not self.dropout and self._can_use_causal_flag(query)
        return is_plain and CHOICE.takes_prompt_block(query, key, value)

    def _is_short_block(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the block has few queries and many keys, so that a kernel should read the keys once for all
        queries."""
        is_plain = self.implementation == "sdpa" and not self.dropout and self.sliding_window is None
        return is_plain and CHOICE.takes_short_block(query, key, value)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module, config = self.module, copy(self.module.config)
        # transformers reads the implementation's name from the module's config, which says "refreshkv"
        config._attn_implementation = self.implementation
        stand_in = SimpleNamespace(config=config, is_causal=True, layer_idx=module.layer_idx, modules=module.modules)
        # transformers uses position_ids only to find packed sequences, which are refused
        keywords = {name: value for name, value in self.keywords.items() if name != "position_ids"}
        mask = None if self.left_padding is None else _key_mask(self.left_padding, key.shape[2])
        return self._call(stand_in, query, key, value, mask, keywords)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        if self._can_use_causal_flag(query) and queries not in (1, keys):
            mask = causal_lower_right(queries, keys)
        else:
            mask = self._causal_mask(queries, keys, query.device)
        # With a mask over 64 keys more than a multiple of 128, cuDNN's gradient of a query whose scores all lie below
        # -88 is nan.
        first = 1 if isinstance(mask, Tensor) and keys % 128 == 64 else 0
        with sdpa_kernel(FASTEST_FIRST[first:], set_priority=True):
            return self._call(self.module, query, key, value, mask, self.keywords)

    def _call(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: dict) -> Tensor:
        settings = {"scaling": self.scaling, "dropout": self.dropout, "sliding_window": self.sliding_window}
        return ALL_ATTENTION_FUNCTIONS[self.implementation](module, query, key, value, mask, **settings, **keywords)[0]

    def _can_use_causal_flag(self, query: Tensor) -> bool:
        """True if the mask is plain bottom-right causal and a GPU kernel has a flag for it: the kernel then skips
        masked keys, and no (T, L) mask is built."""
        is_plain = self.left_padding is None and self.sliding_window is None and self.columns is None
        is_plain = is_plain and not torch.compiler.is_compiling()
        return is_plain and query.is_cuda and query.dtype != torch.float64

    def _causal_mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """The causal mask (B or 1, 1, T, L) bool, or None where the implementation's own causal flag means the same."""
        is_plain = self.left_padding is None and self.columns is None and queries in (1, keys)
        if is_plain and (self.sliding_window is None or keys <= self.sliding_window):
            return None
        return self._visible(queries, keys, device)

    def _visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Which of the L keys each of the T queries may attend to: (B or 1, 1, T, L) bool."""
        column = torch.arange(keys, device=device)
        rows = torch.arange(keys - queries, keys, device=device) if self.columns is None else self.columns
        row = rows.unsqueeze(-1)
        mask = column <= row
        if self.sliding_window is not None:
            mask = mask & (column > row - self.sliding_window)
        if self.left_padding is None:
            return mask[None, None]
        return (mask & _key_mask(self.left_padding, keys).unsqueeze(1)).unsqueeze(1)


class _UpstreamInLayout(torch.autograd.Function):
    """The identity on a (B, T, H, D) tensor; its gradient is made contiguous.

    torch 2.11 finds cuDNN's plan of a backward pass by the shapes and strides of query, key and value, but the plan
    also holds the strides of the upstream gradient. A gradient with other strides, such as a slice of longer sequences,
    would be read at the wrong addresses, or past its end.
    """

    @staticmethod
    def forward(ctx, output):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, upstream):
        return upstream.contiguous()


def _key_mask(left_padding: Tensor, columns: int) -> Tensor:
    """(B, L) bool: which keys are real tokens."""
    return torch.arange(columns, device=left_padding.device) >= left_padding[:, None]
