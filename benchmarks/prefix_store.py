"""Recycled prompts: time to the first token with and without a prefix store, by overlap; fidelity; where it pays.

    python benchmarks/prefix_store.py [--lengths 2048,32768] [--overlaps 0,0.5,0.9,1] [--strategies full,refresh,...]

For each length and overlap a prompt of random tokens is stored, and another one that begins like it is answered with
and without the store. Prints for both the milliseconds to the first token, copy included (medians); of the reuse the
depth in tokens, the bytes, and the milliseconds of looking up and queueing the copies; whether the greedy tokens are
equal, and the largest difference of logits. "first" is the first use of an entry by the process, when a folder's
checksums are verified. Then, for doubling lengths, copying all but the last tokens against computing them: where
copying begins to win. With --pairs N, as many random pairs of prompts with overlaps from none to all: fidelity only.
With --embeddings ENCODER (and --model with a tokenizer) what sentence embeddings find, beside the longest prefix.

The model is --model, or one of Llama-3.1-8B's shape with random weights; on a CPU and with --quick a small one.
--output DIR writes prefix_store.json after each line, and prefix_store.png.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from measuring import SHAPE, add_shape, free_memory, random_llama
from output import pyplot, save
from refreshkv import RefreshCache, RefreshConfig, enable
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.cache.keyword import as_keyword
from refreshkv.prefix.index import NearestSentence
from refreshkv.prefix.prompt_cache import PromptCache
from refreshkv.prefix.recycling import Reuse, recycle, store_prompts
from refreshkv.prefix.store import PrefixStore
from refreshkv.tables import column_table

STRATEGIES = ("full", "dynamic", "refresh", "similarity", "streaming", "snapkv")
SMALL = {"layers": 4, "hidden": 512, "intermediate": 1536, "heads": 8, "kv_heads": 2, "vocabulary": 4096}
"""The model's shape on a CPU."""
NEW_TOKENS = 8
"""Decoding steps that are compared after each prompt."""


def main() -> None:
    args = read_arguments()
    model = build_model(args)
    print(describe(model, args), flush=True)
    results: dict[str, Any] = {"about": describe(model, args), "overlaps": [], "lengths": []}
    for length in args.lengths:
        for strategy in args.strategies:
            for overlap in args.overlaps:
                add(results, "overlaps", time_overlap(model, strategy, length, overlap, args), args)
    for length in doubling(args):
        add(results, "lengths", time_length(model, length, args), args)
    print(table(results["overlaps"]), table(results["lengths"]), crossover(results["lengths"]), sep="\n\n")
    if args.pairs:
        add(results, "pairs", compare_pairs(model, args), args)
    if args.embeddings:
        add(results, "found", compare_finders(model, args), args)
    if args.output:
        plot(results, args.output / "prefix_store.png")


def read_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; without it random weights of the shape below")
    parser.add_argument("--lengths", default="2048,8192,32768" if on_gpu else "512,2048", help="(default: %(default)s)")
    parser.add_argument("--overlaps", default="0,0.25,0.5,0.75,0.9,1", help="shares (default: %(default)s)")
    parser.add_argument("--strategies", default="full,refresh", help=f"of {', '.join(STRATEGIES)}")
    parser.add_argument("--place", default="memory", help="memory, or a folder to make the store in (default: memory)")
    parser.add_argument("--pairs", type=int, default=0, help="random pairs whose tokens and logits are compared")
    parser.add_argument("--embeddings", help="a sentence-transformers model, to compare what is found")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each (default: %(default)s)")
    add_shape(parser, SHAPE if on_gpu else SMALL)
    parser.add_argument("--quick", action="store_true", help="2 layers, one short length: does everything run?")
    parser.add_argument("--output", type=Path, help="folder for prefix_store.json and prefix_store.png")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.lengths, args.overlaps, args.repeat = 2, "256", "0,0.5,1", 1
    args.lengths = [int(length) for length in args.lengths.split(",")]
    args.overlaps = [float(overlap) for overlap in args.overlaps.split(",")]
    args.strategies = args.strategies.split(",")
    unknown = set(args.strategies) - set(STRATEGIES)
    if unknown:
        parser.error(f"--strategies: there is no {unknown.pop()}; known are {', '.join(STRATEGIES)}")
    return args


