"""One optimizer step over all ranks."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from refreshkv.config import Simulation, Trace
from refreshkv.train.batch import Batch
from refreshkv.train.loss import LossSums


class NotFinite(ArithmeticError):
    """A loss or a gradient is infinite or nan; `str()` is "loss" or "gradient"."""


def train_step(
    engine,
    batches: list[Batch],
    simulation: Simulation | None,
    sequence_parallel_size: int = 1,
    note: Callable[[str], None] = lambda doing: None,
    trace: Trace | None = None,
) -> dict[str, float]:
    """Takes one optimizer step; returns its figures by name, equal on all ranks.

    The loss is the mean over the counted tokens of all ranks, however many each rank has.

    Args:
        engine: DeepSpeed's engine of a `CausalLossModel`.
        batches: this rank's micro-batches.
        sequence_parallel_size: ranks that share each row.
        note: called with a description of the current work, as a sign of progress.
        trace: receives the full steps of this rank's last micro-batch.

    Raises `NotFinite` on all ranks. If the loss is not finite, the optimizer step is not taken.
    """
    sums = backward(engine, batches, simulation, sequence_parallel_size, note, trace)
    total, count, partial, partial_count, divergence, divergence_count, look_ahead = sums
    note("an optimizer step")
    if not math.isfinite(total + divergence + look_ahead):
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
    if divergence_count:
        values["divergence"] = divergence / divergence_count
    if look_ahead:
        values["look-ahead divergence"] = look_ahead / count
    return values


def backward(
    engine,
    batches: list[Batch],
    simulation: Simulation | None,
    sequence_parallel_size: int,
    note: Callable[[str], None],
    trace: Trace | None = None,
) -> list[float]:
    """Computes the gradients of the mean objective over the counted tokens of all ranks, without an optimizer step.

    Returns the `LossSums`, summed over all ranks, without the objective.
    """
    engine.train()
    tokens = torch.stack([batch.counted.sum() for batch in batches]).sum().float()
    dist.all_reduce(tokens)
    totals = torch.zeros(len(LossSums._fields) - 1, device=engine.device)
    arguments = [batch.model_arguments(simulation, sequence_parallel_size > 1, trace) for batch in batches]
    for index, micro_batch in enumerate(arguments):
        note(f"micro-batch {index + 1} of {len(batches)}")
        sums = LossSums(*engine(**micro_batch))
        scale = gradient_scale(engine, sequence_parallel_size) / tokens.clamp(min=1)
        engine.backward(sums.objective * scale, scale_wrt_gas=False)
        totals += torch.stack([part.detach().float() for part in sums[1:]])
        if index < len(batches) - 1:
            engine.step()
    dist.all_reduce(totals)
    return totals.tolist()


def gradient_scale(engine, sequence_parallel_size: int) -> float:
    """The number of ranks over which DeepSpeed averages gradients: all ranks at ZeRO stage 3, below it one rank of each
    row. The objective is multiplied by this number, so that the average becomes a sum."""
    world = dist.get_world_size()
    return world if engine.zero_optimization_stage() == 3 else world / sequence_parallel_size


def step_and_norm(engine) -> float:
    """Takes the optimizer step; returns the norm of its gradients before clipping."""
    if (
        engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled()
    ):  # no DeepSpeed optimizer computes the norm
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm())
