"""Requests of several clients at once: throughput, latency and memory of `refreshkv.generate`, by concurrency.

    python benchmarks/serve.py [--recommended] [--compare] [--concurrency 1,8] [--requests 8] [--longest 16384] ...

Each client is a thread that asks for one text after the other, as the threads of a server do; `transformers serve`
calls the same function, one request at a time. Prompts are random tokens of random lengths between half of --longest
and all of it. Requests with the longest prompt come first, to warm up. `own` is the model's own `generate` with the
attention (sdpa) and the cache that transformers takes by itself, one request at a time too. The model has random
weights. The first number of clients also pays for the plans that cuDNN builds for each length of a prompt.

`grown MB` is what the GPU holds more after the requests than before them, `recompiled` counts the graphs that torch
compiled after the warm-up, and `equal` (--compare) the answers whose tokens are those of one client, who asks for one
text after the other. --output gets each line as soon as it is measured.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import refreshkv
from measuring import add_shape, free_memory, random_llama
from output import save
from refreshkv import RefreshConfig
from refreshkv.options import whole_numbers
from refreshkv.tables import column_table

SHAPE = {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8, "vocabulary": 128256}
"""Llama-3.2-1B's."""
Ask = Callable[[Tensor], Tensor]


@dataclass
class Load:
    """What the requests of one concurrency took."""

    generate: str
    clients: int
    seconds: float
    requests: int
    tokens_per_second: float
    """New tokens of all clients."""
    median_latency: float
    largest_latency: float
    peak_gb: float
    """Largest memory of the GPU, weights included, without what the other kind of generate holds; 0 on a CPU."""
    grown_mb: float
    """Memory of the GPU after the requests less that before them; 0 on a CPU."""
    recompiled: int
    equal: int | None = None
    """Answers with the tokens of one client's; None without --compare."""


WARM_UPS = {"refreshkv": 3, "own": 1}
"""Requests before any is measured. Of `refreshkv` the first one compiles and the second one captures."""


def main() -> None:
    args = parse()
    model = random_llama(args, args.device, getattr(torch, args.dtype))
    model.config.refreshkv = refresh_config(args).to_dict()
    prompts, results = make_prompts(args), []
    for name in args.generate:
        for load in loads(name, model, prompts, args):
            print(load, flush=True)
            results.append(load)
            save(args.output, "serve.json", [asdict(result) for result in results])
    print(table(results))


def refresh_config(args: argparse.Namespace) -> RefreshConfig:
    if args.recommended:
        return RefreshConfig.recommended(budget=args.budget)
    return RefreshConfig(budget=args.budget, stride=args.stride)


def make_prompts(args: argparse.Namespace) -> list[Tensor]:
    """Random tokens, (1, P) each."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.longest // 2, args.longest + 1, (args.requests,), generator=generator).tolist()
    return [torch.randint(1, args.vocabulary, (1, length), generator=generator).to(args.device) for length in lengths]


def loads(name: str, model: Any, prompts: list[Tensor], args: argparse.Namespace) -> Iterator[Load]:
    """The requests `prompts` at each concurrency, after the longest possible one."""
    ask = make_ask(name, model, args)
    longest = torch.randint(1, args.vocabulary, (1, args.longest), device=args.device)
    others = max(0, allocated(args) - model.get_memory_footprint())
    for number in range(WARM_UPS[name]):
        began = time.perf_counter()
        ask(longest).cpu()
        print(f"{name}: warm-up {number + 1} took {time.perf_counter() - began:.1f} s", flush=True)
    alone = None
    for clients in args.concurrency:
        load, answers = measure(name, ask, clients, prompts, args)
        load.peak_gb -= others / 1e9
        if args.compare:
            alone = alone or answers
            load.equal = sum(torch.equal(tokens, known) for tokens, known in zip(answers, alone, strict=True))
        yield load


def make_ask(name: str, model: Any, args: argparse.Namespace) -> Ask:
    """What one client calls for a text: prompt (1, P) -> new tokens (1, N)."""
    model.set_attn_implementation("sdpa")  # `refreshkv.generate` sets its own again
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": args.new}
    turn = threading.Lock()

    def refreshed(prompt: Tensor) -> Tensor:
        return refreshkv.generate(model, prompt, **settings)[:, prompt.shape[1] :]

    def own(prompt: Tensor) -> Tensor:
        with turn:
            return model.generate(prompt, **settings)[:, prompt.shape[1] :]

    return {"refreshkv": refreshed, "own": own}[name]


def measure(
    name: str, ask: Ask, clients: int, prompts: list[Tensor], args: argparse.Namespace
) -> tuple[Load, list[Tensor]]:
    """What the requests took, and their new tokens, (1, N) each."""
    free_memory()
    counters.clear()
    on_gpu, held = args.device.startswith("cuda"), allocated(args)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def timed(prompt: Tensor) -> tuple[Tensor, float]:
        asked = time.perf_counter()
        tokens = ask(prompt).cpu()
        return tokens, time.perf_counter() - asked

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(timed, prompts))
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    free_memory()
    latencies = [latency for _, latency in answers]
    load = Load(
        name,
        clients,
        seconds,
        len(prompts),
        sum(tokens.numel() for tokens, _ in answers) / seconds,
        statistics.median(latencies),
        max(latencies),
        peak / 1e9,
        (allocated(args) - held) / 1e6,
        counters["stats"]["unique_graphs"],
    )
    return load, [tokens for tokens, _ in answers]


def allocated(args: argparse.Namespace) -> int:
    """Bytes of the GPU that tensors take; 0 on a CPU."""
    return torch.cuda.memory_allocated() if args.device.startswith("cuda") else 0


def table(results: list[Load]) -> str:
    titles = ("generate", "clients", "tokens/s", "requests/s", "latency s", "largest", "peak GB", "grown MB")
    titles = (*titles, "recompiled", "equal")
    lines = [
        (
            load.generate,
            str(load.clients),
            f"{load.tokens_per_second:.1f}",
            f"{load.requests / load.seconds:.2f}",
            f"{load.median_latency:.2f}",
            f"{load.largest_latency:.2f}",
            f"{load.peak_gb:.2f}",
            f"{load.grown_mb:.1f}",
            str(load.recompiled),
            "" if load.equal is None else f"{load.equal} of {load.requests}",
        )
        for load in results
    ]
    return column_table([titles, *lines])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser, SHAPE)
    parser.add_argument("--generate", type=lambda text: text.split(","), default=["refreshkv", "own"])
    parser.add_argument("--concurrency", type=whole_numbers, default=[1, 8], help="numbers of clients")
    parser.add_argument("--requests", type=int, default=8, help="at each concurrency")
    parser.add_argument("--longest", type=int, default=16384, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--budget", type=float, default=0.125)
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--recommended", action="store_true", help="RefreshConfig.recommended() instead of the paper's")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compare", action="store_true", help="count the answers that equal those of one client")
    parser.add_argument("--output", type=Path, help="folder for serve.json")
    args = parser.parse_args()
    if args.compare and args.concurrency[0] != 1:
        parser.error("--compare compares with the answers of one client: begin --concurrency with 1")
    return args


if __name__ == "__main__":
    main()
