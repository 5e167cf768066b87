"""Next-token loss, in total and by the kind of position that predicts: full or partial; with it the self-distillation.

The model's output layer computes it (`attach_loss`), so that all its logits need never be held at once: those of 128K
tokens and a vocabulary of 128K would be 67 GB in float32.

Shapes: `B` rows, `T` positions, `N` positions whose losses count, `E` hidden size, `V` vocabulary.
"""

from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from refreshkv.config import Simulation
from refreshkv.settings import SettingsError
from refreshkv.train.distillation import DistillationConfig, divergence, divergence_and_gradient, without_dropout

LossKind = Literal["chunked", "liger", "logits"]

LOGITS_AT_ONCE = 1 << 27
"""Logits that the chunked loss holds in float32 at the same time: 512 MiB."""

POSTPROCESSED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale")
"""Fields of configurations whose models do more to logits than their output layer does."""


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; averages are taken once all ranks' sums are known."""

    objective: Tensor
    """What is minimised, the only differentiable one: the losses, and the weighted divergences of a distillation."""
    total: Tensor
    """Next-token losses."""
    tokens: Tensor
    partial: Tensor
    partial_tokens: Tensor
    divergence: Tensor
    """From the full-attention pass, of the tokens after the prompt."""
    divergence_tokens: Tensor


