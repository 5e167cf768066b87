"""The benchmark of training steps takes the steps of the configurations that it names."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refreshkv.settings import load_settings
from refreshkv.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training

    yield training
    sys.modules.pop("training")


def test_recommended_is_what_our_configurations_simulate(script):
    settings = {"deepspeed_json": "zero0", "micro_batch": 1, "optimizer": "adamw", "sequence": 1, "loss": "chunked"}
    settings |= {"kernels": "torch", "checkpointing": 1.0, "offload": False, "shape": "llama31-8b"}
    args = argparse.Namespace(**settings)
    found = script.run_config(args, 8192, "recommended", 1, torch.device("cpu"))
    ours = load_settings(RunConfig, ROOT / "configs" / "llama31-8b-8k-whole.yaml")
    assert (found.simulation, found.refresh) == (ours.simulation, ours.refresh)


def test_steps_are_compared_with_plain_ones(tmp_path):
    options = ["--tiny", "--steps", "2", "--cases", "256:off,256:whole,256:recommended", "--output", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [result["pattern"] for result in results] == ["off", "whole", "recommended"]
    lines = [line.split("|") for line in done.stdout.splitlines()[-3:]]
    plain = results[0]["step s"]
    assert [float(line[11]) for line in lines] == [round(result["step s"] / plain, 2) for result in results]