def build_model(args: argparse.Namespace):
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        model.to(device).eval()  # pyright: ignore[reportArgumentType]  # transformers' wrapper of it hides `self`
        return enable(model, RefreshConfig())
    return enable(random_llama(args, device, dtype), RefreshConfig())


def describe(model, args: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{cpu_name()}, {threads()}"
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{device}, torch {torch.__version__}, {size:.0f}M parameters, {args.dtype}, place {args.place}"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def threads() -> str:
    return f"{torch.get_num_threads()} threads"


def make_cache(model, strategy: str, room: int):
    config = model.config
    makers = {
        "full": lambda: FullCache(config, room),
        "dynamic": lambda: DynamicCache(config=config),
        "refresh": lambda: RefreshCache(config, room, RefreshConfig()),
        "similarity": lambda: RefreshCache(config, room, RefreshConfig(stride=5, threshold=0.85)),
        "streaming": lambda: StreamingCache(config, room),
        "snapkv": lambda: SnapKVCache(config, room),
    }
    return makers[strategy]()


@contextmanager
def new_store(model, args: argparse.Namespace) -> Iterator[PrefixStore]:
    """An empty store, gone afterwards."""
    if args.place == "memory":
        yield PrefixStore(None, 10**12, model)
        return
    Path(args.place).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.place) as folder:
        yield PrefixStore(folder, 10**12, model)


def drawn(model, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (1, length), generator=generator).to(model.device)


