"""Whole training steps of Llama-3.1-8B's shape from random weights: time, MFU, memory predicted and measured.

    deepspeed --num_gpus 2 benchmarks/training.py --cases 8192:off,8192:paper,32768:off,32768:whole --output DIR
    deepspeed --num_gpus 2 benchmarks/training.py --cases 131072:whole --sequence 2 --output DIR
    python benchmarks/training.py --table DIR

A case is T:PATTERN. off: plain training. paper: the last 50 tokens partial, never refreshed. whole: P = T/2, S = 10.
K is 2048. One row per group of --sequence GPUs, ZeRO 3, activation checkpointing, bfloat16, the settings of
configs/deepspeed/zero3.json. Steps are those of launch/train.py, optimizer included. Rows are random tokens, or real
ones of a folder from launch/prepare.py with --rows.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import refreshkv
from refreshkv import parallel
from refreshkv.data.rows import load_rows
from refreshkv.settings import settings_from_dict
from refreshkv.train.batch import make_batch
from refreshkv.train.config import RunConfig
from refreshkv.train.engine import build_engine, init_processes
from refreshkv.train.flops import model_work, peak_flops, step_flops
from refreshkv.train.loss import attach_loss
from refreshkv.train.mock import mock_step
from refreshkv.train.preflight import matmul_rate, memory_needed, model_shape, step_seconds
from refreshkv.train.simulation import draw_simulation
from refreshkv.train.step import train_step

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 1 << 20}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 1 << 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="8192:off,8192:paper,32768:off,32768:whole")
    parser.add_argument("--sequence", type=int, default=1, help="GPUs per row")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each, after one to warm up")
    parser.add_argument("--rows", help="folder of prepared rows, at least as long")
    parser.add_argument("--loss", default="chunked", help="training.loss")
    parser.add_argument("--deepspeed-json", default=str(ROOT / "configs" / "deepspeed" / "zero3.json"))
    parser.add_argument("--offload", action="store_true", help="training.activation_offload")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script without a GPU")
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
    """All cases on one engine; each is printed, and added to the output, when it is known."""
    cases = [(int(length), pattern) for length, pattern in (case.split(":") for case in args.cases.split(","))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_config = LlamaConfig(**(TINY if args.tiny else LLAMA))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:  # random weights are made faster there, and ZeRO divides them
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    first = run_config(args, *cases[0], world, device)
    refreshkv.enable(model, first.refresh)
    model.gradient_checkpointing_enable({"use_reentrant": args.offload})
    attach_loss(model, args.loss, args.offload)
    work, shape, rate = model_work(model), model_shape(model_config), matmul_rate(device, first.training.dtype)
    engine = build_engine(model, first, world, parallel.start(model, args.sequence, 1))
    del model
    results = []
    for length, pattern in cases:
        config = run_config(args, length, pattern, world, device)
        seconds, memory = measure(engine, config, args, rank, world)
        simulation = draw_simulation(config.simulation, config.refresh, length, 0, 1)
        flops = step_flops(work, config.training.global_batch, length, simulation)
        peak = peak_flops(engine.device, config.training.dtype)
        results.append(
            {
                "T": length,
                "pattern": pattern,
                "GPUs": world,
                "sequence": args.sequence,
                "step s": seconds,
                "predicted s": step_seconds(config, shape, world, rate),
                "MFU": flops / seconds / world / peak if peak else None,
                "memory GB": memory / 1e9,
                "predicted GB": sum(memory_needed(config, shape, world).values()) / 1e9,
                "tokens/s": config.training.global_batch * length / seconds,
            }
        )
        if rank == 0:
            print(json.dumps(results[-1]), flush=True)
            if args.output:
                args.output.mkdir(parents=True, exist_ok=True)
                with (args.output / "training.jsonl").open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    return results


def run_config(args: argparse.Namespace, length: int, pattern: str, world: int, device: torch.device) -> RunConfig:
    """The settings of a case, as a run would have them."""
    simulation = {"off": {"pattern": "off"}, "paper": {"pattern": "paper", "stride": 50}}
    simulation["whole"] = {"pattern": "whole", "prompt_length": length // 2, "stride": 10}
    training = {
        "deepspeed": args.deepspeed_json,
        "dtype": "bf16" if device.type == "cuda" else "fp32",
        "micro_batch": 1,
    }
    training |= {"global_batch": world // args.sequence, "activation_checkpointing": True, "loss": args.loss}
    training |= {"activation_offload": args.offload, "steps": 1000}
    values = {"data": {"row_length": length}, "refresh": {"budget": min(2048, length // 8)}, "training": training}
    values |= {"simulation": simulation[pattern], "parallel": {"sequence": args.sequence}}
    return settings_from_dict(RunConfig, values)


def measure(engine, config: RunConfig, args: argparse.Namespace, rank: int, world: int) -> tuple[float, float]:
    """Median seconds of a step, and the largest peak of any GPU in bytes."""
    length, is_cuda = config.data.row_length, engine.device.type == "cuda"
    batches = [make_batch({"input_ids": ids}, "all", engine.device) for ids in rows(args, config, rank, world)]
    batches = [batch.columns(rank, args.sequence) for batch in batches]
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if config.simulation.pattern == "off" and not engine.global_steps:
        mock_step(engine, batches[0], config)
    times = []
    for step, batch in enumerate(batches):
        began = time.perf_counter()
        simulation = draw_simulation(config.simulation, config.refresh, length, 0, step)
        train_step(engine, [batch], simulation, args.sequence)  # ends with the loss on the host
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.tensor(float(torch.cuda.max_memory_allocated() if is_cuda else 0), device=engine.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return statistics.median(times[1:]), float(peak)


def rows(args: argparse.Namespace, config: RunConfig, rank: int, world: int) -> list[torch.Tensor]:
    """Token ids (1, T) of each step, the same on the ranks of a row."""
    group, groups, length = rank // args.sequence, world // args.sequence, config.data.row_length
    numbers = [step * groups + group for step in range(args.steps + 1)]
    if args.rows:
        prepared = load_rows(args.rows).train
        found = [prepared[number % len(prepared)]["input_ids"][None, :length] for number in numbers]
        if found[0].shape[1] < length:
            sys.exit(f"--rows: rows of {args.rows} have {found[0].shape[1]} tokens, fewer than {length}")
        return found
    vocabulary = (TINY if args.tiny else LLAMA)["vocab_size"]
    return [torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(n)) for n in numbers]


def table(results: list[dict]) -> str:
    """Markdown, with the ratio to plain training of the same length."""
    plain = {item["T"]: item["step s"] for item in results if item["pattern"] == "off"}
    lines = [
        "| T | pattern | GPUs per row | step s | predicted | to plain | MFU | memory GB | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in results:
        ratio = f"{item['step s'] / plain[item['T']]:.2f}" if item["T"] in plain else ""
        mfu = f"{item['MFU']:.1%}" if item["MFU"] is not None else ""
        lines.append(
            f"| {item['T']:,} | {item['pattern']} | {item['sequence']} | {item['step s']:.2f} | "
            f"{item['predicted s']:.2f} | {ratio} | {mfu} | {item['memory GB']:.1f} | {item['predicted GB']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
