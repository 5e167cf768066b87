"""Self-distillation: what the model predicts from the small cache is drawn to what it predicts under full attention.

Both come from the same weights in the same step; the full-attention pass is the teacher and gets no gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from refreshkv.settings import SettingsError


@dataclass
class DistillationConfig:
    """Adds `weight` times the divergence of the two predictions to each decoded token's loss. Costs a forward pass."""

    weight: float = 0.0
    """Of the divergence, where the next-token loss has 1; 0 for none."""
    temperature: float = 1.0
    """Divides both sides' logits. The divergence is multiplied by its square, so that the gradients keep their size."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise SettingsError(f"distillation.weight must not be negative, got {self.weight}")
        if not self.temperature > 0:
            raise SettingsError(f"distillation.temperature must be more than 0, got {self.temperature}")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student's prediction from the teacher's, times the squared temperature.

    student, teacher: logits (N, V) -> (N,).
    """
    student, teacher = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1) * temperature**2


def divergence_and_gradient(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`divergence`, (N,), and its gradient with respect to the student's logits, (N, V)."""
    student, teacher = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
    wanted = teacher.exp()
    found = (wanted * (teacher - student)).sum(dim=1) * temperature**2
    return found, student.exp_().sub_(wanted).mul_(temperature)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The teacher predicts as the model will, not with a mask of its own. The model itself stays in training mode, in
    which processes share their rows."""
    active = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True
