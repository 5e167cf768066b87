"""Whole training steps of a model's shape, by default Llama-3.1-8B's, from random weights: time, MFU, memory predicted
and measured.

    deepspeed --num_gpus 2 benchmarks/training.py --cases 8192:off,8192:paper,32768:off,32768:whole --output DIR
    deepspeed --num_gpus 2 benchmarks/training.py --cases 131072:whole --sequence 2 --output DIR
    deepspeed --num_gpus 1 benchmarks/training.py --shape smollm2-135m --micro-batch 8 --checkpointing 0 --steps 20 \\
        --kernels liger --deepspeed-json configs/deepspeed/zero0.json \\
        --cases 8192:off,8192:whole,8192:drawn,8192:select,8192:recommended
    deepspeed --num_gpus 1 benchmarks/training.py --shape a3b-4-layers --cases 8192:off,8192:whole
    python benchmarks/training.py --table DIR

A case is T:PATTERN. off: plain training. paper: the last 50 tokens partial, never refreshed. whole: P = T/2, S = 10.
drawn: each step draws P from T/4 to T - 50 and S from 5, 10, 25 and 50. select: P = T/2, a selecting step every second
token by keys of 4 bits, no full ones. recommended: the simulation of configs/llama31-8b-8k-whole.yaml, in which each
token selects, a quarter of the steps is plain, and the others draw P and one of three K. K is at most 2048 and T/8.

--micro-batch rows per group of --sequence GPUs, ZeRO 3, bfloat16, by default all layers recomputed and the settings of
configs/deepspeed/zero3.json. Steps are those of launch/train.py, optimizer included. Rows are random tokens, or real
ones of a folder from launch/prepare.py with --rows. A case's time is the median of its steps. Where steps draw, it is
their mean, and all of them run once before they are timed.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import refreshkv
from refreshkv import Simulation
from refreshkv.attention import sequence_parallel
from refreshkv.data.rows import load_rows
from refreshkv.settings import settings_from_dict
from refreshkv.simulation.draw import draw_simulation
from refreshkv.tables import markdown_table
from refreshkv.train.batch import Batch, make_batch
from refreshkv.train.config import RunConfig
from refreshkv.train.engine import build_engine, init_processes
from refreshkv.train.flops import peak_flops, step_flops
from refreshkv.train.job import Job, resolve
from refreshkv.train.kernels import use_liger, validate_kernels
from refreshkv.train.loss import CausalLossModel
from refreshkv.train.memory import allocated, memory_needed
from refreshkv.train.mock import mock_step
from refreshkv.train.recomputation import recompute_layers
from refreshkv.train.step import train_step
from refreshkv.train.step_time import matmul_rate, step_seconds

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 1 << 20}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY |= {"num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 1 << 20}
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
EXPERTS |= {"vocab_size": 151936, "max_position_embeddings": 1 << 20}
"""Qwen3-30B-A3B's experts and widths, with 4 of its 48 layers and half its query heads: 3.1 billion parameters."""
SHAPES = {"llama31-8b": LLAMA, "smollm2-135m": SMOLLM2, "a3b-4-layers": EXPERTS, "tiny": TINY}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="8192:off,8192:paper,32768:off,32768:whole")
    parser.add_argument("--sequence", type=int, default=1, help="GPUs per row")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each, after one to warm up")
    parser.add_argument("--rows", help="folder of prepared rows, at least as long")
    parser.add_argument("--micro-batch", type=int, default=1, help="training.micro_batch")
    parser.add_argument("--kernels", default="torch", help="training.kernels")
    parser.add_argument("--checkpointing", type=float, default=1.0, help="training.activation_checkpointing, a share")
    parser.add_argument("--loss", default="chunked", help="training.loss")
    parser.add_argument("--optimizer", default="adamw", help="training.optimizer")
    parser.add_argument("--deepspeed-json", default=str(ROOT / "configs" / "deepspeed" / "zero3.json"))
    parser.add_argument("--offload", action="store_true", help="training.activation_offload")
    parser.add_argument("--shape", choices=SHAPES, default="llama31-8b", help="the model's shape (%(default)s)")
    parser.add_argument(
        "--tiny", action="store_const", const="tiny", dest="shape", help="--shape tiny, to try this without a GPU"
    )
    parser.add_argument("--profile", action="store_true", help="print where a step of the first case spends its time")
    parser.add_argument("--output", type=Path, help="folder to which results are added")
    parser.add_argument("--table", type=Path, help="print the results in this folder and end")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in (args.table / "training.jsonl").read_text().splitlines()]))
        return
    rank, world = init_processes()
    results = measure_all(args, rank, world)
    if rank == 0:
        print(table(results))
    dist.destroy_process_group()


