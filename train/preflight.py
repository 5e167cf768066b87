"""What a run will need, before it needs it: memory of each GPU, time of a step, and which setting to change if not.

The figures follow from shapes; how close they come is in docs/training.md. Bytes are those of one GPU.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from refreshkv.train.config import RunConfig
from refreshkv.train.engine import check_batch, read_deepspeed_json
from refreshkv.train.flops import Work, model_work, step_flops
from refreshkv.train.loss import LOGITS_AT_ONCE
from refreshkv.train.recomputation import recomputed_layers
from refreshkv.train.simulation import heaviest_simulation

PRODUCTS, ATTENTION, DECODED = 0.65, 0.65, 0.2
"""Speeds over that of one large matrix product, as measured (benchmarks/training.py): a model's products together with
all that is done to their results, dense attention, and attention of the rows after a prompt."""
MEMORY_BYTE, EXCHANGE_BYTE = 200, 10_000
"""Operations of a large matrix product in the time that takes a byte from or to memory, or from GPU to GPU; ZeRO is far
from what the links carry."""
UPDATE = 100
"""Bytes that gradient norm, clipping, AdamW and rounding read and write for a parameter."""
RESERVE = 1.5e9
"""CUDA's own memory, NCCL's buffers, and what the allocator cannot use."""
OUTSIDE = "CUDA and NCCL"
"""The only purpose in `memory_needed` that torch's allocator knows nothing of."""


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
    """Bytes on each of `world` GPUs at the peak of a step, by purpose.

    The peak is the largest of three moments: the loss, the backward pass of the last layer, the optimizer's step.
    """
    zero = read_deepspeed_json(config.training.deepspeed).get("zero_optimization", {})
    stage, size = zero.get("stage", 0), 2 if config.training.dtype == "bf16" else 4
    kept, layer = _activations(config, shape, size)
    passing = {"gathered weights": _gathered(shape, zero, stage, size), "activations": kept}
    moments = [
        {**passing, "logits and loss": _logits(config, shape, size)},
        {**passing, "a layer's backward": layer},
        {"optimizer's step": _step(config, shape, world, zero, stage)},
    ]
    return {
        **_states(config, shape, world, zero, stage, size),
        "reduction buckets": _buckets(shape, zero, stage, size),
        **max(moments, key=lambda moment: sum(moment.values())),
        OUTSIDE: RESERVE,
    }


def allocated(needs: dict[str, float]) -> float:
    """Of `memory_needed`, what `torch.cuda.max_memory_allocated` counts."""
    return sum(needs.values()) - needs[OUTSIDE]


def _states(config: RunConfig, shape: Shape, world: int, zero: dict, stage: int, size: int) -> dict[str, float]:
    count = shape.parameters
    weights = size * count / (world if stage == 3 else 1)
    gradients = size * count / (world if stage >= 2 else 1)
    moments = 2 if config.training.optimizer == "adamw-8bit" else 8
    masters = 4 if size == 2 or stage else 0  # ZeRO keeps its own float32 copy of float32 weights, too
    optimizer = (moments + masters) * count / (world if stage >= 1 else 1)
    if _offloads(zero, "param"):
        weights = 0.0
    if _offloads(zero, "optimizer"):
        optimizer, gradients = 0.0, gradients if stage < 2 else 0.0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def _offloads(zero: dict, what: str) -> bool:
    return zero.get(f"offload_{what}", {}).get("device", "none") != "none"


def _tokens(config: RunConfig) -> float:
    """Of a rank, in a micro-batch."""
    return config.training.micro_batch * config.data.row_length / config.parallel.sequence


def _activations(config: RunConfig, shape: Shape, size: int) -> tuple[float, float]:
    """What all layers keep from the forward pass, and what the backward pass of one takes besides.

    A recomputed layer keeps its input. At its turn the activations of a kept one after it are gone.
    """
    recomputed = sum(recomputed_layers(shape.layers, config.training.activation_checkpointing))
    inputs = recomputed * size * shape.hidden * _tokens(config)
    layer = _layer_activations(config, shape, size)
    # gradients: of the layer's output, the MLP's product, and its two factors; the product itself is gone by then.
    # Liger writes those of the factors over them.
    mlp = 1 if config.training.kernels == "liger" else 2
    backward = size * (shape.hidden + mlp * shape.mlp) * _tokens(config)
    kept = (0.0 if config.training.activation_offload else inputs) + (shape.layers - recomputed) * layer
    return kept, backward + (layer if recomputed == shape.layers else 0.0)


