"""The report of `--dry-run`: what a run needs, whether it fits, and which settings to change if it does not."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from refreshkv.train.config import RunConfig
from refreshkv.train.experts import router_loss_weight
from refreshkv.train.job import Job
from refreshkv.train.memory import memory_needed
from refreshkv.train.simulation import heaviest_simulation
from refreshkv.train.step_time import step_seconds

SHARES = {0.0: "false", 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", True: "true"}
"""Shares of recomputed layers that may be advised -> how a user writes them."""


def report(job: Job, available: float | None, rate: float) -> str:
    """The text that `--dry-run` prints.

    available: bytes of a GPU, None if there is no GPU here. rate: of `train.step_time.matmul_rate`.
    """
    config, needs = job.config, memory_needed(job)
    total, simulation = sum(needs.values()), heaviest_simulation(config)
    kind = "full attention" if simulation is None else f"at most P={simulation.prompt_length:,}, K="
    if simulation is not None:
        kind += f"{simulation.config.largest_budget(simulation.prompt_length):,}"
        if simulation.config.select_stride is not None:
            kind += f", selecting at least every {simulation.config.select_stride} tokens"
    lines = [
        f"model       {_parameters(job)}, {job.shape.layers} layers, {config.training.dtype}{_trained(job)}",
        f"job         {job.world} GPUs, {job.sequence_parallel_size} per row, ZeRO {job.zero_stage}, "
        f"{job.micro_batches} micro-batches of {config.training.micro_batch} a step",
        f"rows        {config.data.row_length:,} tokens, {config.simulation.pattern}: {kind}",
        f"step        about {step_seconds(job, rate):,.2f} s at this device's "
        f"{rate / 1e12:,.1f} TFLOP/s in matrix products",
        "memory      of each GPU, GB",
        *(f"  {name:20}{value / 1e9:8.2f}" for name, value in needs.items()),
        f"  {'together':20}{total / 1e9:8.2f}",
    ]
    return "\n".join([*lines, _verdict(job, total, available)])


def _trained(job: Job) -> str:
    """What the report says of adapters and 4-bit weights; nothing where all weights are trained."""
    adapter = job.config.training.adapter
    if job.shape.adapters is None or adapter is None:
        return ""
    packed = f", linear layers in {job.packed}" if job.packed else ""
    return f"{packed}; {job.shape.adapters.trained:,} trained (rank {adapter.rank})"


def _parameters(job: Job) -> str:
    shape = job.shape
    if not shape.experts:
        return f"{shape.parameters:,} parameters"
    weight = router_loss_weight(job.model_config)
    routers = f"load-balancing loss times {weight:g}" if weight else "no load-balancing loss (output_router_logits)"
    return f"{shape.parameters:,} parameters, {shape.active:,} active a token, {routers}"


def _verdict(job: Job, total: float, available: float | None) -> str:
    if available is None:
        return "fits        not known: there is no GPU here; give its size with --gpu-memory GB"
    if total <= available:
        left = f"fits        yes: {available / 1e9:.1f} GB a GPU, {(available - total) / 1e9:.1f} GB left"
        return left + _fewer_recomputed(job, available)
    change = advice(job, available)
    way_out = f"set {change}" if change else "take more GPUs: no setting is enough"
    return f"fits        no: {available / 1e9:.1f} GB a GPU; {way_out}"


def _fewer_recomputed(job: Job, available: float) -> str:
    """Names the least share of recomputed layers that fits, if that is less than the run's."""
    training = job.config.training
    for share, text in SHARES.items():
        if share >= training.activation_checkpointing or (share == 0 and training.activation_offload):
            continue
        needed = _total(_with(job, _set("activation_checkpointing", share)))
        if needed <= available:
            return f"; faster: training.activation_checkpointing={text} ({needed / 1e9:.1f} GB)"
    return ""


def advice(job: Job, available: float) -> str | None:
    """Settings with which the run fits into `available` bytes a GPU; None if no known ones do."""
    found = {}
    for text, apply in changes(job):
        changed = _with(job, apply)
        if _total(changed) >= _total(job):
            continue
        job = changed
        found[text.split("=")[0]] = text  # a later change of the same setting replaces an earlier one
        needed = _total(job)
        if needed <= available:
            return f"{' '.join(found.values())} (then {needed / 1e9:.1f} GB)"
    return None


def changes(job: Job) -> list[tuple[str, Callable[[RunConfig], None]]]:
    """Settings that would lower the memory, cheapest first: how a user writes them, and a function that sets them."""
    training, found = job.config.training, []
    if training.loss == "logits":
        found.append(("training.loss=chunked", _set("loss", "chunked")))
    if training.micro_batch % 2 == 0:
        half = training.micro_batch // 2
        found.append((f"training.micro_batch={half}", _set("micro_batch", half)))
    for share, text in SHARES.items():
        if share > training.activation_checkpointing:
            found.append((f"training.activation_checkpointing={text}", _set("activation_checkpointing", share)))
    for stage in (2, 3):
        name = f"zero{stage}"
        if job.world > 1 and job.zero_stage < stage:
            found.append((f"training.deepspeed={name}", _set("deepspeed", name)))
    size = job.sequence_parallel_size * 2
    if job.world % size == 0 and job.shape.heads % size == 0 and job.config.data.row_length % size == 0:
        found.append((f"parallel.sequence={size}", _set_sequence_parallel_size(size)))
    if not training.activation_offload:
        found.append(("training.activation_offload=true", _set("activation_offload", True)))
    if training.optimizer == "adamw":
        found.append(("training.optimizer=adamw-8bit", _set("optimizer", "adamw-8bit")))
    if Path(training.deepspeed).stem != "zero3-offload":
        found.append(("training.deepspeed=zero3-offload", _set("deepspeed", "zero3-offload")))
    return found


def _set(name: str, value: Any) -> Callable[[RunConfig], None]:
    return lambda config: setattr(config.training, name, value)


def _set_sequence_parallel_size(size: int) -> Callable[[RunConfig], None]:
    return lambda config: setattr(config.parallel, "sequence", size)


def _with(job: Job, apply: Callable[[RunConfig], None]) -> Job:
    """The job after one of `changes`; `job` itself stays as it is."""
    config = deepcopy(job.config)
    apply(config)
    return job.with_settings(config)


def _total(job: Job) -> float:
    """Bytes on each GPU, all purposes together."""
    return sum(memory_needed(job).values())
