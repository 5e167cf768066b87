"""What a run will need, before it needs it: memory of each GPU, time of a step, and which setting to change if not.

The figures follow from shapes; how close they come is in docs/training.md. Bytes are those of one GPU.

Shapes: `T` a rank's tokens in a micro-batch, `E` hidden size, `F` MLP size, `V` vocabulary.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from refreshkv.train.config import RunConfig
from refreshkv.train.engine import check_batch, read_deepspeed_json
from refreshkv.train.flops import Work, model_work, step_flops
from refreshkv.train.loss import LOGITS_AT_ONCE
from refreshkv.train.simulation import heaviest_simulation

SHARE_OF_MATMUL = 0.6
"""Speed of a whole step over that of one large matrix product, by experience."""
RESERVE = 1.5e9
"""CUDA's own memory, NCCL's buffers, and what the allocator cannot use."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory and time."""

    parameters: int
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    work: Work


def model_shape(model_config: PretrainedConfig) -> Shape:
    """The shape of a configuration's model, made without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    decoder = model_config.get_text_config(decoder=True)
    head = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    return Shape(
        parameters=model.num_parameters(),
        layers=decoder.num_hidden_layers,
        hidden=decoder.hidden_size,
        mlp=decoder.intermediate_size,
        heads=decoder.num_attention_heads,
        kv_heads=decoder.num_key_value_heads,
        head=head,
        vocabulary=decoder.vocab_size,
        work=model_work(model),
    )


def memory_needed(config: RunConfig, shape: Shape, world: int) -> dict[str, float]:
    """Bytes on each of `world` GPUs at the peak of a step, by purpose."""
    zero = read_deepspeed_json(config.training.deepspeed).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    size = 2 if config.training.dtype == "bf16" else 4
    tokens = config.training.micro_batch * config.data.row_length // config.parallel.sequence
    return {
        **_states(config, shape, world, zero, stage, size),
        "activations": _activations(config, shape, tokens, size),
        "logits and loss": _logits(config, shape, tokens, size),
        "refresh workspace": _workspace(config, shape),
        "buffers and CUDA": RESERVE + _buffers(shape, zero, stage, size),
    }


def _states(config: RunConfig, shape: Shape, world: int, zero: dict, stage: int, size: int) -> dict[str, float]:
    count = shape.parameters
    weights = size * count / (world if stage == 3 else 1)
    gradients = size * count / (world if stage >= 2 else 1)
    moments = 2 if config.training.optimizer == "adamw-8bit" else 8
    masters = 4 if size == 2 else 0
    optimizer = (moments + masters) * count / (world if stage >= 1 else 1)
    if zero.get("offload_param", {}).get("device", "none") != "none":
        weights = 0.0
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        optimizer, gradients = 0.0, gradients if stage < 2 else 0.0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def _activations(config: RunConfig, shape: Shape, tokens: int, size: int) -> float:
    """With recomputation each layer's input and one layer's inner tensors, else those of all layers."""
    query, key_value = shape.heads * shape.head, 2 * shape.kv_heads * shape.head
    inner = 6 * shape.hidden + 3 * (query + key_value) + 4 * shape.mlp
    layer = size * tokens * inner
    if not config.training.activation_checkpointing:
        return layer * shape.layers
    inputs = size * tokens * shape.hidden * (0 if config.training.activation_offload else shape.layers)
    return inputs + 2 * layer  # its gradients take as much again


def _logits(config: RunConfig, shape: Shape, tokens: int, size: int) -> float:
    distilled = config.distillation.weight > 0
    if config.training.loss == "logits":
        return tokens * shape.vocabulary * (2 * size + 8) * (3 if distilled else 1)
    at_once = min(tokens * shape.vocabulary, LOGITS_AT_ONCE)
    weight = shape.hidden * shape.vocabulary
    needed = at_once * (4 + 2 * size) + weight * (4 + 2 * size) + 2 * size * tokens * shape.hidden
    # the teacher's hidden states, and in float32 its chunk of logits, both sides' logarithms and the gradient
    return needed + (2 * size * tokens * shape.hidden + 16 * at_once if distilled else 0.0)


def _workspace(config: RunConfig, shape: Shape) -> float:
    """Selections, float32 gradients of keys and values, outputs and their gradients; of this rank's share of heads."""
    simulation = heaviest_simulation(config)
    if simulation is None:
        return 0.0
    length, prompt, rows = config.data.row_length, simulation.prompt_length, config.training.micro_batch
    checks = 1 + (length - prompt) // simulation.config.stride
    width = min(simulation.config.largest_budget(prompt), length)
    selections = 8 * checks * width * shape.kv_heads
    tensors = length * shape.head * (8 * shape.kv_heads + 3 * shape.heads)
    return rows * (selections + tensors) / config.parallel.sequence


def _buffers(shape: Shape, zero: dict, stage: int, size: int) -> float:
    bucket = size * min(float(zero.get("reduce_bucket_size", 5e8)), shape.parameters)
    if stage == 3:
        live = size * min(float(zero.get("stage3_max_live_parameters", 1e9)), shape.parameters)
        group = 8 * min(float(zero.get("sub_group_size", 1e9)), shape.parameters)  # the optimizer's, one at a time
        return bucket + live + (0 if "offload_optimizer" in zero else group)
    gather = size * min(float(zero.get("allgather_bucket_size", 5e8)), shape.parameters)
    return 2 * bucket + gather if stage else 0.0


