"""Memory that a run needs on each GPU, in bytes by purpose, from the shapes of the model and of DeepSpeed's buffers."""

from refreshkv.train.chunked_loss import LOGITS_AT_ONCE, logit_softcap
from refreshkv.train.config import RunConfig
from refreshkv.train.deepspeed_json import offloads
from refreshkv.train.job import Job
from refreshkv.train.recomputation import recomputed_layers
from refreshkv.train.simulation import heaviest_simulation

RESERVE = 1.5e9
"""Bytes of CUDA itself, of NCCL's buffers, and of what the allocator cannot use."""
SHORT_SEGMENTS, TILE_ROWS = 3, 64
"""So many segments fit into a tile of so many rows where their keys are listed together (refreshkv/ops/rows)."""
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: its code, the 8-bit scale of 64 weights, and the float32 scale of 256 such scales."""
OUTSIDE = "CUDA and NCCL"
"""The one purpose in `memory_needed` that torch's allocator does not count."""


def memory_needed(job: Job) -> dict[str, float]:
    """Bytes on each GPU at the peak of a step, by purpose.

    The peak is the largest of three moments: the loss, the backward pass of the last layer, the optimizer's step.
    """
    kept, layer = _activations(job)
    in_backward = {"gathered weights": _gathered(job), "activations": kept}
    moments = [
        {**in_backward, "logits and loss": _logits(job)},
        {**in_backward, "a layer's backward": layer},
        {"optimizer's step": _step(job)},
    ]
    return {
        **_states(job),
        "reduction buckets": _buckets(job),
        **max(moments, key=lambda moment: sum(moment.values())),
        OUTSIDE: RESERVE,
    }


def allocated(needs: dict[str, float]) -> float:
    """The part of `memory_needed` that `torch.cuda.max_memory_allocated` counts."""
    return sum(needs.values()) - needs[OUTSIDE]


def _number_size(config: RunConfig) -> int:
    """Bytes of a number in the model's computation."""
    return 2 if config.training.dtype == "bf16" else 4


def _zero(job: Job) -> dict:
    return job.deepspeed.get("zero_optimization", {})


def _states(job: Job) -> dict[str, float]:
    """Weights, gradients, and the optimizer's master weights and moments."""
    stage, count, size = job.zero_stage, job.shape.trained, _number_size(job.config)
    weights = _weights(job) / (job.world if stage == 3 else 1)
    gradients = size * count / (job.world if stage >= 2 else 1)
    moments = 2 if job.config.training.optimizer == "adamw-8bit" else 8
    masters = 4 if size == 2 or stage else 0  # ZeRO makes a float32 copy of float32 weights, too
    optimizer = (moments + masters) * count / (job.world if stage >= 1 else 1)
    if offloads(job.deepspeed, "param"):
        weights = 0.0
    if offloads(job.deepspeed, "optimizer"):
        optimizer, gradients = 0.0, gradients if stage < 2 else 0.0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def _weights(job: Job) -> float:
    """The weights of the whole model, those of adapters included."""
    shape, size = job.shape, _number_size(job.config)
    adapters = 0 if shape.adapters is None else shape.adapters.trained
    packed = shape.packable if job.packed else 0
    return size * (shape.parameters + adapters - packed) + NF4_BYTES * packed


def _tokens(job: Job) -> float:
    """Tokens of a rank in a micro-batch."""
    config = job.config
    return config.training.micro_batch * config.data.row_length / job.sequence_parallel_size


def _activations(job: Job) -> tuple[float, float]:
    """What all layers keep from the forward pass, and what the backward pass of one layer takes besides.

    A recomputed layer keeps its input. When it is recomputed, the layers after it have released their activations.
    """
    training, shape, size = job.config.training, job.shape, _number_size(job.config)
    recomputed = sum(recomputed_layers(shape.layers, training.activation_checkpointing))
    inputs = recomputed * size * shape.hidden * _tokens(job)
    layer = _layer_activations(job)
    # gradients of the layer's output, of the MLP's product, and of its two factors, by when the product is released;
    # Liger writes the gradients of the factors over the factors
    mlp = 1 if training.kernels == "liger" else 2
    backward = size * (shape.hidden + mlp * shape.mlp) * _tokens(job)
    kept = (0.0 if training.activation_offload else inputs) + (shape.layers - recomputed) * layer
    # a layer of 4-bit weights is multiplied in the run's precision; the largest one is a matrix of the MLP
    unpacked = size * shape.hidden * shape.mlp if job.packed else 0
    return kept, backward + unpacked + (layer if recomputed == shape.layers else 0.0)


