"""The kernels of a selecting step of decoding, microseconds a layer, beside those of a partial and of a full step.

    python benchmarks/selecting.py [--cases 32768:1,131072:1,32768:8,16384:32] [--bits 4] [--pool-kernel 2] ...

A case is CONTEXT:BATCH. Keys, values and queries are random; each layer has its own, so that they do not all stay in
the L2 cache. Times are medians of CUDA graph replays over all layers. `partial step` are the same launches at a step
that is not a selecting one, `mean` is that of both; `plain` are steps of a cache without selecting steps. The table at
the end also has the least times that the memory's bandwidth allows: `bound` for the score keys of the launch before it,
or for the chosen keys and values. `together` is the second launch, `rank` and `finish` its first and its last stage.
Needs a GPU; tests/ops/test_selecting_kernels.py tests the kernels without one.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from measuring import copy_bandwidth, free_memory, milliseconds
from refreshkv import NEVER
from refreshkv.ops import naive, write_score_keys
from refreshkv.ops.state import LayerState, SelectingState, SelectionOptions, SelectionScratch, StepOptions
from refreshkv.ops.step import launches
from refreshkv.ops.step.finishing import Ending, Shares
from refreshkv.ops.step.selecting import attention
from refreshkv.ops.step.selecting import launches as selecting
from refreshkv.ops.step.selecting.state import Selecting, SelectingScratch
from refreshkv.tables import column_table

SHAPE = {"layers": 32, "heads": 32, "kv-heads": 8, "head-dim": 128}
"""Llama-3.1-8B's."""

LARGEST_CACHES = 40e9
"""Bytes of keys and values of all layers: fewer layers where they would be more."""


@dataclass
class Layer:
    """One layer's caches and the token of its step."""

    token: tuple[Tensor, Tensor, Tensor]
    state: LayerState
    chosen: SelectingState
    scratch: SelectionScratch


@dataclass
class Case:
    """The layers of one case and what they share."""

    layers: list[Layer]
    length: Tensor
    """() int64: of the caches. The last launch counts the token in `counter` instead, so that all layers step alike."""
    counter: Tensor
    scratch: SelectingScratch
    output: Tensor
    scaling: float
    selection: SelectionOptions

    def selecting(self, layer: Layer, select_stride: int = 1) -> Selecting:
        return Selecting(layer.chosen, self.scratch, self.step_options(select_stride))

    def step_options(self, select_stride: int | None, stride: int = NEVER) -> StepOptions:
        return StepOptions(stride, None, self.selection, select_stride)


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
        keys, values, observers = (
            random(args.kv_heads, capacity),
            random(args.kv_heads, capacity),
            random(args.heads, 1),
        )
        flags = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        chosen = SelectingState(None, None, flags)
        if args.bits < 16:
            chosen = SelectingState(*naive.empty_score_keys(keys, args.bits), flags)
            assert chosen.codes is not None and chosen.scales is not None
            write_score_keys(keys, chosen.codes, chosen.scales, 0)
        selected = torch.rand(batch, args.kv_heads, context, device=device).topk(budget, sorted=False).indices.int()
        mean_query = torch.zeros(batch, args.head_dim, device=device)
        decided = {"row_state": row_state, "selected": selected, "ranking": selected.clone(), "full_steps": flags}
        state = LayerState(keys, values, length, mean_query=mean_query, observers=observers, **decided)
        token = (random(args.heads, 1), random(args.kv_heads, 1), random(args.kv_heads, 1))
        scratch = SelectionScratch.empty((batch,), args.kv_heads, capacity, args.head_dim, keys.device)
        layers.append(Layer(token, state, chosen, scratch))
    output = torch.empty(batch, 1, args.heads, args.head_dim, device=device, dtype=torch.bfloat16)
    selection = SelectionOptions(args.pool_kernel, 1, 0, 0, pool_ahead=True)
    options = StepOptions(NEVER, None, selection, 1)
    scratch = SelectingScratch.empty(layers[0].state.keys, layers[0].state.observers, options)
    return Case(layers, length, length.clone(), scratch, output, args.head_dim**-0.5, selection)


def score(case: Case, layer: Layer, select_stride: int = 1) -> Shares:
    used = case.selecting(layer, select_stride)
    return launches.attend(
        *layer.token, layer.state, case.scaling, options=used.options, scratch=layer.scratch, selecting=used
    )


def clear(case: Case, layer: Layer) -> None:
    """Clears what the first launch of a selecting step clears."""
    case.scratch.counters.zero_()
    case.scratch.histogram.zero_()


def ending(case: Case, layer: Layer, shares: Shares, select_stride: int = 1) -> tuple:
    """The arguments of the second launch of a step."""
    state, used = layer.state._replace(length=case.counter), case.selecting(layer, select_stride)
    return layer.token[0], state, used, Ending(shares, layer.scratch, shares.total, case.output), case.scaling


def launch(case: Case, layer: Layer, shares: Shares, first: int, last: int) -> None:
    """Makes the stages from `first` to `last` of the second launch of a step once more, by the last scores."""
    clear(case, layer)
    selecting.launch(*ending(case, layer, shares), span=(first, last))


def whole_step(case: Case, layer: Layer, select_stride: int = 1) -> None:
    shares = score(case, layer, select_stride)
    selecting.choose_and_attend(*ending(case, layer, shares, select_stride))


def plain_step(case: Case, layer: Layer, stride: int) -> None:
    """A full step if stride is 1, else a partial one, of a cache without selecting steps; without the selection at the
    step's end."""
    options = case.step_options(None, stride)
    shares = launches.attend(*layer.token, layer.state, case.scaling, options=options, scratch=layer.scratch)
    state = layer.state._replace(length=case.counter)
    launches.finish(shares, case.output, state, shares.logits, case.selection, layer.scratch)


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
    bandwidth = args.bandwidth
    tokens = batch * args.kv_heads * context
    score_bytes = tokens * (args.head_dim * args.bits / 8 + (4 if args.bits < 16 else 0))
    result: dict[str, Any] = {
        "case": f"{context // 1024}K,{batch}",
        "layers": len(case.layers),
        "score": per_layer(case, score),
        "bound": round(score_bytes / bandwidth * 1e6, 1),
    }
    shares = score(case, case.layers[0])
    cleared = per_layer(case, clear)
    rank, finish = attention.RANK.value, attention.FINISH.value
    for name, first, last in (("rank", rank, rank), ("together", rank, finish), ("finish", finish, finish)):
        result[name] = round(per_layer(case, partial(launch, shares=shares, first=first, last=last)) - cleared, 2)
    result["bound "] = round(tokens / 8 * args.head_dim * 4 / bandwidth * 1e6, 1)
    result["selecting step"] = per_layer(case, whole_step)
    result["partial step"] = per_layer(case, lambda case, layer: whole_step(case, layer, 7))
    result["plain partial"] = per_layer(case, lambda case, layer: plain_step(case, layer, NEVER))
    result["plain full"] = per_layer(case, lambda case, layer: plain_step(case, layer, 1))
    result["mean"] = round((result["selecting step"] + result["partial step"]) / 2, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="32768:1,131072:1,32768:8,16384:32")
    parser.add_argument("--bits", type=int, default=4, choices=(16, 8, 4))
    parser.add_argument(
        "--pool-kernel", type=int, default=1, help="positions of a pooling window (default: %(default)s)"
    )
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
