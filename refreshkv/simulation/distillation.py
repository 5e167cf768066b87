"""Self-distillation: the model's predictions from the small cache are trained towards its full-attention predictions.

Both come from the same weights in the same step. The full-attention pass is the teacher and gets no gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from refreshkv.ranges import Range, validate_numbers


@dataclass
class DistillationConfig:
    """Adds the divergence of the two predictions to the loss of each decoded token, at the cost of one more forward
    pass."""

    weight: float = 0.0
    """Weight of the divergence; the next-token loss has weight 1. 0 for no distillation."""
    temperature: float = 1.0
    """Divides the logits of both predictions. The divergence is multiplied by its square, so that the gradients keep
    their size."""

    def __post_init__(self) -> None:
        validate_numbers(self, {"weight": Range(0, 1000), "temperature": Range(1e-4, 1e4)}, "distillation.")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student's distribution from the teacher's, times the squared temperature: (N,).

    student, teacher: logits (N, V).
    """
    student, teacher = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1) * temperature**2


def divergence_and_gradient(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`divergence`, (N,), and its gradient with respect to the student's logits, (N, V)."""
    student, teacher = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
    probabilities = teacher.exp()
    found = teacher.sub_(student).mul_(probabilities).sum(dim=1) * temperature**2
    return found, student.exp_().sub_(probabilities).mul_(temperature)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Turns dropout off while the block runs, because the teacher must not predict with a random mask.

    The model stays in training mode, because only in that mode do ranks share rows.
    """
    active = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True
