"""Shows what is installed and which kernels compute what, and checks that decoding is right on this machine.

    refreshkv doctor

The check decodes a small random model token by token and compares the logits with those of one simulated pass. The exit
code is 1 if they differ by more than rounding.
"""

import argparse
import importlib.util
import os
import platform
import sys
from importlib import metadata
from typing import cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from refreshkv import RefreshConfig, cli, enable
from refreshkv.ops import choice
from refreshkv.parity import decoding_difference

PACKAGES = ("refreshkv", "torch", "transformers", "triton", "deepspeed", "datasets", "accelerate", "numpy")
LENGTH, PROMPT_LENGTH = 96, 40
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest difference of two logits that is rounding, by the model's dtype."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    difference, tolerance = largest_difference()
    passed = difference <= tolerance
    sections = {
        "versions": versions(),
        "devices": devices(),
        "extras": extras(),
        "kernels": choice.describe(),
        "self-check": [
            ("simulated and decoded logits", f"largest difference {difference:.1e} (at most {tolerance:.0e})"),
            (
                "result",
                "passed" if passed else "FAILED: decoding is not right on this machine; please report this table",
            ),
        ],
    }
    width = max(len(name) for lines in sections.values() for name, _ in lines)
    for title, lines in sections.items():
        print(title)
        for name, value in lines:
            print(f"  {name:<{width}}  {value}")
    sys.exit(0 if passed else 1)


def versions() -> list[tuple[str, str]]:
    """Python and the packages that matter, with their versions."""
    return [("python", platform.python_version()), *((package, _version(package)) for package in PACKAGES)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[tuple[str, str]]:
    """The CPU and each GPU."""
    found = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"))
    return found


def extras() -> list[tuple[str, str]]:
    """Each extra of the package: installed, or the modules that it lacks."""
    found = []
    for name, modules in cli.EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        install = f"without {', '.join(missing)}: pip install 'refreshkv[{name}]'"
        found.append((name, install if missing else "installed"))
    return found


def largest_difference() -> tuple[float, float]:
    """The largest difference between simulated and decoded logits of a random model, and what rounding may cause.

    The model runs on the first GPU in float32, or on the CPU in float64. Both schedules, two batch rows.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.float32 if on_gpu else torch.float64
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.35,  # large weights: each position gets scores of its own
    )
    model = LlamaForCausalLM(config).eval()
    cast(nn.Module, model).to(device, dtype)
    ids = torch.randint(3, 61, (2, LENGTH), device=device)
    schedules = RefreshConfig(budget=12, stride=7), RefreshConfig(budget=12, stride=5, threshold=0.5)
    differences = [decoding_difference(enable(model, refresh), ids, PROMPT_LENGTH, refresh)[0] for refresh in schedules]
    return torch.cat(differences).max().item(), TOLERANCES[dtype]


if __name__ == "__main__":
    cli.run(main)
