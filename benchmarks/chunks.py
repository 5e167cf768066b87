"""Prompts of stored chunks: what they lose on a real model, and the time to the first token that they save.

    python benchmarks/chunks.py --loss --model DIR --data ROWS [--data ROWS] [--rows N] [--seconds S] [--chunks 8]
    python benchmarks/chunks.py --time [--documents 8] [--document-tokens 4096] [--question-tokens 64]

--loss: a prepared sequence of T tokens is a prompt of T - N and its last N tokens. The prompt is cut into equal chunks.
All but the last come from a store in host memory, through `load_chunks`: alone, with the first --first tokens of each
computed again, or with the share --changed of all their tokens that full attention changes most. The last chunk is the
question: it attends to everything before it. It and the N tokens are computed in one block with full attention, so what
is lost is lost by the chunks. With `recommended` after it, the N tokens are decoded from the small cache of
`RefreshConfig.recommended()` instead: the loss of one `Simulation`, which equals decoding. It knows the full prompt and
chunks alone, for recomputation is not simulated. `question alone` is the last chunk without the others. The table has
for each text the nats a token, those over the full prompt's under full attention with the standard error over the
sequences, the share of the N tokens at which the most likely token is the same, and how many of the tokens before the
question were computed in the request.

--time: documents of random tokens are in the store (host memory, page-locked on a machine with a GPU), and a question
of random tokens follows. Milliseconds from the tokens to the first new one, medians, through the cache that
`generate_from_chunks` uses with `RefreshConfig.recommended()`, against computing the whole prompt through that cache.
`load ms` is the host's time in `load_chunks`, `peak GB` the most memory of the GPU, weights included. The model has
Llama-3.1-8B's shape and random weights; on a CPU a small one.

--output DIR writes chunks.json, after each sequence and each kind of prompt. The texts take turns, and --seconds begins
no further sequence once so many have passed, so that what is there is of use.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import Cache

from measuring import SHAPE, add_shape, free_memory, random_llama
from output import save
from refreshkv import RefreshCache, RefreshConfig, Simulation, enable
from refreshkv.baselines.full import FullCache
from refreshkv.cache.keyword import as_keyword
from refreshkv.evaluation.perplexity.evaluation import check_last_tokens
from refreshkv.evaluation.reports import hardware
from refreshkv.prefix.chunks import load_chunks
from refreshkv.prefix.store import PrefixStore
from refreshkv.tables import column_table
from texts import open_model, read_sequences

SMALL = {"layers": 4, "hidden": 512, "intermediate": 1536, "heads": 8, "kv_heads": 2, "vocabulary": 4096}
"""The model's shape on a CPU."""
FULL_PROMPT, ALONE, QUESTION_ALONE = "full prompt", "chunks alone", "question alone"
FULL, RECOMMENDED = "full", "recommended"
"""Attention after the prompt: to all tokens, or from the small cache of `RefreshConfig.recommended()`."""
STORE_BYTES = 4 * 10**9
"""Room for the chunks of a few sequences: each is used by all ways, and then never again."""
Scored = dict[tuple[str, str], tuple[Tensor, Tensor, int]]
"""(prompt, attention after it) -> losses (N,) float32 in nats, likeliest tokens (N,), and how many tokens before the
question were computed."""


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    results: dict[str, Any] = {"about": about(args), "settings": settings, "loss": [], "time": []}
    print(results["about"], flush=True)
    if args.loss:
        measure_losses(results, args)
        print(table(results["loss"], text_columns=3), flush=True)
    if args.time:
        measure_times(results, args)
        print(table(results["time"], text_columns=1), flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", action="store_true", help="measure what chunks lose; needs --model and --data")
    parser.add_argument("--model", help="folder or hub id, for --loss")
    parser.add_argument("--data", action="append", default=[], help="folder of prepared sequences; may be repeated")
    parser.add_argument(
        "--rows", type=int, help="sequences of the test split (default: 100, or all if there are fewer)"
    )
    parser.add_argument("--seconds", type=float, help="begin no sequence later, from the third of each text on")
    parser.add_argument("--last-tokens", type=int, default=512, help="scored tokens (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=8, help="of a prompt, the question included (default: 8)")
    parser.add_argument("--only-full", action="store_true", help="leave out the small cache after the prompt")
    parser.add_argument("--budget", type=float, default=0.125, help="of recommended (default: %(default)s)")
    parser.add_argument("--first", type=int, default=16, help="of each chunk, 0 leaves it out (default: %(default)s)")
    parser.add_argument("--changed", type=float, default=0.15, help="0 leaves it out (default: %(default)s)")
    parser.add_argument("--time", action="store_true", help="measure the time to the first token")
    parser.add_argument("--documents", type=int, default=8, help="known documents (default: %(default)s)")
    parser.add_argument("--document-tokens", type=int, default=4096 if on_gpu else 256, help="(default: %(default)s)")
    parser.add_argument("--question-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements after a warm-up (default: %(default)s)")
    add_shape(parser, SHAPE if on_gpu else SMALL)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for chunks.json")
    args = parser.parse_args(arguments)
    args.device = "cuda" if on_gpu else "cpu"
    if not (args.loss or args.time):
        parser.error("nothing to measure: give --loss or --time")
    if args.loss and not (args.model and args.data):
        parser.error("--loss needs --model and --data")
    if args.loss and args.chunks < 2:
        parser.error(f"--chunks={args.chunks}: at least one chunk and the question make two")
    return args


def ways(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Ways to use stored chunks: name -> what `load_chunks` computes again."""
    found: dict[str, dict[str, Any]] = {ALONE: {}}
    if args.first:
        found[f"first {args.first}"] = {"first": args.first}
    if args.changed:
        found[f"changed {args.changed:.0%}"] = {"changed": args.changed}
    return found


def about(args: argparse.Namespace) -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{hardware()}, {versions}, {args.dtype}, {time.strftime('%d %B %Y')}"


# ---- losses


def measure_losses(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Adds the table lines of each text to the results."""
    folder, model = open_model(args, getattr(torch, args.dtype))
    enable(model, RefreshConfig.recommended(budget=args.budget))
    store, began = PrefixStore(None, STORE_BYTES, model), time.perf_counter()
    texts = {data: sequences_of(model, folder, data, args) for data in args.data}
    scored: dict[str, list[Scored]] = {data: [] for data in texts}
    for number in tqdm(range(max(map(len, texts.values()))), unit=" rows of each text"):
        for data, sequences in texts.items():
            spent = time.perf_counter() - began
            if number >= len(sequences) or (args.seconds is not None and number > 1 and spent > args.seconds):
                continue
            scored[data].append(score(model, store, sequences[number].to(args.device), args))
            results["loss"] = [line for name, found in scored.items() if found for line in loss_lines(name, found)]
            save(args.output, "chunks.json", results)


def sequences_of(model, folder: str, data: str, args: argparse.Namespace) -> list[Tensor]:
    """The test sequences of a text, (1, T) each."""
    ids = read_sequences(model, folder, data, "test", args.rows)
    check_last_tokens(args.last_tokens, ids.shape[1])
    return list(ids.split(1))


def equal_ends(length: int, chunks: int) -> tuple[int, ...]:
    """The ends of equal chunks of `length` tokens; where it is no multiple, lengths differ by one."""
    return tuple(length * number // chunks for number in range(1, chunks + 1))


@torch.no_grad()
def score(model, store: PrefixStore, ids: Tensor, args: argparse.Namespace) -> Scored:
    """The last tokens of one sequence (1, T) after each kind of prompt."""
    last, length = args.last_tokens, ids.shape[1]
    ends = equal_ends(length - last, args.chunks)
    question = ends[-2]
    chunks = [ids[0, start:end] for start, end in zip((0, *ends), ends[:-1], strict=False)]

    def new_cache() -> FullCache:
        return FullCache(model.config, length)

    found = {(FULL_PROMPT, FULL): (*continued(model, new_cache(), ids, last), question)}
    for name, amount in ways(args).items():
        cache = new_cache()
        reuse = load_chunks(store, cache, chunks, **amount)
        found[name, FULL] = *continued(model, cache, ids[:, question:], last), reuse.recomputed_tokens
    found[QUESTION_ALONE, FULL] = *continued(model, new_cache(), ids[:, question:], last), 0
    if args.only_full:
        return found
    config = RefreshConfig.recommended(budget=args.budget)
    for name, own_ends, computed in ((FULL_PROMPT, None, question), (ALONE, ends, 0)):
        simulation = Simulation(length - last, config, chunks=own_ends)
        logits = model(ids, simulation=simulation, use_cache=False, logits_to_keep=last + 1).logits
        found[name, RECOMMENDED] = *judged(logits, ids, last), computed
    return found


def continued(model, cache: Cache, ids: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Losses and likeliest tokens, (N,) each, of the last tokens of (1, n) that follow what the cache holds."""
    return judged(model(ids, **as_keyword(cache), use_cache=True, logits_to_keep=last + 1).logits, ids, last)


def judged(logits: Tensor, ids: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Losses (N,) float32 and likeliest tokens (N,) on the CPU, from logits (1, N + 1, V)."""
    logits = logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, -last:], reduction="none").cpu(), logits.argmax(-1).cpu()


def loss_lines(data: str, scored: list[Scored]) -> list[dict[str, Any]]:
    """One line for each kind of prompt and attention after it, over all sequences."""
    reference = FULL_PROMPT, FULL
    lines = []
    for key in scored[0]:
        means = [float(row[key][0].double().mean()) for row in scored]
        over = [mean - float(row[reference][0].double().mean()) for mean, row in zip(means, scored, strict=True)]
        error = statistics.stdev(over) / len(over) ** 0.5 if len(over) > 1 else None
        agreeing = [float((row[key][1] == row[reference][1]).double().mean()) for row in scored]
        lines.append(
            {
                "text": Path(data).name,
                "prompt": key[0],
                "then": key[1],
                "nats": round(statistics.fmean(means), 5),
                "over full": round(statistics.fmean(over), 5),
                "±": None if error is None else round(error, 5),
                "agreement": round(statistics.fmean(agreeing), 4),
                "computed": round(statistics.fmean(row[key][2] for row in scored)),
                "rows": len(scored),
                "over full of rows": over,
            }
        )
    return lines


# ---- times


def measure_times(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Adds the table lines of each way to the results."""
    model = enable(random_llama(args, args.device, getattr(torch, args.dtype)), RefreshConfig.recommended())
    generator = torch.Generator().manual_seed(0)
    lengths = [args.document_tokens] * args.documents + [args.question_tokens]
    parts = [torch.randint(3, args.vocabulary, (length,), generator=generator) for length in lengths]
    store = PrefixStore(None, 10**12, model)
    began = time.perf_counter()
    for part in parts[:-1]:
        store.put_chunk(part)
    seconds = time.perf_counter() - began
    print(f"{args.documents} documents computed and stored in {seconds:.2f} s, {store.size / 1e9:.2f} GB", flush=True)
    for name, amount in {FULL_PROMPT: None, **ways(args)}.items():
        if args.device == "cuda":
            free_memory()
            torch.cuda.reset_peak_memory_stats()
        runs = [first_token(model, store, parts, amount) for _ in range(1 + args.repeat)][1:]
        peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else 0.0
        total, loading = (statistics.median(column) for column in list(zip(*runs, strict=True))[:2])
        line = {"prompt": name, "first token ms": round(total * 1e3, 1), "load ms": round(loading * 1e3, 1)}
        whole = results["time"][0]["first token ms"] if results["time"] else line["first token ms"]
        line |= {"times faster": round(whole / line["first token ms"], 2), "recomputed": runs[0][2]}
        results["time"].append(line | {"peak GB": round(peak, 2), "runs ms": [round(run[0] * 1e3, 1) for run in runs]})
        save(args.output, "chunks.json", results)


@torch.no_grad()
def first_token(
    model, store: PrefixStore, parts: list[Tensor], amount: dict[str, Any] | None
) -> tuple[float, float, int]:
    """Seconds to the first token after documents and a question, those of the host in `load_chunks`, and the tokens
    that were computed again; amount None computes the whole prompt."""
    cache = RefreshCache(model.config, sum(map(len, parts)) + 1)
    wait(model)
    began = time.perf_counter()
    reuse = None if amount is None else load_chunks(store, cache, parts[:-1], **amount)
    ids = torch.cat(parts if amount is None else parts[-1:]).unsqueeze(0).to(model.device)
    model(ids, **as_keyword(cache), use_cache=True, logits_to_keep=1).logits.argmax(-1).item()  # waits for the GPU
    seconds = time.perf_counter() - began
    return seconds, 0.0 if reuse is None else reuse.seconds, 0 if reuse is None else reuse.recomputed_tokens


def wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def table(lines: list[dict[str, Any]], text_columns: int) -> str:
    """All values but those of single rows and runs."""
    titles = [name for name, value in lines[0].items() if not isinstance(value, list)]
    cells = [["" if line[name] is None else str(line[name]) for name in titles] for line in lines]
    return column_table([titles, *cells], text_columns)


if __name__ == "__main__":
    main()
