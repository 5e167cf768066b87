"""The kernels of a selecting step of decoding, microseconds a layer, beside those of a partial and of a full step.

    python benchmarks/selecting.py [--cases 32768:1,131072:1,32768:8,16384:32] [--bits 4] [--heads 32] ...

A case is CONTEXT:BATCH. Keys, values and queries are random; each layer has its own, so that the L2 cache does not
flatter. Times are medians of CUDA graph replays over all layers. `idle` is a step that is not a selecting one, as far
as the selecting step's launches go. Prints a table at the end, with the least that memory allows: score keys for
`score`, chosen keys and values for `attend`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from measuring import free_memory, milliseconds
from output import in_columns
from refreshkv.ops.selection.score_keys import ScoreKeys, write_score_keys
from refreshkv.ops.step import launches, selecting
from refreshkv.ops.step.operators import Check

NEVER = 2**31 - 1
LARGEST_CACHES = 40e9
"""Bytes of keys and values of all layers: fewer layers where they would be more."""


@dataclass
class Layer:
    """One layer's caches and the token of its step."""

    token: list[Tensor]
    keys: Tensor
    values: Tensor
    score_keys: ScoreKeys
    observers: Tensor
    selected: Tensor
    mean_query: Tensor
    check: Check


@dataclass
class Case:
    """The layers of one case and what they share."""

    layers: list[Layer]
    row_state: Tensor
    length: Tensor
    counter: Tensor
    scratch: selecting.SelectingScratch
    output: Tensor
    scaling: float
    context: int


def make_case(context: int, batch: int, args: argparse.Namespace) -> Case:
    """The step at position `context`, one after a prompt whose last position was a full step."""
    capacity, budget = context + 64, context // 8
    bytes_of_layer = 4 * batch * args.kv_heads * capacity * args.head_dim
    count = max(4, min(args.layers, int(LARGEST_CACHES / bytes_of_layer)))

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, args.head_dim, device="cuda", dtype=torch.bfloat16)

    layers = []
    for _ in range(count):
        keys, values = random(args.kv_heads, capacity), random(args.kv_heads, capacity)
        score_keys = ScoreKeys.empty(keys, args.bits)
        write_score_keys(keys, score_keys, 0)
        token = [random(heads, 1) for heads in (args.heads, args.kv_heads, args.kv_heads)]
        selected = torch.rand(batch, args.kv_heads, context, device="cuda").topk(budget, sorted=False).indices
        check = Check.empty((batch,), args.kv_heads, capacity, args.head_dim, keys.device)
        mean_query = torch.zeros(batch, args.head_dim, device="cuda")
        observers = random(args.heads, 1)
        layers.append(Layer(token, keys, values, score_keys, observers, selected.int(), mean_query, check))
    row_state = torch.tensor([[context - 1, budget, 0, context]] * batch, device="cuda")
    output = torch.empty(batch, 1, args.heads, args.head_dim, device="cuda", dtype=torch.bfloat16)
    length, counter = torch.tensor(context, device="cuda"), torch.tensor(context, device="cuda")
    scratch = selecting.SelectingScratch.empty(args.heads, layers[0].keys, 1)
    return Case(layers, row_state, length, counter, scratch, output, args.head_dim**-0.5, context)


def score(case: Case, layer: Layer, select_stride: int = 1, **tile) -> None:
    state = (layer.keys, layer.values, layer.score_keys, case.length, case.row_state, layer.observers, case.scratch)
    selecting.score(*layer.token, *state, stride=NEVER, select_stride=select_stride, scaling=case.scaling, **tile)


def rank(case: Case, layer: Layer, **tile) -> None:
    options = {"pool_kernel": 7, "pool_ahead": False, "recent_window": 0, "sink_tokens": 0}
    selecting.rank(case.row_state, case.scratch, layer.token[0].shape[1] // layer.keys.shape[1], **options, **tile)


def cut(case: Case, layer: Layer, **tile) -> None:
    selecting.cut(case.row_state, case.scratch, layer.token[0].shape[1] // layer.keys.shape[1], 7, **tile)


def rank_alone(case: Case, layer: Layer, **tile) -> None:
    """Ranks the last layer's logits once more."""
    case.scratch.histogram.zero_()
    rank(case, layer, **tile)


def cut_alone(case: Case, layer: Layer, **tile) -> None:
    case.scratch.counters.zero_()
    cut(case, layer, **tile)


def attend(case: Case, layer: Layer, **tile) -> tuple[Tensor, Tensor, Tensor]:
    state = (layer.keys, layer.values, case.row_state, case.scratch)
    return selecting.attend(layer.token[0], *state, case.scaling, **tile)


def whole_step(case: Case, layer: Layer, select_stride: int = 1) -> None:
    score(case, layer, select_stride)
    rank(case, layer)
    cut(case, layer)
    selecting.merge(*attend(case, layer), case.output, case.counter, case.scratch)


def today(case: Case, layer: Layer, stride: int) -> None:
    """A full step if stride is 1, else a partial one, without the selection at the step's end."""
    launches.attend_and_rank(
        *layer.token, layer.keys, layer.values, case.length, case.row_state, layer.selected, layer.mean_query,
        layer.observers, layer.check, stride, None, 7, 1, 0, 0, case.scaling,
    )  # fmt: skip
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
    result["cut"] = round(per_layer(case, cut_alone) - zeros, 2)
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
    result["partial step"] = round(per_layer(case, lambda case, layer: today(case, layer, NEVER)) - copy, 2)
    result["full step"] = round(per_layer(case, lambda case, layer: today(case, layer, 1)) - copy, 2)
    return result


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), 10) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="32768:1,131072:1,32768:8,16384:32")
    parser.add_argument("--bits", type=int, default=4, choices=(16, 8, 4))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
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
    print(in_columns([list(results[0]), *([str(value) for value in result.values()] for result in results)]))


if __name__ == "__main__":
    main()
