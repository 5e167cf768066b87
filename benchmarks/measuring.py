"""What benchmarks measure with: a model of random weights, time on a GPU, memory."""

import argparse
import gc
import statistics
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256}
"""Llama-3.1-8B's, as the options of `add_shape` name it."""


def add_shape(parser: argparse.ArgumentParser, shape: dict[str, int]) -> None:
    """Options for a model's shape, with these defaults."""
    for name, size in shape.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)


def random_llama(args: argparse.Namespace, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of the shape that the options of `add_shape` give, made on the device; always the same weights."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocabulary,
        max_position_embeddings=2**20,
        rope_theta=500000.0,  # pyright: ignore[reportCallIssue]  # transformers makes its rope_parameters of it
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def milliseconds(work: Callable[[], object], repeat: int, head_start: int = 0) -> float:
    """Median of CUDA events around `work`, after one run to warm up. The GPU waits `head_start` cycles before each, so
    that the host can queue it all."""
    work()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if head_start:
            torch.cuda._sleep(head_start)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def use_streams(count: int = 8) -> None:
    """Uses so many streams. Once a process has used more than about five, the GPU takes longer to begin each kernel,
    and what is timed first would seem faster than what follows (docs/results.md)."""
    for _ in range(count):
        used_stream()


def used_stream() -> torch.cuda.Stream:
    """A stream that has done an addition."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.zeros(1, device="cuda").add_(1)
    torch.cuda.synchronize()
    return stream


def free_memory() -> None:
    """Gives back what nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), 10) * 1e3
