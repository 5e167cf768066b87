"""The kernels of a selecting step of decoding, microseconds a layer, beside those of a partial and of a full step.

    python benchmarks/selecting.py [--cases 32768:1,131072:1,32768:8,16384:32] [--bits 4] [--heads 32] ...

A case is CONTEXT:BATCH. Keys, values and queries are random; each layer has its own, so that they do not all stay in
the L2 cache. Times are medians of CUDA graph replays over all layers. `idle` are the same launches at a step that is
not a selecting one. The table at the end also has the least times that the memory's bandwidth allows: `bound` for the
score keys of the launch before it, or for the chosen keys and values. Needs a GPU; tests/ops/test_selecting_kernels.py
tests the kernels without one.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from measuring import copy_bandwidth, free_memory, milliseconds
from refreshkv import NEVER
from refreshkv.ops.selection.score_keys import ScoreKeys, write_score_keys
from refreshkv.ops.state import LayerState, SelectionOptions, SelectionScratch, StepOptions
from refreshkv.ops.step.launches import attend_and_rank
from refreshkv.ops.step.selecting import launches as selecting
from refreshkv.ops.step.selecting.state import SelectingCache, SelectingOptions, SelectingScratch
from refreshkv.tables import column_table

SHAPE = {"layers": 32, "heads": 32, "kv-heads": 8, "head-dim": 128}
"""Llama-3.1-8B's."""

SELECTION = SelectionOptions(pool_kernel=7, observation_window=1, recent_window=0, sink_tokens=0)

LARGEST_CACHES = 40e9
"""Bytes of keys and values of all layers: fewer layers where they would be more."""


@dataclass
class Layer:
    """One layer's caches and the token of its step."""

    token: tuple[Tensor, Tensor, Tensor]
    cache: SelectingCache
    state: LayerState
    selection_scratch: SelectionScratch


@dataclass
class Case:
    """The layers of one case and what they share."""

    layers: list[Layer]
    length: Tensor
    """() int64: of the caches. `merge` counts the token in `counter` instead, so that all layers step alike."""
    counter: Tensor
    scratch: SelectingScratch
    output: Tensor
    scaling: float


def make_case(context: int, batch: int, args: argparse.Namespace, device: str = "cuda") -> Case:
    """The step at position `context`, one after a prompt whose last position was a full step."""
    capacity, budget = context + 64, context // 8
    bytes_of_layer = 4 * batch * args.kv_heads * capacity * args.head_dim
    count = max(4, min(args.layers, int(LARGEST_CACHES / bytes_of_layer)))
    row_state = torch.tensor([[context - 1, budget, 0, context]] * batch, device=device)
    length = torch.tensor(context, device=device)

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, args.head_dim, device=device, dtype=torch.bfloat16)

    layers = []
    for _ in range(count):
        keys, values = random(args.kv_heads, capacity), random(args.kv_heads, capacity)
        score_keys = ScoreKeys.empty(keys, args.bits)
        write_score_keys(keys, score_keys, 0)
        cache = SelectingCache(keys, values, score_keys, length, row_state, random(args.heads, 1))
        selected = torch.rand(batch, args.kv_heads, context, device=device).topk(budget, sorted=False).indices.int()
        mean_query = torch.zeros(batch, args.head_dim, device=device)
        full_steps = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        state = LayerState(
            keys, values, length, row_state, selected, selected, mean_query, cache.observers, full_steps
        )  # fmt: skip
        token = (random(args.heads, 1), random(args.kv_heads, 1), random(args.kv_heads, 1))
        selection_scratch = SelectionScratch.empty((batch,), args.kv_heads, capacity, args.head_dim, keys.device)
        layers.append(Layer(token, cache, state, selection_scratch))
    output = torch.empty(batch, 1, args.heads, args.head_dim, device=device, dtype=torch.bfloat16)
    scratch = SelectingScratch.empty(layers[0].cache.keys, layers[0].cache.observers)
    return Case(layers, length, length.clone(), scratch, output, args.head_dim**-0.5)


def options(select_stride: int = 1) -> SelectingOptions:
    return SelectingOptions(
        NEVER,
        select_stride,
        SELECTION.pool_kernel,
        SELECTION.pool_ahead,
        SELECTION.recent_window,
        SELECTION.sink_tokens,
    )


