"""Generation: milliseconds a token from full and from small caches, random weights and a random context, on one GPU.

    python benchmarks/decode.py [--cases 32768:1,32768:8,131072:1,16384:32] [--strategies full,refresh,static] ...

A case is CONTEXT:BATCH. The model has Llama-3.1-8B's shape unless told otherwise; nothing is downloaded, and no prompt
is processed: caches are filled with random keys and values. `--loop ahead` and `--loop generate` time generate(), which
compiles the step and captures it into a CUDA graph, with our loop and with transformers' own; `--loop graph` captures
the uncompiled step: quicker to set up. Without --loop our strategies take our loop and transformers' caches theirs. A
text may end early as far as the loops know, but never does.

Strategies: full, refresh (fixed schedule), similarity (the same full steps, decided by comparing queries),
select:2:4bit (no full steps; a selecting step every 2 tokens by score keys of 4 bits, or other numbers), offloaded and
offloaded-select:2:4bit (refresh or select with the full keys and values in host memory; the bound leaves the bus out,
and `fetched` is the share of the chosen tokens that the last selecting step fetched; with --alike successive choices
have more tokens in common),
lossless:2:4bit (drafts by select:2:4bit, checked by full attention; weights are random, so a coin of --acceptance
decides how many drafts are right; the time is that of the rounds, without the prompt; the parts of a round are timed in
a generation of their own, on the device: `queue_step` is the first step of the next round, and `draft` the others),
streaming, h2o, snapkv; static and dynamic are transformers' own caches. `GB moved` is what a token's step has to read.
Prints a line for each, with --kernels where the time of its steps goes, by torch's profiler, and a table of all at the
end; --output DIR writes decode.json after each line, and decode.png. With --terms every case is timed three times: with
the ordinary softmax, with attention sinks (`refresh+sinks`) and with a softcap (`refresh+softcap`); full, refresh,
similarity and select take them.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, LlamaForCausalLM, LogitsProcessor, StaticCache

from kernel_times import KernelTimes
from measuring import SHAPE, add_shape, copy_bandwidth, free_memory, random_llama, use_streams
from output import pyplot, save
from refreshkv import (
    NEVER,
    DraftCounts,
    RefreshCache,
    RefreshConfig,
    decode_ahead,
    decode_lossless,
    enable,
    tuned_compilation,
)
from refreshkv.baselines.compact import CompactLayer
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.cache.fetching import FetchingLayer
from refreshkv.cache.keyword import as_keyword, given_cache
from refreshkv.cache.preallocated import PreallocatedCache
from refreshkv.cache.row_lengths import RowLengths
from refreshkv.generation import lossless
from refreshkv.tables import column_table

CASES = "32768:1,32768:8,131072:1,16384:32"
REFRESHING = ("refresh", "similarity", "offloaded")
OURS = ("full", *REFRESHING, "streaming", "h2o", "snapkv")
SELECTING = re.compile(r"(?P<offloaded>offloaded-)?(?P<kind>select|lossless):(?P<stride>\d+):(?P<bits>\d+)bit")
"""Strategies with selecting steps."""
TERMS = ("", "+sinks", "+softcap")
"""What --terms appends to the names of strategies."""
TAKE_TERMS = ("full", "refresh", "similarity", "select")
"""Strategies, without what follows a colon, that can be timed with --terms."""
SOFTCAP = 50.0
"""Gemma 2's."""