def attach_loss(model: PreTrainedModel, kind: LossKind, distillation: DistillationConfig | None = None) -> None:
    """Lets `model(ids, targets=..., counted=..., partial=..., decoded=..., **other)` return `LossSums`.

    targets (B, T) int64: each position's next token. counted (N,) int64: places in the flattened (B, T) whose losses
    count. partial, decoded (B, T) bool: which positions predict from the small cache, and which come after the prompt.
    kind: how the sums are taken, see `TrainingConfig.loss`. Other calls stay the same.

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
    head.distillation = distillation or DistillationConfig()
    ordinary = model.forward

    def forward(self: PreTrainedModel, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return ordinary(*args, **kwargs)
        masks = {name: kwargs.pop(name) for name in ("counted", "partial", "decoded")}
        head, teacher = self.get_output_embeddings(), None
        if head.distillation.weight and kwargs.get("refresh") is not None:
            with torch.no_grad(), without_dropout(self.base_model):
                teacher = self.base_model(*args, **{**kwargs, "refresh": None}).last_hidden_state
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        return head(hidden, targets, **masks, teacher=teacher)

    model.forward = MethodType(forward, model)


class _LossHead(nn.Linear):
    """An output layer that gives logits, or given targets the sums of their losses.

    Inside the module's own forward pass, where ZeRO-3 has its weight in one piece.
    """

    loss_kind: LossKind
    distillation: DistillationConfig

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        counted: Tensor | None = None,
        partial: Tensor | None = None,
        decoded: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Any:
        if targets is None:
            return super().forward(hidden)
        # places and not a mask, of which the host would have to wait to know how many they are
        hidden, targets, partial, decoded = (
            part.flatten(0, 1).index_select(0, counted) for part in (hidden, targets, partial, decoded)
        )
        if self.loss_kind == "liger":
            return tuple(_liger_sums(hidden, self.weight, self.bias, targets, partial))
        taught = None
        if teacher is not None:
            taught = decoded.nonzero().squeeze(1)
            teacher = teacher.flatten(0, 1).index_select(0, counted[taught])
        if self.loss_kind == "logits":
            logits = _at_least_float(super().forward(hidden))
            losses, divergences = F.cross_entropy(logits, targets, reduction="none"), logits.new_zeros(0)
            if teacher is not None:
                wanted = _at_least_float(super().forward(teacher)).detach()
                divergences = divergence(logits[taught], wanted, self.distillation.temperature)
            objective = losses.sum() + self.distillation.weight * divergences.sum()
        else:
            objective, losses, divergences = _ChunkedLoss.apply(
                hidden, self.weight, self.bias, targets, teacher, taught, self.distillation
            )
        return tuple(_sums(objective, losses.detach(), partial, divergences.detach()))


def _sums(objective: Tensor, losses: Tensor, partial: Tensor, divergences: Tensor) -> LossSums:
    losses, divergences = losses.float(), divergences.float()
    tokens, taught = (values.new_full((), len(values)) for values in (losses, divergences))
    parts = losses.where(partial, 0.0).sum(), partial.sum().float()
    return LossSums(objective, losses.sum(), tokens, *parts, divergences.sum(), taught)


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _ChunkedLoss(torch.autograd.Function):
    """The objective of targets (N,) under hidden (N, E) and an output layer; each loss (N,) and divergence (M,).

    teacher (M, E), taught (M,) int64: the full-attention pass's hidden states of some of the N rows, in their order.

    The gradients are taken on the way, a chunk of positions at a time, since the logits would be needed again for
    them; backward scales them. Losses and divergences one by one, float32, are not differentiable.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, teacher, taught, distillation):
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden) if wanted[0] else None
        # sums over many chunks: not in bfloat16
        weight_grad = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        bias_grad = torch.zeros(bias.shape, dtype=wide, device=bias.device) if wanted[2] else None
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        divergences = losses.new_empty(0 if teacher is None else len(teacher))
        chunk = max(1, LOGITS_AT_ONCE // weight.shape[0])
        starts = range(0, len(targets), chunk)
        bounds = [0] * (len(starts) + 1) if teacher is None else _bounds(taught, starts, len(targets))
        for number, start in enumerate(starts):
            rows, lessons = slice(start, start + chunk), slice(bounds[number], bounds[number + 1])
            logits = F.linear(hidden[rows], weight, bias).to(wide)
            target = targets[rows, None]
            if lessons.stop > lessons.start:
                own = taught[lessons] - start
                wished = F.linear(teacher[lessons], weight, bias).to(wide)
                divergences[lessons], pull = divergence_and_gradient(logits[own], wished, distillation.temperature)
            largest = logits.logsumexp(dim=1, keepdim=True)
            losses[rows] = (largest - logits.gather(1, target)).squeeze(1)
            if not any(wanted):
                continue
            probabilities = logits.sub_(largest).exp_()
            error = probabilities.scatter_add_(1, target, torch.full_like(largest, -1.0))
            if lessons.stop > lessons.start:
                error.index_add_(0, own, pull, alpha=distillation.weight)
            if wanted[2]:
                bias_grad += error.sum(dim=0)
            error = error.to(hidden.dtype)
            if wanted[0]:
                hidden_grad[rows] = error @ weight
            if wanted[1]:
                weight_grad += error.T @ hidden[rows]
        ctx.save_for_backward(*(grad for grad in (hidden_grad, weight_grad, bias_grad) if grad is not None))
        ctx.wanted = wanted
        ctx.mark_non_differentiable(losses, divergences)
        return losses.sum() + distillation.weight * divergences.sum(), losses, divergences

    @staticmethod
    def backward(ctx, upstream, *_):
        saved = iter(ctx.saved_tensors)
        hidden, weight, bias = (next(saved) * upstream if wanted else None for wanted in ctx.wanted)
        weight = None if weight is None else weight.to(ctx.dtypes[0])
        bias = None if bias is None else bias.to(ctx.dtypes[1])
        return hidden, weight, bias, None, None, None, None


def _bounds(taught: Tensor, starts: range, end: int) -> list[int]:
    """Where each chunk's rows begin among the rows `taught`, and where the last one's end."""
    edges = torch.tensor([*starts, end], device=taught.device)
    return torch.searchsorted(taught, edges).tolist()


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
    total, tokens = parts[0] + parts[1], torch.full((), float(len(targets)), device=hidden.device)
    none = torch.zeros_like(tokens)
    return LossSums(total, total.detach().float(), tokens, parts[1].detach().float(), partial.sum().float(), none, none)


def partial_positions(simulation: Simulation | None, positions: Tensor) -> Tensor:
    """Which of `positions` (any shape, int64) are decoded from the small cache in every layer: bool.

    Under the similarity schedule layers differ at the checks, so a check does not count as partial.
    """
    if simulation is None:
        return torch.zeros_like(positions, dtype=torch.bool)
    step = positions - (simulation.prompt_length - 1)
    return (step > 0) & (step % simulation.config.stride != 0)


def decoded_positions(simulation: Simulation | None, positions: Tensor) -> Tensor:
    """Which of `positions` (any shape, int64) come after the prompt: bool."""
    if simulation is None:
        return torch.zeros_like(positions, dtype=torch.bool)
    return positions >= simulation.prompt_length


def answer_targets(prompt_length: Tensor, answer_length: Tensor, length: int) -> Tensor:
    """Which positions predict a token of the answers of rows of tasks: (B,) and (B,) int64 -> (B, length) bool."""
    target = torch.arange(1, length + 1, device=prompt_length.device)
    begin, end = prompt_length[:, None], (prompt_length + answer_length)[:, None]
    return (target >= begin) & (target < end)