def score(case: Case, layer: Layer, select_stride: int = 1, **tile) -> None:
    selecting.score(*layer.token, layer.cache, case.scratch, options(select_stride), case.scaling, **tile)


def rank(case: Case, layer: Layer, **tile) -> None:
    selecting.rank(layer.cache, case.scratch, options(), **tile)


def find_threshold(case: Case, layer: Layer, **tile) -> None:
    selecting.find_threshold(layer.cache, case.scratch, options(), **tile)


def rank_alone(case: Case, layer: Layer, **tile) -> None:
    """Ranks the last layer's logits once more."""
    case.scratch.histogram.zero_()
    rank(case, layer, **tile)


def threshold_alone(case: Case, layer: Layer, **tile) -> None:
    case.scratch.counters.zero_()
    find_threshold(case, layer, **tile)


def attend(case: Case, layer: Layer, **tile) -> tuple[Tensor, Tensor, Tensor]:
    return selecting.attend(layer.token[0], layer.cache, case.scratch, case.scaling, **tile)


def whole_step(case: Case, layer: Layer, select_stride: int = 1) -> None:
    score(case, layer, select_stride)
    rank(case, layer)
    find_threshold(case, layer)
    selecting.merge(*attend(case, layer), case.output, case.counter, case.scratch)


def other_step(case: Case, layer: Layer, stride: int) -> None:
    """A full step if stride is 1, else a partial one, without the selection at the step's end."""
    step = StepOptions(stride, None, SELECTION)
    attend_and_rank(*layer.token, layer.state, layer.selection_scratch, step, case.scaling)
    case.length.copy_(case.counter)


def per_layer(case: Case, work: Callable[[Case, Layer], object], repeat: int = 9) -> float:
    """Median of graph replays over all layers, microseconds each."""
    work(case, case.layers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in case.layers:
            work(case, layer)
    graph.replay()
    return round(milliseconds(graph.replay, repeat) * 1e3 / len(case.layers), 2)


def time_case(context: int, batch: int, args: argparse.Namespace) -> dict[str, object]:
    case = make_case(context, batch, args)
    zeros = per_layer(case, lambda case, layer: case.scratch.counters.zero_())
    copy = per_layer(case, lambda case, layer: case.length.copy_(case.counter))
    bandwidth = args.bandwidth
    tokens = batch * args.kv_heads * context
    score_bytes = tokens * (args.head_dim * args.bits / 8 + 4)
    result = {
        "case": f"{context // 1024}K,{batch}",
        "layers": len(case.layers),
        "score": per_layer(case, score),
        "bound": round(score_bytes / bandwidth * 1e6, 1),
    }
    case.counter.fill_(context)
    score(case, case.layers[0])
    result["rank"] = round(per_layer(case, rank_alone) - zeros, 2)
    result["threshold"] = round(per_layer(case, threshold_alone) - zeros, 2)
    result["attend"] = per_layer(case, attend)
    result["bound "] = round(tokens / 8 * args.head_dim * 4 / bandwidth * 1e6, 1)
    shares = attend(case, case.layers[0])
    result["merge"] = per_layer(
        case, lambda case, layer: selecting.merge(*shares, case.output, case.counter, case.scratch)
    )
    result["selecting step"] = per_layer(case, whole_step)
    result["idle"] = per_layer(case, lambda case, layer: whole_step(case, layer, 7))
    case.counter.fill_(context)
    case.length.fill_(context)
    result["partial step"] = round(per_layer(case, lambda case, layer: other_step(case, layer, NEVER)) - copy, 2)
    result["full step"] = round(per_layer(case, lambda case, layer: other_step(case, layer, 1)) - copy, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="32768:1,131072:1,32768:8,16384:32")
    parser.add_argument("--bits", type=int, default=4, choices=(16, 8, 4))
    for name, size in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch finds none")
    args.bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {args.bandwidth / 1e12:.2f} TB/s", flush=True
    )
    results = []
    for text in args.cases.split(","):
        context, batch = map(int, text.split(":"))
        results.append(time_case(context, batch, args))
        print(results[-1], flush=True)
        free_memory()
    print(column_table([list(results[0]), *([str(value) for value in result.values()] for result in results)]))


if __name__ == "__main__":
    main()