def main() -> None:
    args = read_arguments()
    model = random_llama(args, "cuda", torch.bfloat16)
    enable(model, refresh_config(args))
    use_streams()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    results = []
    for case in args.cases.split(","):
        context, batch = map(int, case.split(":"))
        for strategy, terms in [(name, terms) for name in args.strategies.split(",") for terms in timed_terms(args)]:
            time_it = time_lossless if strategy.startswith("lossless") else time_strategy
            try:
                with added_terms(model, terms), alike_queries(model, args.alike):
                    result = time_it(model, strategy, context, batch, bandwidth, args)
            except torch.OutOfMemoryError:
                result = {"context": context, "batch": batch, "strategy": strategy, "ms": None}
            result |= {"strategy": strategy + terms, **({"alike": args.alike} if args.alike else {})}
            results.append(result)
            print(json.dumps(result), flush=True)
            forget()
            save(args.output, "decode.json", results)
    print(table(results))
    if args.output:
        plot(results, args.output / "decode.png")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="CONTEXT:BATCH, separated by commas (default: %(default)s)")
    parser.add_argument("--strategies", default="full,refresh", help="separated by commas (default: %(default)s)")
    parser.add_argument("--loop", choices=("ahead", "generate", "graph"), help="for all strategies (default: above)")
    parser.add_argument("--tuned", action="store_true", help="compile for one sequence: tuned_compilation()")
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--budget", type=float, default=0.125, help="a fraction of the context, or whole tokens if > 1")
    parser.add_argument("--acceptance", type=float, default=0.95, help="of drafts (default: %(default)s)")
    parser.add_argument("--compile-blocks", action="store_true", help="compile the blocks of lossless decoding too")
    parser.add_argument("--observation-window", type=int, default=1)
    parser.add_argument("--pool-kernel", type=int, default=RefreshConfig.pool_kernel)
    parser.add_argument(
        "--recommended", action="store_true", help="selecting strategies with RefreshConfig.recommended()"
    )
    parser.add_argument("--cycles", type=int, default=5, help="strides that are timed, after two to warm up")
    parser.add_argument("--terms", action="store_true", help="with attention sinks and with a softcap as well")
    parser.add_argument(
        "--alike", type=float, default=0.0, help="share of each query that is the same for all tokens (default: none)"
    )
    parser.add_argument("--kernels", action="store_true", help="where the time of --stride further steps goes")
    add_shape(parser, SHAPE)
    parser.add_argument("--quick", action="store_true", help="4 layers, 4K and 8K contexts: does everything run?")
    parser.add_argument("--output", type=Path, help="folder for decode.json and decode.png")
    args = parser.parse_args()
    if args.tuned and args.loop == "graph":
        parser.error("--tuned is about compiling, and --loop graph captures the uncompiled step: leave one out")
    for strategy in args.strategies.split(",") if args.terms else ():
        if strategy.partition(":")[0] not in TAKE_TERMS:  # static and dynamic would ignore the terms
            parser.error(f"--terms: {strategy} takes no sinks and no softcap: leave it out of --strategies")
    if args.recommended and (args.observation_window, args.pool_kernel) != (1, RefreshConfig.pool_kernel):
        parser.error("--recommended brings its own selection: leave out --observation-window and --pool-kernel")
    if args.compile_blocks and "lossless" not in args.strategies:
        parser.error("--compile-blocks is about lossless decoding: add a strategy such as lossless:8:4bit")
    if args.kernels and "lossless" in args.strategies:
        parser.error("--kernels does not follow lossless decoding, whose parts are timed anyway: leave one of them out")
    if args.quick:
        args.layers, args.cases, args.cycles = 4, "4096:1,8192:4", 2
    args.budget = int(args.budget) if args.budget > 1 else args.budget
    return args


def timed_terms(args: argparse.Namespace) -> tuple[str, ...]:
    return TERMS if args.terms else TERMS[:1]