def pair(model, length: int, shared: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two prompts (1, length) whose first `shared` tokens, and no more, are the same."""
    first, second = drawn(model, length, 2 * seed), drawn(model, length, 2 * seed + 1)
    second[:, :shared] = first[:, :shared]
    if shared < length and second[0, shared] == first[0, shared]:
        second[0, shared] = 3 + (first[0, shared] - 2) % (model.config.vocab_size - 3)
    return first, second


@torch.no_grad()
def answer(model, strategy: str, ids: Tensor, store: PrefixStore | None) -> tuple[float, Reuse | None, Tensor, object]:
    """Seconds to the first token, what was reused, its logits (1, V), and the cache."""
    cache = make_cache(model, strategy, ids.shape[1] + NEW_TOKENS)
    wait(model)
    began = time.perf_counter()
    reuse = None if store is None else recycle(store, cache, ids)
    known = 0 if not reuse or not reuse.tokens else int(cache.get_seq_length())
    logits = model(ids[:, known:], **as_keyword(cache), use_cache=True, logits_to_keep=1).logits[:, -1]
    logits.argmax(-1).item()  # waits for the GPU
    return time.perf_counter() - began, reuse, logits, cache


@torch.no_grad()
def decoded(model, logits: Tensor, cache) -> tuple[list[int], Tensor]:
    """The greedy tokens after a prompt, and all logits (N, V)."""
    tokens, every = [], [logits]
    for _ in range(NEW_TOKENS - 1):
        tokens.append(int(every[-1].argmax(-1)))
        step = torch.tensor([tokens[-1:]], device=model.device)
        every.append(model(step, **as_keyword(cache), use_cache=True).logits[:, -1])
    return [*tokens, int(every[-1].argmax(-1))], torch.cat(every).float()


def time_overlap(model, strategy: str, length: int, overlap: float, args: argparse.Namespace) -> dict[str, object]:
    with new_store(model, args) as store:
        result = compare(model, store, strategy, length, overlap, args.repeat)
    free_memory()
    return result


def compare(model, store: PrefixStore, strategy: str, length: int, overlap: float, repeat: int) -> dict[str, object]:
    first, second = pair(model, length, round(overlap * length))
    began = time.perf_counter()
    store_prompts(store, first, torch.ones_like(first))
    storing = time.perf_counter() - began
    answer(model, strategy, second, None)  # kernels are compiled, memory is taken
    initial = answer(model, strategy, second, store)[0]
    times = []
    for _ in range(repeat):  # in turn, so that whatever else the machine does meets both
        runs = [answer(model, strategy, second, place) for place in (None, store)]
        reuse = runs[1][1]
        assert reuse is not None  # there is a store
        times.append((runs[0][0], runs[1][0], reuse.seconds))
    fresh, recycled, looking = (statistics.median(column) for column in zip(*times, strict=True))
    tokens, logits = zip(*(decoded(model, *run[2:]) for run in runs), strict=True)
    return {
        "length": length,
        "strategy": strategy,
        "overlap": overlap,
        "fresh ms": round(fresh * 1e3, 2),
        "recycled ms": round(recycled * 1e3, 2),
        "ratio": round(fresh / recycled, 2),
        "reused tokens": reuse.tokens,
        "MB": round(reuse.bytes / 1e6, 1),
        "look up and queue ms": round(looking * 1e3, 3),
        "share of fresh": f"{looking / fresh:.2%}",
        "first ms": round(initial * 1e3, 2),
        "compute and store ms": round(storing * 1e3, 1),
        "same tokens": tokens[0] == tokens[1],
        "logits differ by": float(f"{(logits[0] - logits[1]).abs().max():.2g}"),
    }


def doubling(args: argparse.Namespace) -> list[int]:
    lengths = [64]
    while lengths[-1] * 2 <= max(args.lengths):
        lengths.append(lengths[-1] * 2)
    return lengths


def time_length(model, length: int, args: argparse.Namespace) -> dict[str, object]:
    """All of a prompt but its last tokens copied, against all computed."""
    ids, times = drawn(model, length, 0), []
    with new_store(model, args) as store:
        store_prompts(store, ids, torch.ones_like(ids))
        for _ in range(2 + args.repeat):
            times.append((answer(model, "full", ids, None)[0], copied(model, ids, store)))
    computed, copying = (statistics.median(column) for column in zip(*times[2:], strict=True))
    free_memory()
    return {"length": length, "computed ms": round(computed * 1e3, 3), "copied ms": round(copying * 1e3, 3)}


@torch.no_grad()
def copied(model, ids: Tensor, store: PrefixStore) -> float:
    """Seconds to the first token after a prompt that is all in the store, whatever its length."""
    cache = make_cache(model, "full", ids.shape[1] + NEW_TOKENS)
    wait(model)
    began = time.perf_counter()
    recycle(store, cache, ids, least=1)
    model(ids[:, -2:], **as_keyword(cache), use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).item()
    return time.perf_counter() - began


def crossover(results: list[dict]) -> str:
    ahead = [result["length"] for result in results if result["copied ms"] < result["computed ms"]]
    slower = [result["length"] for result in results if result["length"] not in ahead]
    first = next((length for length in ahead if length > max(slower, default=0)), None)
    if first is None:
        return "copying does not beat computing at these lengths"
    return f"copying beats computing from {first} tokens on" + (", the shortest tried" if not slower else "")


def compare_pairs(model, args: argparse.Namespace) -> dict[str, object]:
    """Random pairs with overlaps from none to all: prompts of up to the shortest of --lengths."""
    draw, same, largest, scale = random.Random(0), 0, 0.0, 0.0
    for number in range(args.pairs):
        length, strategy = draw.randint(64, min(args.lengths)), args.strategies[number % len(args.strategies)]
        shared = [0, length, draw.randint(0, length)][min(2, number % 20)]
        first, second = pair(model, length, shared, seed=number + 1)
        with new_store(model, args) as store:
            store_prompts(store, first, torch.ones_like(first))
            runs = [answer(model, strategy, second, place) for place in (None, store)]
        tokens, logits = zip(*(decoded(model, *run[2:]) for run in runs), strict=True)
        same += tokens[0] == tokens[1]
        if tokens[0] == tokens[1]:  # after another token logits are not comparable
            largest = max(largest, float((logits[0] - logits[1]).abs().max()))
        scale = max(scale, float(logits[0].abs().max()))
    return {"pairs": args.pairs, "same tokens": same, "logits differ by": largest, "largest logit": round(scale, 2)}


def compare_finders(model, args: argparse.Namespace) -> dict[str, object]:
    """Prompts of words, two thirds of which begin like an earlier one: tokens that each way to find one would reuse."""
    tokenizer, draw = AutoTokenizer.from_pretrained(args.model), random.Random(0)
    stores = {
        "longest prefix": PrefixStore(None, 10**12, model),
        "embeddings": PrefixStore(None, 10**12, model, NearestSentence(args.embeddings, tokenizer)),
    }
    depths, seconds = dict.fromkeys(stores, 0), dict.fromkeys(stores, 0.0)
    words = [word for word in (tokenizer.decode([token]) for token in range(200, 1200)) if word.strip().isalpha()]
    prompts: list[list[int]] = []
    for number in range(60):
        base = draw.choice(prompts) if prompts and number % 3 else []
        base = base[: draw.choice([len(base), draw.randint(0, 60)])]
        ids = base + tokenizer(" ".join(draw.choices(words, k=20)), add_special_tokens=False)["input_ids"]
        cache = random_cache(model, ids)
        found = {}
        for name, store in stores.items():
            began = time.perf_counter()
            found[name] = store.match(ids)[0]
            seconds[name] += time.perf_counter() - began
            depths[name] += found[name]
            store.put(ids, cache)
        if found["embeddings"] > found["longest prefix"]:
            raise RuntimeError("embeddings found what the longest prefix did not")
        prompts.append(ids)
    return {"prompts": 60, "reused tokens": depths, "ms each": {k: round(v / 60 * 1e3, 3) for k, v in seconds.items()}}


@torch.no_grad()
def random_cache(model, ids: list[int]) -> PromptCache:
    cache = PromptCache(model.config, len(ids))
    model(torch.tensor([ids], device=model.device), **as_keyword(cache), logits_to_keep=1)
    return cache


def wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def add(results: dict, name: str, result: dict[str, object], args: argparse.Namespace) -> None:
    """Keeps a result, prints it, and writes all so far."""
    results.setdefault(name, []).append(result)
    print(json.dumps(result), flush=True)
    save(args.output, "prefix_store.json", results)


def table(results: list[dict[str, object]]) -> str:
    return column_table(
        [list(results[0]), *([str(value) for value in result.values()] for result in results)], text_columns=0
    )


def plot(results: dict, path: Path) -> None:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for length, strategy in dict.fromkeys((row["length"], row["strategy"]) for row in results["overlaps"]):
        rows = [row for row in results["overlaps"] if (row["length"], row["strategy"]) == (length, strategy)]
        shares = [row["recycled ms"] / row["fresh ms"] for row in rows]
        left.plot([row["overlap"] for row in rows], shares, marker="o", label=f"{length} tokens, {strategy}")
    left.plot([0, 1], [1, 0], color="black", linewidth=0.8, linestyle="--", label="the tokens left")
    left.set(xlabel="overlap", ylabel="time to the first token, share of a fresh prompt's", ylim=(0, None))
    left.legend(fontsize=7)
    for name in ("computed ms", "copied ms"):
        lengths = [row["length"] for row in results["lengths"]]
        right.loglog(lengths, [row[name] for row in results["lengths"]], marker="o", label=name.removesuffix(" ms"))
    right.set(xlabel="tokens", ylabel="milliseconds to the first token")
    right.legend()
    figure.suptitle(results["about"], fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
