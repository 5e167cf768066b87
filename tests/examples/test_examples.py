"""The scripts of examples/ run as a reader would run them, each within a minute, and leave a model that decodes."""

import importlib.util
import os
import resource
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.attention.look_ahead import look_ahead_modules
from refreshkv.parity import decoding_difference
from tests.helpers.jobs import ROOT
from tests.helpers.models import random_ids, tiny_model
from tests.helpers.rows import save_rows

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"
LONGEST = 60
"""Seconds of the processor, which other work on the machine does not lengthen."""


def run_example(script, folder, *options):
    """Runs a script on the CPU, with one thread; its exit code and what it printed."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = processor_seconds()
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "out"), *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert processor_seconds() - began < LONGEST
    return done.returncode, done.stdout + done.stderr


def processor_seconds():
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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


def table(printed):
    """The lines of a printed table, each a list of its cells, without the head."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return lines[1:]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Prepared sequences of 128 tokens, of this repository's own text."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base" / "python-4m")
    ids = tokenizer((ROOT / "train" / "config.py").read_text())["input_ids"]
    sequences = [ids[first : first + 128] for first in range(0, 8 * 128, 128)]
    folder = tmp_path_factory.mktemp("examples") / "rows"
    splits = {"train": sequences[:5], "validation": sequences[5:6], "test": sequences[6:]}
    save_rows(folder, splits, tokenizer.vocab_size)
    return folder


def test_less_takes_prepared_rows_and_several_budgets_and_seeds(rows, tmp_path):
    options = ["--data", str(rows), "--steps", "3", "--rows", "2", "--scored", "32"]
    code, printed = run_example(EXAMPLES / "less.py", tmp_path, *options, "--budget", "24", "12", "--seed", "0", "1")
    assert code == 0, printed
    lines = table(printed)
    assert [line[1:3] for line in lines] == [["24", "0"], ["24", "1"], ["12", "0"], ["12", "1"]]
    assert all(float(line[4]) > 1 for line in lines), "the small cache lost nothing, so nothing was measured"
    assert len({line[5] for line in lines}) == 4, "budgets and seeds have kernels of their own"
    names = {f"out-{budget}-{seed}.safetensors" for budget in (24, 12) for seed in (0, 1)}
    assert {file.name for file in tmp_path.glob("*.safetensors")} == names


@pytest.mark.parametrize(("family", "term"), [("gemma2", "a softcap"), ("gpt_oss", "sinks")])
def test_less_refuses_other_softmaxes(family, term, tmp_path):
    """Full attention without the term would be learned, and be taken for the model's own."""
    tiny_model(family=family, dtype=torch.float32).save_pretrained(tmp_path / "model")
    sequences = random_ids(6, 64).tolist()
    save_rows(tmp_path / "rows", {"train": sequences[:4], "validation": sequences[4:5], "test": sequences[5:]}, 61)
    options = ["--model", "model", "--data", "rows", "--steps", "1", "--scored", "16", "--rows", "1"]
    code, printed = run_example(EXAMPLES / "less.py", tmp_path, *options)
    assert code == 1 and printed.strip().splitlines()[-1].startswith(f"--model model: its attention has {term}")
    assert "Traceback" not in printed and not (tmp_path / "out.safetensors").exists()


def test_look_ahead_queries_are_compared_and_saved(rows, tmp_path):
    options = ["--data", str(rows), "--budget", "24", "--scored", "32", "--steps", "3", "--batch", "2", "--rows", "2"]
    code, printed = run_example(EXAMPLES / "look_ahead.py", tmp_path, *options, "--selection", "paper", "windows")
    assert code == 0, printed
    lines = table(printed)
    assert [line[1] for line in lines] == ["paper", "paper", "windows", "windows"]
    assert all(float(line[3]) < float(line[4]) for line in lines) and all(line[4] != line[5] for line in lines)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert decodes(model) and look_ahead_modules(model)


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