def measure_all(args: argparse.Namespace, rank: int, world: int) -> list[dict]:
    """Measures all cases on one engine; each result is printed, and added to the output, when it is known."""
    cases = [(int(length), pattern) for length, pattern in (case.split(":") for case in args.cases.split(","))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = resolve(run_config(args, *cases[0], world, device), world, dry=True)
    engine, rate = build(args, job, device), matmul_rate(device, job.config.training.dtype)
    results = []
    for length, pattern in cases:
        job = job.with_settings(run_config(args, length, pattern, world, device))
        results.append({"T": length, "pattern": pattern, **result(engine, job, args, rank, rate)})
        if rank == 0:
            print(json.dumps(results[-1]), flush=True)
            if args.output:
                args.output.mkdir(parents=True, exist_ok=True)
                with (args.output / "training.jsonl").open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
        if args.profile and len(results) == 1:
            profile_step(engine, job.config, args, rank, world)
    return results


def build(args: argparse.Namespace, job: Job, device: torch.device):
    """The engine of a model with random weights."""
    validate_kernels(job.config.training, job.model_config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:  # random weights are made faster on the GPU, and ZeRO divides them
        model = AutoModelForCausalLM.from_config(job.model_config, dtype=dtype)
    refreshkv.enable(model, job.config.refresh)
    if args.kernels == "liger":
        use_liger(model)
    if args.checkpointing:
        recompute_layers(model, args.checkpointing, args.offload)
    mpu = sequence_parallel.start(model, args.sequence, args.micro_batch)
    return build_engine(CausalLossModel(model, args.loss), job, mpu)


def result(engine, job: Job, args: argparse.Namespace, rank: int, rate: float) -> dict:
    """Measures one case; what was measured and what was predicted, by the names of the table's columns."""
    config, world, length = job.config, job.world, job.config.data.row_length
    steps = range(1 + args.steps)  # the first is not timed
    simulations = [draw_simulation(config.simulation, config.refresh, length, 0, step) for step in steps]
    seconds, memory = measure(engine, config, simulations, args, rank, world)
    flops = [step_flops(job.shape.work, config.training.global_batch, length, timed) for timed in simulations[1:]]
    peak = peak_flops(engine.device, config.training.dtype)
    return {
        "GPUs": world,
        "sequence": args.sequence,
        "micro-batch": args.micro_batch,
        "kernels": args.kernels,
        "optimizer": args.optimizer,
        "recomputed": args.checkpointing,
        "offload": args.offload,
        "DeepSpeed": Path(args.deepspeed_json).stem,
        "step s": seconds,
        "predicted s": step_seconds(job, rate),
        "MFU": statistics.mean(flops) / seconds / world / peak if peak else None,
        "memory GB": memory / 1e9,
        "predicted GB": allocated(memory_needed(job)) / 1e9,
        "tokens/s": config.training.global_batch * length / seconds,
    }


def run_config(args: argparse.Namespace, length: int, pattern: str, world: int, device: torch.device) -> RunConfig:
    """The settings of a case, as a run would have them."""
    simulation = {"off": {"pattern": "off"}, "paper": {"pattern": "paper", "stride": 50}}
    simulation["whole"] = {"pattern": "whole", "prompt_length": length // 2, "stride": 10}
    simulation["drawn"] = {"prompt_length": [length // 4, length - 50], "stride": [5, 10, 25, 50]}
    simulation["select"] = {"prompt_length": length // 2, "stride": "never", "select_stride": 2}
    budget = min(2048, length // 8)
    simulation["recommended"] = {"stride": "never", "select_stride": 1, "plain_share": 0.25}
    simulation["recommended"] |= {"budget": [budget, budget // 2, budget // 4]}
    refresh = {"budget": budget, "select_stride": 2, "score_bits": 4}
    if pattern == "recommended":
        refresh = {"budget": budget, "preset": "recommended"}
    training = {
        "deepspeed": args.deepspeed_json,
        "dtype": "bf16" if device.type == "cuda" else "fp32",
        "micro_batch": args.micro_batch,
        "optimizer": args.optimizer,
    }
    training |= {"global_batch": world // args.sequence * args.micro_batch, "loss": args.loss, "kernels": args.kernels}
    training |= {"activation_checkpointing": args.checkpointing, "activation_offload": args.offload, "steps": 1000}
    values = {"data": {"row_length": length}, "refresh": refresh, "training": training}
    values |= {"simulation": simulation[pattern], "parallel": {"sequence": args.sequence}}
    values["model"] = {"scratch": SHAPES[args.shape]}
    return settings_from_dict(RunConfig, values)


def measure(
    engine, config: RunConfig, simulations: list[Simulation | None], args: argparse.Namespace, rank: int, world: int
) -> tuple[float, float]:
    """Takes a training step with each of `simulations`, twice if they differ. Returns the seconds of a step without the
    first one (the median, or the mean if they differ) and the largest peak of any GPU in bytes."""
    is_cuda = engine.device.type == "cuda"
    batches = batches_of(engine, config, args, rank, world)
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if config.simulation.pattern == "off" and not engine.global_steps:
        mock_step(engine, batches[0], config)
    steps = list(zip(batches, simulations, strict=True))
    differ = any(simulation != simulations[0] for simulation in simulations)
    times = []
    for batch, simulation in steps + steps if differ else steps:  # the first pass compiles what each simulation needs
        began = time.perf_counter()
        train_step(engine, [batch], simulation, args.sequence)  # ends with the loss on the host
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.tensor(float(torch.cuda.max_memory_allocated() if is_cuda else 0), device=engine.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    average = statistics.mean if differ else statistics.median
    return average(times[-args.steps :]), float(peak)


def batches_of(engine, config: RunConfig, args: argparse.Namespace, rank: int, world: int) -> list[Batch]:
    """This rank's micro-batch of each step."""
    batches = [make_batch({"input_ids": ids}, "all", engine.device) for ids in rows(args, config, rank, world)]
    return [batch.columns(rank, args.sequence) for batch in batches]


def rows(args: argparse.Namespace, config: RunConfig, rank: int, world: int) -> list[torch.Tensor]:
    """Token ids (rows, T) of each step, the same on the ranks of a row."""
    group, groups, length = rank // args.sequence, world // args.sequence, config.data.row_length
    steps = [(step * groups + group) * args.micro_batch for step in range(args.steps + 1)]
    if args.rows:
        prepared = load_rows(args.rows).train
        found = [
            prepared[[(first + row) % len(prepared) for row in range(args.micro_batch)]]["input_ids"][:, :length]
            for first in steps
        ]
        if found[0].shape[1] < length:
            sys.exit(f"--rows: rows of {args.rows} have {found[0].shape[1]} tokens, fewer than {length}")
        return found
    vocabulary, shape = SHAPES[args.shape]["vocab_size"], (args.micro_batch, length)
    return [torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(first)) for first in steps]


KINDS = {
    "communication": "nccl",
    "attention": "fmha|flash|sdpa|attention|cudnn_generated|^_(forward|backward|dot_rows|merge)",
    "selection": "^_(scores|log_sum_exp|bracket|collect|resolve|order|list_keys|write_score_keys)",
    "products": "gemm|cutlass|nvjet|xmma|cublas|::mm|::addmm",
    "optimizer": "multi_tensor_apply|foreach|adam",
    "copies": "memcpy|memset|copy|cat",
}
"""Kinds of kernels by a part of their names, tried in this order; the rest is elementwise work and reductions."""


def profile_step(engine, config: RunConfig, args: argparse.Namespace, rank: int, world: int) -> None:
    """Takes a step more; rank 0 prints where its time went: kernels by kind, the largest ones, the host's waits."""
    batch = batches_of(engine, config, args, rank, world)[0]
    simulation = draw_simulation(config.simulation, config.refresh, config.data.row_length, 0, 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) if rank == 0 else nullcontext() as profiler:
        began = time.perf_counter()
        train_step(engine, [batch], simulation, args.sequence)
        seconds = time.perf_counter() - began
    if rank:
        return
    assert profiler is not None
    events: list[Any] = list(profiler.events() or ())
    kernels = [(e.name, e.time_range.elapsed_us() / 1e3) for e in events if e.device_type.name == "CUDA"]
    if not kernels:  # no GPU: what the operators took
        kernels = [(e.name, e.self_cpu_time_total / 1e3) for e in events]
    print(f"\none step of {config.data.row_length}:{config.simulation.pattern}, profiled: {seconds * 1e3:,.0f} ms")
    print(f"GPU computing {busy(events):,.0f} ms of it, {sum(time for _, time in kernels):,.0f} ms in all streams")
    print(largest([(kind_of(name), time) for name, time in kernels], len(KINDS) + 1))
    print(largest(kernels, 15))
    waits = [(e.name, e.time_range.elapsed_us() / 1e3) for e in events if "Synchronize" in e.name or "item" in e.name]
    print("waits of the host:", largest(waits, 5), sep="\n")


def busy(events: list) -> float:
    """Milliseconds in which the GPU ran a kernel other than communication; the rest it waited, as for the host."""
    spans = [e.time_range for e in events if e.device_type.name == "CUDA" and kind_of(e.name) != "communication"]
    total, until = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total / 1e3


def kind_of(kernel: str) -> str:
    """The kind of work, by a kernel's name."""
    return next(
        (kind for kind, part in KINDS.items() if re.search(part, kernel, re.IGNORECASE)), "elementwise and others"
    )


def largest(times: list[tuple[str, float]], count: int) -> str:
    """Lines of total milliseconds, number and name, the most time first."""
    total, number = Counter(), Counter(name for name, _ in times)
    for name, milliseconds in times:
        total[name] += milliseconds  # pyright: ignore[reportArgumentType]  # the annotation knows counts only
    return "\n".join(f"{time:10,.1f} ms {number[name]:7,}  {name[:110]}" for name, time in total.most_common(count))


SETTINGS = ("T", "sequence", "micro-batch", "kernels", "optimizer", "recomputed", "offload", "DeepSpeed")
"""What a run has in common with the plain training it is compared to."""


def table(results: list[dict]) -> str:
    """Markdown, with the ratio to plain training of the same length and settings."""
    plain = {tuple(item[name] for name in SETTINGS): item["step s"] for item in results if item["pattern"] == "off"}
    names = ["T", "pattern", "GPUs per row", "rows", "kernels", "optimizer", "recomputed", "DeepSpeed", "step s"]
    names += ["predicted", "to plain", "MFU", "memory GB", "predicted"]
    lines = [names]
    for item in results:
        same = plain.get(tuple(item[name] for name in SETTINGS))
        cells = [f"{item['T']:,}", item["pattern"], item["sequence"], item["micro-batch"], item["kernels"]]
        cells += [item["optimizer"]]
        cells += [f"{item['recomputed']:.0%}" + (", offloaded" if item["offload"] else ""), item["DeepSpeed"]]
        cells += [f"{item['step s']:.2f}", f"{item['predicted s']:.2f}"]
        cells += [f"{item['step s'] / same:.2f}" if same else ""]
        cells += [f"{item['MFU']:.1%}" if item["MFU"] is not None else ""]
        cells += [f"{item['memory GB']:.1f}", f"{item['predicted GB']:.1f}"]
        lines.append([str(cell) for cell in cells])
    return markdown_table(lines, text_columns=2)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
