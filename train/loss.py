"""Next-token loss, in total and by the kind of position that predicts: full or partial.

The model's output layer computes it (`attach_loss`), so that all its logits need never be held at once: those of 128K
tokens and a vocabulary of 128K would be 67 GB in float32.

Shapes: `B` rows, `T` positions, `N` positions whose losses count, `E` hidden size, `V` vocabulary.
"""

from contextlib import nullcontext
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from refreshkv.config import Simulation
from refreshkv.settings import SettingsError
from refreshkv.train.offload import layer_inputs_on_cpu

LossKind = Literal["chunked", "liger", "logits"]

LOGITS_AT_ONCE = 1 << 27
"""Logits that the chunked loss holds in float32 at the same time: 512 MiB."""

POSTPROCESSED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale")
"""Fields of configurations whose models do more to logits than their output layer does."""


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; averages are taken once all ranks' sums are known."""

    total: Tensor
    """The only differentiable one."""
    tokens: Tensor
    partial: Tensor
    partial_tokens: Tensor


def attach_loss(model: PreTrainedModel, kind: LossKind, offload: bool = False) -> None:
    """Lets `model(ids, targets=..., counted=..., partial=..., **other)` return `LossSums`; other calls stay the same.

    targets (B, T) int64: each position's next token. counted, partial (B, T) bool: whose losses count, and which of
    them predict from the small cache. kind: how the sums are taken, see `TrainingConfig.loss`. offload: see
    `TrainingConfig.activation_offload`.

    Raises `SettingsError` if the output layer alone does not make the model's logits, or the kind's library is missing.
    """
    head = model.get_output_embeddings()
    decoder = model.config.get_text_config(decoder=True)
    changed = [name for name in POSTPROCESSED if getattr(decoder, name, None) not in (None, 1, 1.0)]
    if type(head) is not nn.Linear or changed:
        reason = f"config.{changed[0]} changes its logits" if changed else "its output layer is not linear"
        raise SettingsError(f"training: losses of {type(model).__name__} cannot be computed here: {reason}")
    if kind == "liger":
        _liger()
    head.__class__ = _LossHead  # the parameters, their names and what hangs on the module stay
    head.loss_kind = kind
    ordinary = model.forward

    def forward(self: PreTrainedModel, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return ordinary(*args, **kwargs)
        counted, partial = kwargs.pop("counted"), kwargs.pop("partial")
        with layer_inputs_on_cpu(decoder.hidden_size) if offload else nullcontext():
            hidden = self.base_model(*args, **kwargs).last_hidden_state
        return self.get_output_embeddings()(hidden, targets, counted, partial)

    model.forward = MethodType(forward, model)


class _LossHead(nn.Linear):
    """An output layer that gives logits, or given targets the sums of their losses.

    Inside the module's own forward pass, where ZeRO-3 has its weight in one piece.
    """

    loss_kind: LossKind

    def forward(self, hidden: Tensor, targets: Tensor | None = None, counted=None, partial=None) -> Any:
        if targets is None:
            return super().forward(hidden)
        hidden, targets, partial = hidden[counted], targets[counted], partial[counted]
        if self.loss_kind == "liger":
            return tuple(_liger_sums(hidden, self.weight, self.bias, targets, partial))
        if self.loss_kind == "logits":
            losses = F.cross_entropy(_at_least_float(super().forward(hidden)), targets, reduction="none")
            total = losses.sum()
        else:
            total, losses = _ChunkedLoss.apply(hidden, self.weight, self.bias, targets)
        return tuple(_sums(total, losses.detach(), partial))


def _sums(total: Tensor, losses: Tensor, partial: Tensor) -> LossSums:
    count = torch.tensor(float(len(losses)), device=losses.device)
    return LossSums(total, count, losses[partial].sum().float(), partial.sum().float())


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses of targets (N,) under hidden (N, E) and an output layer, and each loss (N,), float32.

    The gradients are taken on the way, a chunk of positions at a time, since the logits would be needed again for
    them; backward scales them. The losses one by one are not differentiable.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden) if wanted[0] else None
        # sums over many chunks: not in bfloat16
        weight_grad = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        bias_grad = torch.zeros(bias.shape, dtype=wide, device=bias.device) if wanted[2] else None
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        chunk = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight, bias).to(wide)
            largest = logits.logsumexp(dim=1, keepdim=True)
            target = targets[rows, None]
            losses[rows] = (largest - logits.gather(1, target)).squeeze(1)
            if not any(wanted):
                continue
            probabilities = logits.sub_(largest).exp_()
            error = probabilities.scatter_add_(1, target, torch.full_like(largest, -1.0))
            if wanted[2]:
                bias_grad += error.sum(dim=0)
            error = error.to(hidden.dtype)
            if wanted[0]:
                hidden_grad[rows] = error @ weight
            if wanted[1]:
                weight_grad += error.T @ hidden[rows]
        ctx.save_for_backward(*(grad for grad in (hidden_grad, weight_grad, bias_grad) if grad is not None))
        ctx.wanted = wanted
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, upstream, _):
        saved = iter(ctx.saved_tensors)
        hidden, weight, bias = (next(saved) * upstream if wanted else None for wanted in ctx.wanted)
        weight = None if weight is None else weight.to(ctx.dtypes[0])
        bias = None if bias is None else bias.to(ctx.dtypes[1])
        return None if hidden is None else hidden, weight, bias, None


def _liger() -> Any:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        raise SettingsError(
            "training.loss=liger needs the package liger-kernel: pip install 'refreshkv[gpu]', or set "
            "training.loss=chunked"
        ) from None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")


def _liger_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, partial: Tensor) -> LossSums:
    """The same by Liger's kernels, which give one sum a call: so a call for each kind of position."""
    loss = _liger()
    parts = []
    for rows in (~partial, partial):
        own = hidden[rows]
        # no rows still need a gradient, of zeros: ZeRO waits for one of every parameter
        parts.append(loss(weight, own, targets[rows], bias) if len(own) else 0.0 * (weight.sum() + own.sum()))
    count = torch.tensor(float(len(targets)), device=hidden.device)
    return LossSums(parts[0] + parts[1], count, parts[1].detach().float(), partial.sum().float())


def partial_positions(simulation: Simulation | None, positions: Tensor) -> Tensor:
    """Which of `positions` (any shape, int64) are decoded from the small cache in every layer: bool.

    Under the similarity schedule layers differ at the checks, so a check does not count as partial.
    """
    if simulation is None:
        return torch.zeros_like(positions, dtype=torch.bool)
    step = positions - (simulation.prompt_length - 1)
    return (step > 0) & (step % simulation.config.stride != 0)


def answer_targets(prompt_length: Tensor, answer_length: Tensor, length: int) -> Tensor:
    """Which positions predict a token of the answers of rows of tasks: (B,) and (B,) int64 -> (B, length) bool."""
    target = torch.arange(1, length + 1, device=prompt_length.device)
    begin, end = prompt_length[:, None], (prompt_length + answer_length)[:, None]
    return (target >= begin) & (target < end)
