"""The training loss from hidden states, a chunk of positions at a time.

The logits of a whole row never exist at once: those of 128K tokens and a vocabulary of 128K would take 67 GB in
float32.

Shapes: `N` positions whose losses count, `M` of these that have a teacher, `E` hidden size, `V` vocabulary.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.ops.state import SoftmaxTerms
from refreshkv.simulation.distillation import divergence_and_gradient

LOGITS_AT_ONCE = 1 << 27
"""Logits that exist in float32 at the same time: 512 MiB."""


class ChunkedLoss(torch.autograd.Function):
    """The objective of hidden states (N, E) under an output layer (V, E), each loss (N,) and each divergence (M,).

    teacher (M, E): hidden states of the full-attention pass; teacher_rows (M,) int64: which of the N positions they
    belong to, ascending. softcap: bound of the logits, None without one.

    The forward pass computes the gradients too, one chunk of positions at a time, since a backward pass would need the
    logits again; the backward pass only scales them. The losses and divergences that it returns beside the objective
    are float32 and carry no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, teacher, teacher_rows, distillation, softcap=None):
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        losses = torch.empty(len(targets), dtype=gradients.dtype, device=hidden.device)
        divergences = losses.new_empty(0 if teacher is None else len(teacher))
        chunk_length = max(1, LOGITS_AT_ONCE // weight.shape[0])
        starts = range(0, len(targets), chunk_length)
        bounds = _chunk_bounds(teacher_rows, starts, len(targets))
        for start, (first, last) in zip(starts, pairwise(bounds), strict=True):
            chunk, teacher_chunk = slice(start, start + chunk_length), slice(first, last)
            logits = capped(F.linear(hidden[chunk], weight, bias).to(gradients.dtype), softcap)
            slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1)
            kl_grad = rows = None
            if last > first:
                assert teacher is not None  # no position has a teacher otherwise
                rows = teacher_rows[teacher_chunk] - start
                teacher_logits = capped(F.linear(teacher[teacher_chunk], weight, bias).to(gradients.dtype), softcap)
                divergences[teacher_chunk], kl_grad = divergence_and_gradient(
                    logits[rows], teacher_logits, distillation.temperature
                )
            target = targets[chunk, None]
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            losses[chunk] = (log_sum - logits.gather(1, target)).squeeze(1)
            if gradients.wanted:
                # d loss / d logits: the probabilities, less 1 at the target
                logits_grad = logits.sub_(log_sum).exp_().scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                if kl_grad is not None and rows is not None:
                    logits_grad.index_add_(0, rows, kl_grad, alpha=distillation.weight)
                if slope is not None:
                    logits_grad.mul_(slope)
                gradients.add(chunk, logits_grad, hidden[chunk], weight)
        gradients.save(ctx)
        ctx.mark_non_differentiable(losses, divergences)
        return losses.sum() + distillation.weight * divergences.sum(), losses, divergences

    @staticmethod
    def backward(ctx, upstream, *_):
        saved = iter(ctx.saved_tensors)
        # the sums over chunks are float32, the parameters' gradients have the parameters' dtype
        scaled = [None if dtype is None else (next(saved) * upstream).to(dtype) for dtype in ctx.gradient_dtypes]
        return (*scaled, None, None, None, None, None)


def logit_softcap(config: PretrainedConfig) -> float | None:
    """The bound of a model's logits, None without one."""
    return getattr(config.get_text_config(decoder=True), "final_logit_softcapping", None)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits of the output layer under a softcap; None: the logits as they are."""
    return SoftmaxTerms(softcap=softcap).cap(logits)


class _Gradients:
    """Gradients of the objective with respect to hidden states, weight and bias, summed over chunks in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]):
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.dtypes = [
            part.dtype if need and part is not None else None
            for part, need in zip((hidden, weight, bias), needed, strict=True)
        ]
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        # these are sums over many chunks: bfloat16 would lose the later ones
        self.weight = torch.zeros_like(weight, dtype=self.dtype) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=self.dtype) if needed[2] and bias is not None else None

    @property
    def wanted(self) -> bool:
        """Whether any gradient is needed."""
        return any(dtype is not None for dtype in self.dtypes)

    def add(self, chunk: slice, logits_grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds one chunk: its logits' gradient (n, V) and its hidden states (n, E)."""
        if self.bias is not None:
            self.bias += logits_grad.sum(dim=0)
        logits_grad = logits_grad.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = logits_grad @ weight
        if self.weight is not None:
            self.weight += logits_grad.T @ hidden

    def save(self, ctx: Any) -> None:
        """Keeps the gradients for the backward pass."""
        found = (self.hidden, self.weight, self.bias)
        ctx.save_for_backward(*(gradient for gradient in found if gradient is not None))
        ctx.gradient_dtypes = self.dtypes


def _chunk_bounds(teacher_rows: Tensor | None, starts: range, end: int) -> list[int]:
    """Indices into `teacher_rows` at which the chunks that begin at `starts` begin, and the last chunk's end."""
    if teacher_rows is None:
        return [0] * (len(starts) + 1)
    edges = torch.tensor([*starts, end], device=teacher_rows.device)
    return torch.searchsorted(teacher_rows, edges).tolist()