def matmul_rate(device: torch.device, dtype: str) -> float:
    """Operations per second of a large matrix product here."""
    size, repeat = (8192, 20) if device.type == "cuda" else (1024, 3)
    kind = torch.bfloat16 if dtype == "bf16" and device.type == "cuda" else torch.float32
    factor = torch.randn(size, size, device=device, dtype=kind)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    factor @ factor
    wait()
    began = time.perf_counter()
    for _ in range(repeat):
        factor @ factor
    wait()
    return repeat * 2 * size**3 / (time.perf_counter() - began)


def step_seconds(config: RunConfig, shape: Shape, world: int, rate: float) -> float:
    """Time of one optimizer step on GPUs of which each makes `rate` operations per second in a matrix product."""
    simulation, distilled = heaviest_simulation(config), config.distillation.weight > 0
    work = step_flops(shape.work, config.training.global_batch, config.data.row_length, simulation, distilled)
    recomputed = 4 / 3 if config.training.activation_checkpointing else 1.0
    return work * recomputed / (world * rate * SHARE_OF_MATMUL)


def _set(name: str, value: Any) -> Callable[[RunConfig], None]:
    return lambda config: setattr(config.training, name, value)


def _halve_micro_batch(config: RunConfig) -> None:
    config.training.micro_batch //= 2


def _double_sequence(config: RunConfig) -> None:
    config.parallel.sequence *= 2


def changes(config: RunConfig, shape: Shape, world: int) -> list[tuple[str, Callable[[RunConfig], None]]]:
    """Settings that would lower the memory, the cheapest first, with what applies them."""
    training, found = config.training, []
    if training.loss == "logits":
        found.append(("training.loss=chunked", _set("loss", "chunked")))
    if training.micro_batch > 1:
        found.append((f"training.micro_batch={training.micro_batch // 2}", _halve_micro_batch))
    if not training.activation_checkpointing:
        found.append(("training.activation_checkpointing=true", _set("activation_checkpointing", True)))
    for name in ("zero2", "zero3"):
        path = f"configs/deepspeed/{name}.json"
        if world > 1 and f"zero{_stage(config)}" < name:
            found.append((f"training.deepspeed={path}", _set("deepspeed", path)))
    sequence = config.parallel.sequence * 2
    if world % sequence == 0 and shape.heads % sequence == 0 and config.data.row_length % sequence == 0:
        found.append((f"parallel.sequence={sequence}", _double_sequence))
    if not training.activation_offload:
        found.append(("training.activation_offload=true", _set("activation_offload", True)))
    if training.optimizer == "adamw":
        found.append(("training.optimizer=adamw-8bit", _set("optimizer", "adamw-8bit")))
    path = "configs/deepspeed/zero3-offload.json"
    if training.deepspeed != path:
        found.append((f"training.deepspeed={path}", _set("deepspeed", path)))
    return found


def _stage(config: RunConfig) -> int:
    return read_deepspeed_json(config.training.deepspeed).get("zero_optimization", {}).get("stage", 0)


def advice(config: RunConfig, shape: Shape, world: int, available: float) -> str | None:
    """Settings with which the run fits into `available` bytes a GPU; None if no known ones do."""
    config, made = deepcopy(config), []
    for text, apply in changes(config, shape, world):
        before = deepcopy(config)
        apply(config)
        if sum(memory_needed(config, shape, world).values()) >= sum(memory_needed(before, shape, world).values()):
            config = before
            continue
        made.append(text)
        needed = sum(memory_needed(config, shape, world).values())
        if needed <= available:
            return f"{' '.join(made)} (then {needed / 1e9:.1f} GB)"
    return None


def report(config: RunConfig, model_config: PretrainedConfig, world: int, available: float | None, rate: float) -> str:
    """What `--dry-run` prints. available: bytes of a GPU, None if there is none to ask; rate: see `matmul_rate`."""
    shape = model_shape(model_config)
    needs = memory_needed(config, shape, world)
    total, simulation = sum(needs.values()), heaviest_simulation(config)
    kind = "full attention" if simulation is None else f"at most P={simulation.prompt_length:,}, K="
    if simulation is not None:
        kind += f"{simulation.config.largest_budget(simulation.prompt_length):,}"
    lines = [
        f"model       {shape.parameters:,} parameters, {shape.layers} layers, {config.training.dtype}",
        f"job         {world} GPUs, {config.parallel.sequence} per row, ZeRO {_stage(config)}, "
        f"{check_batch(config, world)} micro-batches of {config.training.micro_batch} a step",
        f"rows        {config.data.row_length:,} tokens, {config.simulation.pattern}: {kind}",
        f"step        about {step_seconds(config, shape, world, rate):,.2f} s at this device's "
        f"{rate / 1e12:,.1f} TFLOP/s in matrix products",
        "memory      of each GPU, GB",
        *(f"  {name:20}{value / 1e9:8.2f}" for name, value in needs.items()),
        f"  {'together':20}{total / 1e9:8.2f}",
    ]
    return "\n".join([*lines, _verdict(config, shape, world, total, available)])


def _verdict(config: RunConfig, shape: Shape, world: int, total: float, available: float | None) -> str:
    if available is None:
        return "fits        not known: there is no GPU here; give its size with --gpu-memory GB"
    if total <= available:
        return f"fits        yes: {available / 1e9:.1f} GB a GPU, {(available - total) / 1e9:.1f} GB left"
    change = advice(config, shape, world, available)
    way_out = f"set {change}" if change else "take more GPUs: no setting is enough"
    return f"fits        no: {available / 1e9:.1f} GB a GPU; {way_out}"
