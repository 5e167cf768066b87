"""The scripts of examples/ run as a reader would run them, each within a minute, and leave a model that decodes."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.parity import decoding_difference
from tests.helpers.jobs import ROOT

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"
LONGEST = 60
"""Seconds."""


def run_example(script, folder):
    """Runs a script on the CPU, with one thread; its exit code and what it printed."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "out")],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert time.monotonic() - began < LONGEST
    return done.returncode, done.stdout + done.stderr


def decodes(model):
    """Whether decoding with the saved settings gives the logits of the parallel form."""
    ids = torch.arange(80)[None]
    refresh = RefreshConfig.from_dict(model.config.refreshkv)
    differences, _ = decoding_difference(refreshkv.enable(model).eval(), ids, 48, refresh)
    return float(differences.max()) < 1e-3


@pytest.mark.parametrize("name", ["plain_loop", "trainer"])
def test_loops_of_all_weights(name, tmp_path):
    code, printed = run_example(EXAMPLES / f"{name}.py", tmp_path)
    assert code == 0, printed
    assert "loss partial" in printed and "loss full" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(ROOT / "base" / "python-4m")
    assert not torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert model.config.refreshkv["budget"] == 32 and decodes(model)


def test_the_state_of_less_learns_what_left(tmp_path):
    """On held-out text its error is below that of the small cache alone, and its kernels are saved."""
    code, printed = run_example(EXAMPLES / "less.py", tmp_path)
    assert code == 0, printed
    lines = [line.rpartition(" ") for line in printed.splitlines() if line.startswith("held-out")]
    figures = {name: float(figure) for name, _, figure in lines}
    assert figures["held-out error with the state"] < 0.9 * figures["held-out error without the state"]
    assert figures["held-out loss with the state"] < figures["held-out loss without the state"]
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the package trl")
def test_sft_with_adapters(tmp_path):
    """LoRA, the loss of the assistant's tokens alone, gradient checkpointing, 10 steps."""
    from peft import PeftModel

    code, printed = run_example(EXAMPLES / "trl_sft.py", tmp_path)
    assert code == 0, printed
    assert "loss partial" in printed and "adapter saved" in printed
    base = AutoModelForCausalLM.from_pretrained(ROOT / "base" / "python-4m")
    model = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert any(weight.abs().max() > 0 for name, weight in model.named_parameters() if "lora_B" in name)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the package trl")
def test_packed_data_is_refused(tmp_path):
    """By TRL's own packing, in one line that names the way out."""
    text = (EXAMPLES / "trl_sft.py").read_text().replace("packing=False", "packing=True, per_device_eval_batch_size=1")
    text = text.replace("200 + 20 * number", "60")  # so that several fit into a row
    text = text.replace("Path(__file__).resolve().parents[1]", f"Path({str(ROOT)!r})")
    (tmp_path / "packed.py").write_text(text)
    code, printed = run_example(tmp_path / "packed.py", tmp_path)
    error = next(line for line in printed.splitlines() if line.startswith("ValueError: "))
    assert code and "packed sequences" in error and "give each row one sequence" in error