def _layer_activations(job: Job) -> float:
    """What one layer saves for its backward pass."""
    shape, size, liger = job.shape, _number_size(job.config), job.config.training.kernels == "liger"
    query, key_value = shape.heads * shape.head, 2 * shape.kv_heads * shape.head
    # two norms: input and output; without Liger also the input in float32, and scaled
    norms = 2 * shape.hidden * (2 * size if liger else 4 + 2 * size)
    # query, keys, values, output; under sequence parallelism the output twice, as heads and as columns
    attention = size * (2 * query + key_value + (query if job.sequence_parallel_size > 1 else 0))
    # gate, up, product; without Liger also the gate's activation
    mlp = size * shape.mlp * (3 if liger else 4)
    mlp += 2 * size * shape.hidden * shape.experts  # each expert's copy of the token, and its output
    adapters = 0.0 if shape.adapters is None else size * shape.adapters.kept / shape.layers
    return (norms + attention + mlp + adapters) * _tokens(job) + _refresh(job)


def _refresh(job: Job) -> float:
    """What the refresh pattern saves besides: the output in two parts (prompt and decoded rows), and the selections."""
    simulation = heaviest_simulation(job.config)
    if simulation is None:
        return 0.0
    length, prompt_length = job.config.data.row_length, simulation.prompt_length
    decoded, select_stride = length - prompt_length, simulation.config.select_stride
    selections = 1 + decoded // simulation.config.stride + (decoded // select_stride if select_stride else 0)
    width = min(simulation.config.largest_budget(prompt_length), length)
    kv_heads = max(1, job.shape.kv_heads // job.sequence_parallel_size)
    interval, group = min(simulation.config.stride, select_stride or decoded), job.shape.heads // job.shape.kv_heads
    numbers = 2 if interval * group * SHORT_SEGMENTS <= TILE_ROWS else 1  # a list holds each key with its mask
    selected = 4 * numbers * selections * width * kv_heads * job.config.training.micro_batch
    return _number_size(job.config) * job.shape.heads * job.shape.head * _tokens(job) + selected


def _logits(job: Job) -> float:
    """The loss with its gradients, and what the last norm saves."""
    training, shape, size, tokens = job.config.training, job.shape, _number_size(job.config), _tokens(job)
    distilled = job.config.distillation.weight > 0
    slope = 0 if logit_softcap(job.model_config) is None else 4  # float32: what the gradient of a softcap needs
    norm = tokens * shape.hidden * (size if training.kernels == "liger" else 4 + size)
    if training.loss == "logits":
        return norm + tokens * shape.vocabulary * ((2 * size + 8) * (3 if distilled else 1) + slope)
    at_once = min(tokens * shape.vocabulary, LOGITS_AT_ONCE)
    weight = shape.hidden * shape.vocabulary
    is_trained = shape.adapters is None  # adapters leave the output layer's weight as it is
    # forward: the float32 sum of the weight's gradient, what a chunk adds to it, the chunk's logits and as much again;
    # with a teacher the chunk's logits, a copy, the teacher's, the logarithms of both sides, and the probabilities
    forward = (weight * (4 + size) if is_trained else 0) + at_once * ((24 if distilled else 8) + slope)
    forward += size * tokens * shape.hidden if distilled else 0
    backward = weight * (4 + 4 + size) if is_trained else 0.0  # the sum, the scaled sum, the rounded one
    return norm + 2 * size * tokens * shape.hidden + max(forward, backward)


def _gathered(job: Job) -> float:
    """Stage 3 fetches weights ahead, and keeps those that are used again soon, up to a limit."""
    live = min(float(_zero(job).get("stage3_max_live_parameters", 1e9)), job.shape.parameters)
    return _number_size(job.config) * live if job.zero_stage == 3 else 0.0


def _buckets(job: Job) -> float:
    """Buffers of gradients that are sent to other GPUs: one at stage 3, two below, which gather weights in a third."""
    zero, size, count = _zero(job), _number_size(job.config), job.shape.trained
    bucket = size * float(zero.get("reduce_bucket_size", 5e8))
    if job.zero_stage == 3:
        return bucket
    gather = size * min(float(zero.get("allgather_bucket_size", 5e8)), count)
    return 2 * min(bucket, size * count) + gather if job.zero_stage else 0.0


def _step(job: Job) -> float:
    """Float32 gradients, and AdamW's roots of the second moment, of the parameters that are updated at a time."""
    if offloads(job.deepspeed, "optimizer"):
        return 0.0
    count = job.shape.trained / (job.world if job.zero_stage else 1)
    if job.zero_stage == 3:
        count = min(count, float(_zero(job).get("sub_group_size", 1e9)))
    return count * (8 if job.config.training.optimizer == "adamw" else 4)
