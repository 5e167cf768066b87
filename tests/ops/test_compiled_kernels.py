"""What kernels take once they are compiled for a GPU, which Triton's interpreter does not show. No GPU is needed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from refreshkv.ops.step.selecting.attention import PROGRAMS_PER_PROCESSOR
from tests.helpers import compiling

REGISTERS = 65536
"""Registers of a multiprocessor."""


@pytest.fixture(scope="module", params=compiling.GPUS)
def compiled(request):
    """The architecture, and what each kernel of each case takes there."""
    command = [sys.executable, "-m", "tests.helpers.compiling", str(request.param), *compiling.CASES]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["case"] for kernel in kernels} == set(compiling.CASES)
    return request.param, kernels


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_fit_and_count_right(compiled):
    """They fit the GPU's memory. No histogram has a mask: after a reshape, Triton applies it to other entries.
    Programs that wait for each other all run at once."""
    architecture, kernels = compiled
    gpu = compiling.GPUS[architecture]
    for kernel in kernels:
        assert kernel["shared"] <= gpu.shared_memory_per_block_optin and not kernel["traps"], kernel
        assert kernel["masked histograms"] == 0, kernel
    waiting = [kernel for kernel in kernels if kernel["cooperative"]]
    assert bool(waiting) == (architecture >= 90)
    for kernel in waiting:
        assert PROGRAMS_PER_PROCESSOR * 32 * kernel["warps"] * kernel["registers"] <= REGISTERS, kernel
        taken = kernel["shared"] + compiling.RESERVED
        assert PROGRAMS_PER_PROCESSOR * taken <= gpu.shared_memory_per_multiprocessor, kernel
