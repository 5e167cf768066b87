"""Compiles the kernels that operations launch, for a GPU that need not be there, and says what each kernel takes.

    python -m tests.helpers.compiling ARCHITECTURE CASE ...

prints one JSON object for each kernel of each case. It is a process of its own: Triton's interpreter, which other tests
use, takes the compiler's place. The operations get tensors without numbers, of the CPU, and are told that they are of
the GPU wherever they ask.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from refreshkv import NEVER, RefreshConfig
from refreshkv.cache.fetching import FetchingLayer
from refreshkv.cache.layer import RefreshLayer
from refreshkv.ops.rows import after_prompt, block_steps, partial_steps, short_block
from refreshkv.ops.state import PLAIN_SOFTMAX, CompactState, SoftmaxTerms
from refreshkv.ops.step import attention, launches
from refreshkv.ops.step.selecting import launches as stages
from refreshkv.ops.step.selecting import scoring
from refreshkv.ops.step.selecting import state as selecting_state


class Gpu(NamedTuple):
    """What torch says of a GPU, by torch's names."""

    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int
    L2_cache_size: int


GPUS = {
    86: Gpu(8, 6, 84, 102400, 101376, 6 * 2**20),
    90: Gpu(9, 0, 132, 233472, 232448, 50 * 2**20),
    100: Gpu(10, 0, 148, 233472, 232448, 126 * 2**20),
}
"""By architecture. 86: a GeForce 3090, with a 4090's shared memory; 90: an H200; 100: a B200."""

ASK_ABOUT_THE_GPU = (
    (stages, "run_at_once"),
    (scoring, "takes_ptx"),
    (attention, "splits_of"),
    (selecting_state, "l2_bytes"),
    (short_block, "splits_of"),
    (partial_steps, "fits"),
    (partial_steps, "register_limit"),
    (block_steps, "register_limit"),
)
"""Functions whose answer depends on the GPU of their arguments."""

NO_NUMBERS = FakeTensorMode()
"""Its tensors have shapes and types only."""

SELECTING: dict[str, Any] = {"select_stride": 2, "score_bits": 4, "pool_kernel": 2, "pool_ahead": True}

RESERVED = 1024
"""Bytes of a multiprocessor's shared memory that each program takes besides its own, which cuobjdump includes."""

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Driver:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")

    def is_active(self) -> bool:
        return True


def compile_instead(architecture: int) -> dict[str, Any]:
    """Compiles kernels where they would be launched, for the rest of this process; returns where to find them by their
    hash."""
    kernels, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[kernel.hash] = kernel
        return kernel

    driver.set_active(Driver(architecture))
    gpu = GPUS[architecture]
    torch.cuda.get_device_properties = lambda device=None: gpu
    torch.cuda.get_device_capability = lambda device=None: (gpu.major, gpu.minor)
    torch.cuda.device_of = lambda tensor: nullcontext()
    FakeTensor.data_ptr = lambda self: 0  # aligned, as torch's memory is
    for module, name in ASK_ABOUT_THE_GPU:
        setattr(module, name, asked_on_the_gpu(getattr(module, name)))
    JITFunction.run = compile_only
    return kernels


def asked_on_the_gpu(question: Callable) -> Callable:
    """A function that takes tensors and devices of the CPU for those of the GPU."""
    gpu = torch.device("cuda")

    def of_gpu(arg: Any) -> Any:
        if isinstance(arg, torch.device):
            return gpu
        if not isinstance(arg, Tensor):
            return arg
        return SimpleNamespace(
            is_cuda=True, device=gpu, dtype=arg.dtype, shape=arg.shape, element_size=arg.element_size
        )

    return lambda *args: question(*map(of_gpu, args))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(B, H, T, D), laid out as a model does: (B, T, H, D) in memory."""
    batch, heads, length, head_dim = shape
    return torch.empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)


def without_numbers(value: Any) -> Any:
    """A tensor, or a tuple with tensors, of the same layout; in NO_NUMBERS."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return type(value)(*map(without_numbers, value)) if hasattr(value, "_fields") else value


def decode(
    settings: dict[str, Any],
    group: int = 4,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    terms: bool = False,
    offload: bool = False,
    large: bool = False,
) -> None:
    """A step of decoding; with `offload`, keys and values are in host memory, and if `large`, logits have 16 bits, as
    those of many batch rows."""
    config = RefreshConfig(**{"budget": 64, "stride": NEVER} | settings)
    heads = (2 * group, 2, 2)
    layer = (FetchingLayer if offload else RefreshLayer)(2**15, config)
    query, key, value = (empty(2, count, 9, head_dim, dtype=dtype).zero_() for count in heads)
    layer.update(key, value)
    layer.end_block(query, torch.tensor([0, 3]), head_dim**-0.5)
    with NO_NUMBERS, patch.object(selecting_state, "LARGEST_IN_CACHE", 0.0 if large else 1.0):
        token = [empty(2, count, 1, head_dim, dtype=dtype) for count in heads]
        changed = SoftmaxTerms(torch.empty(heads[0], dtype=dtype), 50.0) if terms else PLAIN_SOFTMAX
        state, chosen = without_numbers(layer.state()), without_numbers(layer.selecting_state())
        last = (config.step_options(), head_dim**-0.5)
        if offload:
            launches.fetching_step(*token, state, chosen, without_numbers(layer.near()), *last)
        else:
            launches.decode_step(*token, state, *last, chosen, changed)


