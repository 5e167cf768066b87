"""One optimizer step over all ranks."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from refreshkv.config import Simulation
from refreshkv.train.batch import Batch
from refreshkv.train.loss import LossSums


class NotFinite(ArithmeticError):
    """A loss or a gradient is infinite or no number; `str()` says which."""


def train_step(
    engine,
    batches: list[Batch],
    simulation: Simulation | None,
    sequence: int = 1,
    note: Callable[[str], None] = lambda doing: None,
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; returns its values, equal on all ranks.

    The loss is the mean over the counted tokens of all ranks, whatever their share of each. sequence: processes that
    share a row. note: told about progress. Raises `NotFinite` on all ranks, for a loss before the step is taken.
    """
    total, count, partial, partial_count, divergence, taught = backward(engine, batches, simulation, sequence, note)
    note("an optimizer step")
    if not math.isfinite(total + divergence):
        raise NotFinite("loss")
    norm = step_and_norm(engine)
    if not math.isfinite(norm):
        raise NotFinite("gradient")
    full_count = count - partial_count
    values = {
        "loss": total / count,
        "loss full": (total - partial) / full_count if full_count else math.nan,
        "loss partial": partial / partial_count if partial_count else math.nan,
        "grad norm": norm,
        "tokens": count,
    }
    return {**values, "divergence": divergence / taught} if taught else values


def backward(
    engine, batches: list[Batch], simulation: Simulation | None, sequence: int, note: Callable[[str], None]
) -> list[float]:
    """Gradients of the mean objective over all ranks' counted tokens, not yet stepped; returns all ranks' `LossSums`.

    All but the objective, which the others make.
    """
    engine.train()
    tokens = sum(batch.counted.sum() for batch in batches).float()
    dist.all_reduce(tokens)
    totals = torch.zeros(len(LossSums._fields) - 1, device=engine.device)
    arguments = [batch.model_arguments(simulation, sequence > 1) for batch in batches]
    for index, micro_batch in enumerate(arguments):
        note(f"micro-batch {index + 1} of {len(batches)}")
        sums = LossSums(*engine(**micro_batch))
        engine.backward(sums.objective * (gradient_scale(engine, sequence) / tokens.clamp(min=1)), scale_wrt_gas=False)
        totals += torch.stack([part.detach().float() for part in sums[1:]])
        if index < len(batches) - 1:
            engine.step()
    dist.all_reduce(totals)
    return totals.tolist()


def gradient_scale(engine, sequence: int) -> float:
    """What undoes DeepSpeed's averaging: over ranks, but below stage 3 over the ranks of one column only."""
    world = dist.get_world_size()
    return world if engine.zero_optimization_stage() == 3 else world / sequence


def step_and_norm(engine) -> float:
    """Takes the optimizer step; returns the norm of its gradients before clipping."""
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():  # no DeepSpeed optimizer to ask
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm())
