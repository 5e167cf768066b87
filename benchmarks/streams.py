"""How the number of CUDA streams that a process has used changes the time of a CUDA graph of small kernels.

    python benchmarks/streams.py [--streams 10] [--kernels 300]

The graph is captured once. Then one stream after another is used for a single addition, and each time the graph is
replayed on the default stream and on the one that was used last. `us a kernel` is the time beyond the first line's.
"""

import argparse
import time
from collections.abc import Callable

import torch

from measuring import used_stream
from refreshkv.tables import column_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=10, help="streams besides the default one")
    parser.add_argument("--kernels", type=int, default=300, help="about how many kernels the graph has")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch finds none")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    work = make_work(args.kernels)
    with torch.cuda.graph(graph, stream=stream):
        work()
    lines = []
    for used in range(2, args.streams + 2):
        lines.append((used, replay_ms(graph, torch.cuda.default_stream()), replay_ms(graph, stream)))
        stream = used_stream()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%d %B %Y')}")
    print(table(lines, args.kernels))


def make_work(kernels: int) -> Callable[[], None]:
    """A function that launches about so many kernels: products of small matrices with weights, and what follows them.
    It has run once."""
    weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    start = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        state = start
        for number in range(kernels // 3):
            state = ((state @ weights[number % len(weights)]) * 0.01).relu()

    work()
    torch.cuda.synchronize()
    return work


def replay_ms(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, repeat: int = 60) -> float:
    """Milliseconds of a replay, by the host's clock: CUDA events are left out on purpose."""
    with torch.cuda.stream(stream):
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeat):
            graph.replay()
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeat * 1e3


def table(lines: list[tuple[int, float, float]], kernels: int) -> str:
    first = lines[0][1]
    rows = [
        (str(used), f"{default:.3f}", f"{last:.3f}", f"{(default - first) / kernels * 1e3:.2f}")
        for used, default, last in lines
    ]
    return column_table([("streams used", "ms, default stream", "ms, last stream", "us a kernel"), *rows])


if __name__ == "__main__":
    main()