def decode_compact() -> None:
    """A step of H2O, and one of full attention."""
    with NO_NUMBERS:
        query, key, value = (empty(2, heads, 1, 128) for heads in (8, 2, 2))
        keys, values, scores = (torch.empty(2, 2, 512, 128, dtype=torch.bfloat16) for _ in range(3))
        length, row_state = torch.empty((), dtype=torch.int64), torch.empty(2, 4, dtype=torch.int64)
        slots = torch.empty(2, 2, dtype=torch.int64)
        compact = CompactState(keys, values, length, row_state, slots, scores, positions=slots)
        launches.compact_step(query, key, value, compact, heavy=True, scaling=0.1)
        launches.full_step(query, key, value, keys, values, length, row_state, 0.1)


def read_drafts() -> None:
    """Attention of a block of a few tokens to a long cache."""
    with NO_NUMBERS:
        keys, values = (torch.empty(2, 2, 2**15, 128, dtype=torch.bfloat16) for _ in range(2))
        short_block.short_block(empty(2, 8, 9, 128), keys, values, torch.empty(2, dtype=torch.int64), 0.1)


def train(settings: dict[str, Any], group: int = 4, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
    """Attention after a prompt, forward and backward."""
    config = RefreshConfig(**{"budget": 2048} | settings)
    with NO_NUMBERS:
        query, key, value = (empty(1, heads, 16384, head_dim, dtype=dtype) for heads in (8 * group, 8, 8))
        for tensor in (query, key, value):
            tensor.requires_grad_()
        plan = config.plan(query, 8192, None, recurring=False)
        late = query[:, :, 8192 - config.observation_window :]
        output = after_prompt.refresh_rows(late, key, value, plan, config.selection_options(), head_dim**-0.5)
        torch.autograd.grad(output, (query, key, value), torch.empty_like(output))


CASES: dict[str, Callable[[], None]] = {
    "decode: recommended for two tokens": lambda: decode(SELECTING),
    "decode: large, recommended for two tokens": lambda: decode(SELECTING, large=True),
    "decode: large, 16 bits, recommended": lambda: decode(
        SELECTING | {"select_stride": 1, "score_bits": 16, "pool_kernel": 1}, large=True
    ),
    "decode: 8 bits, wide pooling": lambda: decode(SELECTING | {"score_bits": 8, "pool_kernel": 7}, 1, 64),
    "decode: groups of 32, 16 bits": lambda: decode(SELECTING | {"score_bits": 16}, 32),
    "decode: observers, windows": lambda: decode(
        SELECTING | {"observation_window": 4, "recent_window": 8, "sink_tokens": 4}, large=True
    ),
    "decode: beside full steps": lambda: decode(SELECTING | {"stride": 10}),
    "decode: sinks and a softcap": lambda: decode(SELECTING, terms=True),
    "decode: float16": lambda: decode(SELECTING, dtype=torch.float16),
    "decode: float32": lambda: decode(SELECTING, dtype=torch.float32),
    "decode: heads of 256": lambda: decode(SELECTING, head_dim=256),
    "decode: float32, heads of 256": lambda: decode(SELECTING, head_dim=256, dtype=torch.float32),
    "decode: similarity": lambda: decode({"stride": 10, "threshold": 0.5, "observation_window": 2}),
    "decode: offloaded": lambda: decode(SELECTING, offload=True),
    "decode: H2O and full attention": decode_compact,
    "decode: a block of drafts": read_drafts,
    "train: full steps": lambda: train({"stride": 10}),
    "train: intervals of 30": lambda: train({"stride": 30}),
    "train: intervals of 50, observers": lambda: train({"stride": 50, "observation_window": 4}),
    "train: selecting steps": lambda: train({"stride": NEVER, "select_stride": 5, "score_bits": 4}),
    "train: float32": lambda: train({"stride": 10, "select_stride": 5}, dtype=torch.float32),
    "train: heads of 256": lambda: train({"stride": 10, "select_stride": 5, "score_bits": 4}, head_dim=256),
    "train: float32, heads of 256": lambda: train(
        {"stride": 10, "select_stride": 5}, head_dim=256, dtype=torch.float32
    ),
    "train: heads of 64, groups of 3": lambda: train({"stride": 10, "select_stride": 5}, group=3, head_dim=64),
}


def report(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes: bytes of shared memory of a program, its warps, and registers of a thread. Triton
    puts a trap in the place of some kernels that do not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers = re.search(r"REG:(\d+)", usage)
    static = re.search(r"SHARED:(\d+)", usage)
    assert registers is not None and static is not None, usage
    return {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared + max(int(static[1]) - RESERVED, 0),
        "warps": kernel.metadata.num_warps,
        "registers": int(registers[1]),
        "cooperative": bool(getattr(kernel.metadata, "launch_cooperative_grid", False)),
        "traps": "trap;" in kernel.asm["ptx"],
        "masked histograms": len(re.findall(r"tt\.histogram %\w+, %", kernel.asm["ttgir"])),
    }


def main(architecture: str, *names: str) -> None:
    """Prints what each kernel of these cases takes."""
    kernels = compile_instead(int(architecture))
    for name in names:
        kernels.clear()
        CASES[name]()
        for kernel in kernels.values():
            print(json.dumps({"case": name, **report(kernel)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
