"""Which form computes what: every such question is answered here, from the environment, the configuration and shapes.

Nothing is counted or measured, so that the same configuration gives the same kernels in every pass of every process,
to the last bit. `describe()` prints the answers; they are logged once, at the first use, by the logger "refreshkv".

Shapes: `B` batch rows, `T` positions, `P` prompt length, `S` stride, `H` query heads, `Hkv` key/value heads, `D` head
size.
"""

import logging
import os
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from refreshkv.ops.state import PLAIN_SOFTMAX, Plan, SoftmaxTerms

KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)
CUDNN_TYPES = (torch.float16, torch.bfloat16)

FEWEST_QUERIES = 256
"""Queries of a prompt block from which on cuDNN's tiles fill a GPU."""

MOST_SHORT_ROWS, SHORT_SHARE = 256, 8
"""A short block: at most so many queries for each key/value head, and at least so many keys for each token."""

TAIL_SHARE = 64
"""Sequences with at most 1/64 of their positions after the prompt are computed whole: up to there the extra arithmetic,
2 (T - P) / T of the dense attention, costs less than handling the prompt apart."""


@dataclass(frozen=True)
class Choice:
    """Says for each operation which form computes it."""

    naive_only: bool
    """Whether plain PyTorch computes everything, also on GPUs: REFRESHKV_OPS=naive in the environment."""

    @classmethod
    def from_environment(cls) -> "Choice":
        """Reads REFRESHKV_OPS; `ValueError` if it is anything else than naive or kernels."""
        form = os.environ.get("REFRESHKV_OPS") or "kernels"
        if form not in ("kernels", "naive"):
            raise ValueError(f"REFRESHKV_OPS={form} in the environment must be naive or kernels; unset it for kernels")
        return cls(naive_only=form == "naive")

    def uses_kernels(self, tensor: Tensor) -> bool:
        """True if the operations on this tensor go to GPU kernels, False if to `refreshkv.ops.naive`."""
        if not torch.compiler.is_compiling():
            _log_once()
        return tensor.is_cuda and tensor.dtype in KERNEL_TYPES and not self.naive_only

    def attends_by_kernels(self, key: Tensor, value: Tensor) -> bool:
        """True if kernels attend to key (B, Hkv, L, D) and value (B, Hkv, L, E): keys and values of one size, with or
        without attention sinks and a softcap. Values of another size take plain PyTorch."""
        return key.shape[-1] == value.shape[-1] and self.uses_kernels(key)

    def takes_whole_sequence(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> bool:
        """True if `ops.whole_sequence` is the faster way for query (B, H, T, D), key and value (B, Hkv, T, D)."""
        if plan.full_look_ahead is not None:
            return False
        length = query.shape[2]
        is_short = (length - plan.prompt_length) * TAIL_SHARE <= length
        if not (is_short and plan.uniform and self.uses_kernels(query)) or torch.compiler.is_compiling():
            return False
        return cudnn_takes(query, key, value)

    def takes_full_steps_by_cudnn(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, terms: SoftmaxTerms = PLAIN_SOFTMAX
    ) -> bool:
        """True if the full steps after the prompt go to cuDNN, False if to Triton: query (B, H, Q, D), key and value
        (B, Hkv, T, D). cuDNN knows the ordinary softmax only.

        cuDNN builds a plan for each new shape, some hundred milliseconds in all, which pays only if the shape recurs.
        """
        several = (key.shape[2] - plan.prompt_length) // plan.stride > 1  # cuDNN refuses a square of one
        is_plain = plan.uniform and terms.is_plain
        return is_plain and plan.recurring and several and cudnn_takes(query, key, value)

    def takes_prompt_block(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """True if `ops.prompt_block`, which has no gradient, is the fastest way for query (B, H, n, D), key and value
        (B, Hkv, L, D)."""
        graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        is_large = query.shape[2] >= FEWEST_QUERIES
        return is_large and not graded and self.uses_kernels(query) and cudnn_takes(query, key, value)

    def takes_short_block(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """True if `ops.short_block`, which has no gradient, is the fastest way for query (B, H, n, D), key and value
        (B, Hkv, L, D): few queries behind many keys."""
        graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        rows = query.shape[2] * query.shape[1] // key.shape[1]
        is_short = rows <= MOST_SHORT_ROWS and key.shape[2] >= SHORT_SHARE * query.shape[2]
        is_plain = query.dtype in CUDNN_TYPES and not torch.compiler.is_compiling()
        return is_short and is_plain and not graded and self.uses_kernels(query)

    def describe(self) -> list[tuple[str, str]]:
        """(what is computed, by which form and when) on this machine, one line each."""
        if self.naive_only:
            return [("everything", "plain PyTorch, because REFRESHKV_OPS=naive is set")]
        if not torch.cuda.is_available():
            return [("everything", "plain PyTorch, because torch sees no CUDA device")]
        uniform = "fixed schedule, no padding, 16 bits"
        return [
            ("float64, or tensors on the CPU", "plain PyTorch"),
            ("values of another size than keys", "plain PyTorch, several times slower"),
            ("attention sinks, softcap", "Triton wherever it is named below, also in place of cuDNN; prompts by torch"),
            ("look-ahead queries", "plain PyTorch, for decoding steps, the selection and the positions after a prompt"),
            ("prompt in a cache", f"cuDNN from {FEWEST_QUERIES} tokens on, 16 bits, no padding; else torch's fastest"),
            ("a few tokens behind many", "Triton, which reads the keys once for all of them; 16 bits"),
            ("whole training sequence", f"one cuDNN attention if at most 1/{TAIL_SHARE} of it decodes; {uniform}"),
            ("full steps in training", f"cuDNN if Simulation.recurring; {uniform}; else Triton"),
            (
                "selecting and partial steps in training",
                "Triton; in short segments, several gather their keys together",
            ),
            ("selection in training", "Triton, one program for a full or selecting step"),
            ("decoding steps", "Triton; selections of all layers in one launch, several programs for a row"),
            ("keys and values in host memory", "Triton, over the bus"),
            ("selecting steps in decoding", "Triton, two launches a layer on Hopper; 4-bit score keys by PTX there"),
        ]


def cudnn_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if cuDNN's attention takes these tensors, (B, H, Q, D) and twice (B, Hkv, T, D)."""
    if not query.is_cuda or query.dtype not in CUDNN_TYPES or key.shape[-1] != value.shape[-1]:
        return False
    return can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, True))


CHOICE = Choice.from_environment()
"""The decisions of this process."""


def describe() -> list[tuple[str, str]]:
    """`CHOICE.describe()`: what `refreshkv doctor` prints."""
    return CHOICE.describe()


@lru_cache(maxsize=1)
def _log_once() -> None:
    for what, form in describe():
        logging.getLogger("refreshkv").info("%s: %s", what, form)
