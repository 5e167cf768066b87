"""Time that a training step should take, from its operations and the speed of a large matrix product."""

import time
from dataclasses import replace

import torch

from refreshkv.train.flops import step_flops
from refreshkv.train.job import Job
from refreshkv.train.recomputation import recomputed_layers
from refreshkv.train.simulation import heaviest_simulation

PRODUCTS, ATTENTION, DECODED = 0.65, 0.65, 0.2
"""Measured speeds (benchmarks/training.py) as shares of the speed of one large matrix product: a model's products
together with the elementwise work on their results; dense attention; attention of the rows after a prompt."""
MEMORY_BYTE, EXCHANGE_BYTE = 200, 10_000
"""Operations of a large matrix product in the time that one byte takes: from or to memory, and from GPU to GPU. The
second is far below what the links can carry; ZeRO reaches no more."""
UPDATE = 100
"""Bytes that gradient norm, clipping, AdamW and rounding read and write for a parameter."""


def matmul_rate(device: torch.device, dtype: str) -> float:
    """Operations per second of a large matrix product on this device. dtype: `TrainingConfig.dtype`."""
    size, repeat = (8192, 20) if device.type == "cuda" else (1024, 3)
    kind = torch.bfloat16 if dtype == "bf16" and device.type == "cuda" else torch.float32
    factor = torch.randn(size, size, device=device, dtype=kind)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.matmul(factor, factor)
    wait()
    began = time.perf_counter()
    for _ in range(repeat):
        torch.matmul(factor, factor)
    wait()
    return repeat * 2 * size**3 / (time.perf_counter() - began)


def step_seconds(job: Job, rate: float) -> float:
    """Seconds of one optimizer step on GPUs that each make `rate` operations per second in a matrix product."""
    config, shape = job.config, job.shape
    rows, length, simulation = config.training.global_batch, config.data.row_length, heaviest_simulation(config)
    attention = replace(shape.work, weights=0, frozen=0)
    products = step_flops(replace(shape.work, windows=[]), rows, length, None) / PRODUCTS
    decoded = 0.0
    if simulation is not None:
        refreshed = replace(attention, windows=[window for window in shape.work.windows if window is None])
        decoded = step_flops(refreshed, rows, length, simulation)
        decoded -= step_flops(refreshed, rows, simulation.prompt_length, None)
    dense = step_flops(attention, rows, length, simulation) - decoded
    share = sum(recomputed_layers(shape.layers, config.training.activation_checkpointing)) / shape.layers
    forward = step_flops(replace(shape.work, windows=[], frozen=0), rows, length, None) / PRODUCTS / 3
    executed = products + share * forward + (dense / ATTENTION + decoded / DECODED) * (1 + share / 3)
    if config.distillation.weight > 0 and simulation is not None:
        executed += forward + step_flops(attention, rows, length, None) / ATTENTION / 3  # the teacher's forward pass
    return (executed / job.world + _transfers(job)) / rate


def _transfers(job: Job) -> float:
    """Weights and gradients between the GPUs, and the optimizer's step, as operations that take the same time."""
    stage, size, world = job.zero_stage, 2 if job.config.training.dtype == "bf16" else 4, job.world
    trained = job.shape.trained
    # stage 3 fetches the weights forward and backward, and reduces gradients, for every micro-batch
    numbers = job.micro_batches * (2 * job.shape.parameters + trained) if stage == 3 else 3 * trained
    exchanged = size * numbers * (world - 1) / world
    updated = UPDATE * trained / (world if stage else 1)
    return EXCHANGE_BYTE * exchanged + MEMORY_BYTE * updated