def _layer_activations(config: RunConfig, shape: Shape, size: int) -> float:
    """What one layer saves for its backward pass."""
    liger = config.training.kernels == "liger"
    query, key_value = shape.heads * shape.head, 2 * shape.kv_heads * shape.head
    # two norms: input and output; without Liger the input in float32, and scaled
    norms = 2 * shape.hidden * (2 * size if liger else 4 + 2 * size)
    # query, keys, values, output; across GPUs the output as heads and as columns
    attention = size * (2 * query + key_value + (query if config.parallel.sequence > 1 else 0))
    # gate, up, product; without Liger the gate's activation
    mlp = size * shape.mlp * (3 if liger else 4)
    return (norms + attention + mlp) * _tokens(config) + _refresh(config, shape, size)


def _refresh(config: RunConfig, shape: Shape, size: int) -> float:
    """What the refresh pattern saves besides: the output in two parts, prompt and decoded rows, and the selections."""
    simulation = heaviest_simulation(config)
    if simulation is None:
        return 0.0
    length, prompt = config.data.row_length, simulation.prompt_length
    checks = 1 + (length - prompt) // simulation.config.stride
    width = min(simulation.config.largest_budget(prompt), length)
    heads = max(1, shape.kv_heads // config.parallel.sequence)
    selections = 4 * checks * width * heads * config.training.micro_batch
    return size * shape.heads * shape.head * _tokens(config) + selections


def _logits(config: RunConfig, shape: Shape, size: int) -> float:
    """The loss with its gradients, and what the last norm saves."""
    distilled, tokens = config.distillation.weight > 0, _tokens(config)
    norm = tokens * shape.hidden * (size if config.training.kernels == "liger" else 4 + size)
    if config.training.loss == "logits":
        return norm + tokens * shape.vocabulary * (2 * size + 8) * (3 if distilled else 1)
    at_once = min(tokens * shape.vocabulary, LOGITS_AT_ONCE)
    weight = shape.hidden * shape.vocabulary
    # forward: the float32 sum of the weight's gradient, what a chunk adds to it, the chunk's logits and their gradient
    forward = weight * (4 + size) + at_once * (4 + size)
    if distilled:  # of the chunk, the teacher's logits, both sides' logarithms and the gradient
        forward += 16 * at_once + size * tokens * shape.hidden
    backward = weight * (4 + 4 + size)  # the sum, scaled, rounded
    return norm + 2 * size * tokens * shape.hidden + max(forward, backward)


def _gathered(shape: Shape, zero: dict, stage: int, size: int) -> float:
    """Stage 3 fetches weights ahead, and keeps those that are used again soon, up to a limit."""
    live = min(float(zero.get("stage3_max_live_parameters", 1e9)), shape.parameters)
    return size * live if stage == 3 else 0.0


def _buckets(shape: Shape, zero: dict, stage: int, size: int) -> float:
    """Gradients on their way to other GPUs: at stage 3 one buffer, below it two, and one for weights afterwards."""
    bucket = size * float(zero.get("reduce_bucket_size", 5e8))
    if stage == 3:
        return bucket
    gather = size * min(float(zero.get("allgather_bucket_size", 5e8)), shape.parameters)
    return 2 * min(bucket, size * shape.parameters) + gather if stage else 0.0


def _step(config: RunConfig, shape: Shape, world: int, zero: dict, stage: int) -> float:
    """Of the parameters that are updated at a time: gradients in float32, and AdamW's roots of the second moment."""
    if _offloads(zero, "optimizer"):
        return 0.0
    count = shape.parameters / (world if stage else 1)
    if stage == 3:
        count = min(count, float(zero.get("sub_group_size", 1e9)))
    return count * (8 if config.training.optimizer == "adamw" else 4)


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
    rows, length, simulation = config.training.global_batch, config.data.row_length, heaviest_simulation(config)
    attention = replace(shape.work, weights=0)
    products = step_flops(replace(shape.work, windows=[]), rows, length, None) / PRODUCTS
    decoded = 0.0
    if simulation is not None:
        refreshed = replace(attention, windows=[window for window in shape.work.windows if window is None])
        decoded = step_flops(refreshed, rows, length, simulation)
        decoded -= step_flops(refreshed, rows, simulation.prompt_length, None)
    dense = step_flops(attention, rows, length, simulation) - decoded
    share = sum(recomputed_layers(shape.layers, config.training.activation_checkpointing)) / shape.layers
    executed = (products + dense / ATTENTION + decoded / DECODED) * (1 + share / 3)
    if config.distillation.weight > 0 and simulation is not None:
        executed += (products + step_flops(attention, rows, length, None) / ATTENTION) / 3  # the teacher's pass
    return (executed / world + _moved(config, shape, world)) / rate


def _moved(config: RunConfig, shape: Shape, world: int) -> float:
    """Weights and gradients between the GPUs, and the optimizer's step: in operations of the same duration."""
    stage, size = _stage(config), 2 if config.training.dtype == "bf16" else 4
    # stage 3 fetches the weights forward and backward, and reduces gradients, for every micro-batch
    passes = check_batch(config, world) if stage == 3 else 1
    exchanged = 3 * passes * size * shape.parameters * (world - 1) / world
    updated = UPDATE * shape.parameters / (world if stage else 1)
    return EXCHANGE_BYTE * exchanged + MEMORY_BYTE * updated


SHARES = {0.0: "false", 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", True: "true"}
"""Shares of recomputed layers to advise, as they are written."""


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
    for share, text in SHARES.items():
        if share > training.activation_checkpointing:
            found.append((f"training.activation_checkpointing={text}", _set("activation_checkpointing", share)))
    for name in ("zero2", "zero3"):
        if world > 1 and f"zero{_stage(config)}" < name:
            found.append((f"training.deepspeed={name}", _set("deepspeed", name)))
    sequence = config.parallel.sequence * 2
    if world % sequence == 0 and shape.heads % sequence == 0 and config.data.row_length % sequence == 0:
        found.append((f"parallel.sequence={sequence}", _double_sequence))
    if not training.activation_offload:
        found.append(("training.activation_offload=true", _set("activation_offload", True)))
    if training.optimizer == "adamw":
        found.append(("training.optimizer=adamw-8bit", _set("optimizer", "adamw-8bit")))
    if Path(training.deepspeed).stem != "zero3-offload":
        found.append(("training.deepspeed=zero3-offload", _set("deepspeed", "zero3-offload")))
    return found


def _stage(config: RunConfig) -> int:
    return read_deepspeed_json(config.training.deepspeed).get("zero_optimization", {}).get("stage", 0)


def advice(config: RunConfig, shape: Shape, world: int, available: float) -> str | None:
    """Settings with which the run fits into `available` bytes a GPU; None if no known ones do."""
    config, made = deepcopy(config), {}
    for text, apply in changes(config, shape, world):
        before = deepcopy(config)
        apply(config)
        if sum(memory_needed(config, shape, world).values()) >= sum(memory_needed(before, shape, world).values()):
            config = before
            continue
        made[text.split("=")[0]] = text  # a setting may be changed further
        needed = sum(memory_needed(config, shape, world).values())
        if needed <= available:
            return f"{' '.join(made.values())} (then {needed / 1e9:.1f} GB)"
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
        left = f"fits        yes: {available / 1e9:.1f} GB a GPU, {(available - total) / 1e9:.1f} GB left"
        return left + _fewer_recomputed(config, shape, world, available)
    change = advice(config, shape, world, available)
    way_out = f"set {change}" if change else "take more GPUs: no setting is enough"
    return f"fits        no: {available / 1e9:.1f} GB a GPU; {way_out}"


def _fewer_recomputed(config: RunConfig, shape: Shape, world: int, available: float) -> str:
    """The least share of recomputed layers that fits, too."""
    for share, text in SHARES.items():
        other = deepcopy(config)
        other.training.activation_checkpointing = share
        if share == 0 and other.training.activation_offload:
            continue
        needed = sum(memory_needed(other, shape, world).values())
        if share < config.training.activation_checkpointing and needed <= available:
            return f"; faster: training.activation_checkpointing={text} ({needed / 1e9:.1f} GB)"
    return ""