@contextmanager
def added_terms(model: LlamaForCausalLM, terms: str) -> Iterator[None]:
    """Gives every layer's softmax random sinks, or a softcap, as the attention of gpt-oss and of Gemma 2 does."""
    with ExitStack() as hooks:
        for layer in cast(Any, model.model.layers) if terms else ():
            sinks = torch.randn(model.config.num_attention_heads, device=model.device, dtype=model.dtype)
            keyword = {"s_aux": sinks} if terms == "+sinks" else {"softcap": SOFTCAP}
            hook = partial(_add_keyword, keyword)
            hooks.enter_context(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
        yield


@contextmanager
def alike_queries(model: LlamaForCausalLM, share: float) -> Iterator[None]:
    """Mixes into the queries of each layer, before the rotary embedding, one vector that is the same for all tokens. It
    makes up this share of their mean square. Successive choices then have tokens in common, as in trained models."""
    with ExitStack() as hooks:
        for layer in cast(Any, model.model.layers) if share else ():
            project = layer.self_attn.q_proj
            rows, inputs = project.weight.shape
            size = project.weight.float().std() * inputs**0.5  # of a query's numbers: a norm makes its inputs of size 1
            same = (torch.randn(rows, device=model.device) * size * share**0.5).to(model.dtype)
            hooks.enter_context(project.register_forward_hook(partial(_make_alike, same, (1 - share) ** 0.5)))
        yield


def _make_alike(same: Tensor, rest: float, module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
    return same + rest * output


def _add_keyword(keyword: dict[str, Any], module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, **keyword}


def refresh_config(args: argparse.Namespace, threshold: float | None = None) -> RefreshConfig:
    selection = {"observation_window": args.observation_window, "pool_kernel": args.pool_kernel}
    return RefreshConfig(budget=args.budget, stride=args.stride, threshold=threshold, **selection)


def selecting_config(strategy: str, args: argparse.Namespace) -> RefreshConfig | None:
    """The configuration of a strategy with selecting steps, None for others."""
    found = SELECTING.fullmatch(strategy)
    if found is None:
        return None
    stride, bits = int(found["stride"]), int(found["bits"])
    config = RefreshConfig.recommended(budget=args.budget) if args.recommended else refresh_config(args)
    return replace(config, stride=NEVER, select_stride=stride, score_bits=cast(Any, bits))


def is_ours(strategy: str) -> bool:
    return strategy in OURS or SELECTING.fullmatch(strategy) is not None


def make_cache(model: LlamaForCausalLM, strategy: str, capacity: int, budget: int, args: argparse.Namespace):
    config, selecting = model.config, selecting_config(strategy, args)
    if selecting is not None:
        return RefreshCache(config, capacity, selecting, offload=strategy.startswith("offloaded"))
    makers = {
        "full": lambda: FullCache(config, capacity),
        "refresh": lambda: RefreshCache(config, capacity, refresh_config(args)),
        "similarity": lambda: RefreshCache(config, capacity, refresh_config(args, threshold=2.0)),
        "offloaded": lambda: RefreshCache(config, capacity, refresh_config(args), offload=True),
        "streaming": lambda: StreamingCache(config, capacity, budget),
        "h2o": lambda: H2OCache(config, capacity, budget),
        "snapkv": lambda: SnapKVCache(config, capacity, budget),
        "static": lambda: StaticCache(config=config, max_cache_len=capacity),
        "dynamic": lambda: DynamicCache(config=config),
    }
    return makers[strategy]()


def head_shape(model: LlamaForCausalLM) -> tuple[int, int, int]:
    """Query heads, key heads and the size of a head, all of which the configuration of a built model has."""
    config = model.config
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


@torch.no_grad()
def fill(cache: Cache, model: LlamaForCausalLM, batch: int, context: int, budget: int) -> int:
    """Random keys and values as if a prompt had been processed; returns the number of tokens that the cache counts.

    A compact cache gets a prompt of its budget: the rest would be gone anyway.
    """
    heads, kv_heads, head_dim = head_shape(model)
    ours, layers = isinstance(cache, PreallocatedCache), cast(list[Any], cache.layers)
    compact = ours and isinstance(layers[0], CompactLayer)
    length = budget if compact else context
    # queries of a whole prompt would take memory that decoding does not: all but the last tokens were there before
    known = max(0, length - 64) if ours and not compact else 0

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, head_dim, device=model.device, dtype=model.dtype)

    for layer in layers if known > 0 else ():
        layer.load_prefix(*(random(kv_heads, known) for _ in range(2)))
    padding = torch.zeros(batch, dtype=torch.int64, device=model.device)
    for index in range(model.config.num_hidden_layers):
        keys, values = (random(kv_heads, length - known) for _ in range(2))
        cache.update(keys, values, index)
        if ours:
            query = random(heads, length - known)
            layers[index].end_block(query, padding, head_dim**-0.5)
    return length


def time_strategy(
    model: LlamaForCausalLM, strategy: str, context: int, batch: int, bandwidth: float, args: argparse.Namespace
) -> dict[str, object]:
    forget()
    torch.cuda.reset_peak_memory_stats()
    selecting = selecting_config(strategy, args)
    stride, steps = args.stride, args.stride * (args.cycles + 2)
    # every `period`-th step is full or selecting
    period = stride if selecting is None or selecting.select_stride is None else selecting.select_stride
    budget = RefreshConfig(budget=args.budget).largest_budget(context)
    model.set_attn_implementation("refreshkv" if is_ours(strategy) else "sdpa")
    clock = Clock(steps, args.stride if args.kernels else 0)
    cache = make_cache(model, strategy, context + clock.marks + 8, budget, args)
    length = fill(cache, model, batch, context, budget)
    begun = time.perf_counter()
    loop = loop_of(strategy, args.loop)
    if loop == "graph":
        run_graph(model, cache, batch, length, clock)
    else:
        run_generate(model, cache, batch, length, clock, args.tuned, decode_ahead if loop == "ahead" else None)
    times = clock.times()
    seconds = time.perf_counter() - begun
    # times[j] is that of step j + 2 after the prompt; two strides warm up
    timed = [(step, ms) for step, ms in enumerate(times, start=2) if step > 2 * stride]
    timed = timed[: len(timed) // period * period]
    long = [ms for step, ms in timed if step % period == 0]
    partial = [ms for step, ms in timed if step % period != 0]
    if clock.kernels is not None:
        print(clock.kernels.table(clock.recorded), flush=True)
    refreshes = strategy in REFRESHING or selecting is not None
    bytes_long, bytes_partial = bytes_moved(model, context, batch, budget, strategy, selecting)
    mean_bytes = (bytes_long + (period - 1) * bytes_partial) / period if refreshes else bytes_long
    # medians weighted as they occur: a hiccup of the host is not the method's
    typical = statistics.median(long + partial)
    if refreshes and partial:
        typical = (statistics.median(long) + (period - 1) * statistics.median(partial)) / period
    bound = mean_bytes / bandwidth * 1e3
    return {
        "context": context,
        "batch": batch,
        "strategy": strategy,
        "loop": loop,
        "tuned": args.tuned,
        "ms": round(typical, 3),
        "mean ms": round(statistics.mean(ms for _, ms in timed), 3),
        "full step": round(statistics.median(long), 3) if refreshes and selecting is None else None,
        "selecting step": round(statistics.median(long), 3) if selecting is not None else None,
        "partial step": round(statistics.median(partial), 3) if refreshes and partial else None,
        "tokens/s": round(batch / typical * 1e3, 1),
        "fetched": fetched_share(cache),
        "GB moved": round(mean_bytes / 1e9, 2),
        "bound ms": round(bound, 2),
        "ms / bound": round(typical / bound, 2),
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "seconds": round(seconds, 1),
    }


def time_lossless(
    model: LlamaForCausalLM, strategy: str, context: int, batch: int, bandwidth: float, args: argparse.Namespace
) -> dict[str, object]:
    """Milliseconds a token of the slowest batch row, without the first token, which is the prompt's. The bound is full
    attention's, which this is to beat."""
    forget()
    torch.cuda.reset_peak_memory_stats()
    model.set_attn_implementation("refreshkv")
    new = args.stride * args.cycles
    capacity = context + 4 * new + 8
    cache = make_cache(model, strategy, capacity, RefreshConfig(budget=args.budget).largest_budget(context), args)
    length = fill(cache, model, batch, context, 0)
    with CapturedStep(model).used() if args.loop == "graph" else nullcontext():
        # as many tokens before, to warm up
        run = partial(run_lossless, model, cache, batch, length, compile_blocks=args.compile_blocks)
        ids, warm_up, _ = run(new, args.acceptance)
        ids, seconds, counts = run(new, args.acceptance, ids)
        with (times := RoundTimes()).taken():
            run(new // 2, args.acceptance, ids)
    bytes_full, _ = bytes_moved(model, context, batch, 0, "full", None)
    per_token = seconds / (new - 1)
    return {
        "context": context,
        "batch": batch,
        "strategy": strategy,
        "loop": "graph" if args.loop == "graph" else "lossless",
        "tuned": False,
        "ms": round(per_token * 1e3, 3),
        "mean ms": round(per_token * 1e3, 3),
        "tokens/s": round(batch / per_token, 1),
        "GB moved": round(bytes_full / 1e9, 2),
        "bound ms": round(bytes_full / bandwidth * 1e3, 2),
        "ms / bound": round(per_token / bytes_full * bandwidth, 2),
        "acceptance": round(counts.acceptance, 3),
        "tokens a round": round(counts.tokens_per_round, 2),
        "drafts a round": round(counts.steps / counts.rounds, 2),
        "a round, ms": round(seconds / counts.rounds * 1e3, 2),
        **times.medians(),
        "compiled blocks": args.compile_blocks,
        "warm-up, s": round(warm_up, 1),
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }


class CapturedStep:
    """The uncompiled step of drafts as one CUDA graph, for decode_lossless in place of the compiled step."""

    def __init__(self, model: LlamaForCausalLM):
        self.model: Any = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm = False

    @contextmanager
    def used(self) -> Iterator[None]:
        """Makes the model return this as its compiled call."""
        self.model.get_compiled_call = lambda config: self
        try:
            yield
        finally:
            del self.model.get_compiled_call

    def __call__(self, input_ids: Tensor, position_ids: Tensor, **settings: Any) -> Any:
        if not self.is_warm:  # compiles the kernels
            self.is_warm = True
            self.ids, self.positions = input_ids.clone(), position_ids.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output = self.model(input_ids=self.ids, position_ids=self.positions, **settings)
            torch.cuda.current_stream().wait_stream(stream)
            return output
        self.ids.copy_(input_ids)
        self.positions.copy_(position_ids)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.model(input_ids=self.ids, position_ids=self.positions, **settings)
        self.graph.replay()
        for layer in given_cache(settings).layers:  # only the device knows now
            layer.known_length = None
        return self.output


class RoundTimes:
    """Milliseconds of each part of a round on the device, between two events: before the part queues its work, and
    after. The host does not wait."""

    PARTS = (
        (lossless, "_draft"),
        (lossless._Passes, "block"),
        (lossless._Passes, "accept"),
        (lossless._Passes, "queue_step"),
        (lossless, "_round"),
    )

    def __init__(self):
        self.marks: dict[str, list[tuple[Mark, Mark]]] = {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Measures all calls."""
        originals = [(holder, name, getattr(holder, name)) for holder, name in self.PARTS]
        try:
            for holder, name, original in originals:
                setattr(holder, name, self._timed(name.strip("_"), original))
            yield
        finally:
            for holder, name, original in originals:
                setattr(holder, name, original)

    def _timed(self, name: str, work: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = Mark()
            result = work(*args, **kwargs)
            self.marks.setdefault(f"{name}, ms", []).append((begin, Mark()))
            return result

        return timed

    def medians(self) -> dict[str, float]:
        """The median of each part."""
        synchronized_time()  # the device has passed all marks
        return {
            name: round(statistics.median(begin.milliseconds_to(end) for begin, end in marks), 2)
            for name, marks in self.marks.items()
        }


class Mark:
    """A point in the device's work; without a GPU in the host's."""

    def __init__(self):
        self.seconds = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self.event is not None:
            self.event.record()

    def milliseconds_to(self, later: "Mark") -> float:
        """The time until a later mark. The device must have passed both."""
        if self.event is None or later.event is None:
            return (later.seconds - self.seconds) * 1e3
        return self.event.elapsed_time(later.event)


class TimedRows(RowLengths):
    """Takes the time from after the prompt to the end of the last round."""

    seconds = 0.0

    def __init__(self, cache: RefreshCache):
        super().__init__(cache)
        self.begun_at = synchronized_time()

    def restore(self) -> None:
        """Stops the time."""
        TimedRows.seconds = synchronized_time() - self.begun_at
        super().restore()


def synchronized_time() -> float:
    """Seconds of the clock, once the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_lossless(
    model: LlamaForCausalLM,
    cache: RefreshCache,
    batch: int,
    length: int,
    new: int,
    acceptance: float,
    ids: Tensor | None = None,
    compile_blocks: bool = False,
) -> tuple[Tensor, float, DraftCounts]:
    """Generates `new` tokens of each batch row behind ids, or behind random ids for the `length` tokens in the cache.
    Returns the texts, the seconds of the rounds, and what was accepted."""
    if ids is None:
        ids = torch.randint(1, model.config.vocab_size, (batch, length + 1), device=model.device)
    original, counts = lossless.Rules.judge, DraftCounts()
    lossless.Rules.judge, lossless.RowLengths = judge_by_coin(acceptance), TimedRows
    try:
        texts: Tensor = model.generate(  # pyright: ignore[reportAttributeAccessIssue]  # as in run_generate
            ids,
            attention_mask=torch.ones_like(ids),
            **as_keyword(cache),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            custom_generate=decode_lossless,
            drafts=counts,
            compile_blocks=compile_blocks,
            compile_config=CompileConfig(dynamic=False),
        )
    finally:
        lossless.Rules.judge, lossless.RowLengths = original, RowLengths
    return texts, TimedRows.seconds, counts


def judge_by_coin(acceptance: float) -> Callable:
    """`Rules.judge` of greedy search, where each draft is right with this probability."""

    def judge(rules: lossless.Rules, drafts: Tensor, drafted: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        right = torch.rand(drafts.shape, device=drafts.device) < acceptance
        accepted = right.long().cumprod(dim=1).sum(dim=1)
        return accepted, wanted.argmax(dim=-1).gather(1, accepted[:, None]).squeeze(1)

    return judge


def fetched_share(cache: Cache) -> float | None:
    """The mean over layers, batch rows and heads of what the last selecting step of an offloaded cache fetched, of what
    it chose; None for other caches."""
    layers = [layer for layer in cache.layers if isinstance(layer, FetchingLayer)]
    shares = [(layer.near().fetched >= 0).float().mean() for layer in layers]
    return round(float(torch.stack(shares).mean()), 3) if shares else None


def loop_of(strategy: str, asked: str | None) -> str:
    """The loop that a strategy is timed in; what the host decides cannot be captured into a graph."""
    own = "ahead" if is_ours(strategy) else "generate"
    is_led_by_host = strategy in ("dynamic", "offloaded")
    return own if asked is None or (asked == "graph" and is_led_by_host) else asked


class Clock(LogitsProcessor):
    """Marks when each step's logits are there, `steps` times; the kernels of `recorded` further steps are recorded."""

    def __init__(self, steps: int, recorded: int = 0):
        self.steps, self.recorded = steps, recorded
        self.kernels = KernelTimes() if recorded else None
        self.events: list[torch.cuda.Event] = []

    @property
    def marks(self) -> int:
        """How many marks a run has: a step lies between two of them."""
        return self.steps + (self.recorded + 1 if self.recorded else 0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.events.append(torch.cuda.Event(enable_timing=True))
        self.events[-1].record()
        if self.kernels is not None and len(self.events) == self.marks - self.recorded:
            self.kernels.start()
        elif self.kernels is not None and len(self.events) == self.marks:
            self.kernels.stop()
        return scores

    def times(self) -> list[float]:
        """Milliseconds of the steps between the first marks."""
        torch.cuda.synchronize()
        events = self.events[: self.steps]
        return [first.elapsed_time(second) for first, second in zip(events, events[1:], strict=False)]


def run_generate(
    model: LlamaForCausalLM, cache, batch: int, length: int, clock: Clock, tuned: bool, loop: Callable | None
) -> None:
    compiled = tuned_compilation() if tuned else CompileConfig(dynamic=False)
    ids = torch.randint(0, model.config.vocab_size, (batch, length + 1), device="cuda")
    model.generate(  # pyright: ignore[reportAttributeAccessIssue]  # a protocol that transformers' own models miss
        ids,
        attention_mask=torch.ones_like(ids),
        **as_keyword(cache),
        max_new_tokens=clock.marks,
        do_sample=False,
        eos_token_id=model.config.vocab_size,  # looked for, and never there
        pad_token_id=0,
        custom_generate=loop,
        logits_processor=[clock],
        compile_config=None if isinstance(cache, DynamicCache) else compiled,
    )


@torch.no_grad()
def run_graph(model: LlamaForCausalLM, cache, batch: int, length: int, clock: Clock) -> None:
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")

    def step() -> None:
        position_ids = cache.get_seq_length().clone().expand(batch, 1)
        ids.copy_(model(ids, position_ids=position_ids, **as_keyword(cache)).logits[:, -1:].argmax(-1))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    clock(ids, ids)
    for _ in range(clock.marks - 1):
        graph.replay()
        clock(ids, ids)


def bytes_moved(
    model: LlamaForCausalLM,
    context: int,
    batch: int,
    budget: int,
    strategy: str,
    selecting: RefreshConfig | None,
) -> tuple[float, float]:
    """What a full or selecting step and a partial one have to read: weights but for the embedding, keys and values, and
    at selecting steps the score keys of all tokens."""
    config, (_, kv_heads, head_dim) = model.config, head_shape(model)
    weights = 2.0 * (
        sum(parameter.numel() for parameter in model.parameters()) - config.vocab_size * config.hidden_size
    )
    heads = config.num_hidden_layers * kv_heads * batch
    token = 4 * heads * head_dim
    if selecting is not None:
        score_key = head_dim * selecting.score_bits // 8 + (4 if selecting.score_bits < 16 else 0)
        return weights + token * budget + heads * score_key * context, weights + token * budget
    whole = budget if strategy in ("streaming", "h2o", "snapkv") else context
    return weights + token * whole, weights + token * budget


def forget() -> None:
    """What was compiled and what nothing uses any more."""
    torch._dynamo.reset()
    free_memory()


def table(results: list[dict[str, object]]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result))
    lines = [names]
    for result in results:
        lines.append(["" if result.get(name) is None else str(result[name]) for name in names])
    return column_table(lines, text_columns=0)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    results = [result for result in results if result["ms"] is not None]
    cases = list(dict.fromkeys((result["context"], result["batch"]) for result in results))
    strategies = list(dict.fromkeys(result["strategy"] for result in results))
    width = 0.8 / len(strategies)
    figure, axes = pyplot().subplots(figsize=(9, 4.5), layout="constrained")
    for number, strategy in enumerate(strategies):
        here = [result for result in results if result["strategy"] == strategy]
        places = [cases.index((result["context"], result["batch"])) + number * width for result in here]
        axes.bar(places, [result["ms"] for result in here], 0.9 * width, label=strategy)
        bounds = [result["bound ms"] for result in here]
        label = "bytes over bandwidth" if number == 0 else None
        axes.scatter(places, bounds, marker="_", color="black", label=label, zorder=3)
    centre = 0.4 - width / 2
    axes.set_xticks([place + centre for place in range(len(cases))])
    axes.set_xticklabels([f"{context // 1024}K tokens\nbatch {batch}" for context, batch in cases])
    axes.set_ylabel("milliseconds a token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
