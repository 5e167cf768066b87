"""Training jobs in processes of their own, for the tests: small model, small rows, real launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import yaml
from datasets import Dataset

from refreshkv.data.config import DataConfig
from refreshkv.data.rows import prepare_rows

ROOT = Path(__file__).resolve().parents[2]
ROW_LENGTH = 48
VOCABULARY = 300


def make_rows(folder: Path) -> Path:
    """Prepares a few hundred short rows of made-up text."""
    words = [f"word{i:02d}" for i in range(60)]
    texts = [" ".join(words[(i * i + 7 * j + i) % 60] for j in range(400)) for i in range(40)]
    Dataset.from_dict({"text": texts}).to_json(folder / "texts.jsonl")
    prepare_rows(
        DataConfig(
            folder=str(folder / "rows"),
            path="json",
            data_files=str(folder / "texts.jsonl"),
            train_vocabulary=VOCABULARY,
            row_length=ROW_LENGTH,
        ),
        budget=8,
    )
    return folder / "rows"


SCRATCH = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
"""`model.scratch` of a tiny model."""


def run_settings(rows: Path, output: Path, **sections) -> dict:
    """A complete run as nested values; `sections` replace single settings, as in `training={"steps": 3}`."""
    settings = {
        "model": {"scratch": dict(SCRATCH)},
        "data": {"folder": str(rows), "path": "json", "data_files": "texts.jsonl", "train_vocabulary": VOCABULARY},
        "refresh": {"budget": 8, "stride": 5},
        "simulation": {"pattern": "whole", "prompt_length": [8, 30], "stride": [2, 5, 10]},
        "training": {
            "output": str(output),
            "deepspeed": str(ROOT / "configs" / "deepspeed" / "zero2.json"),
            "dtype": "fp32",
            "steps": 8,
            "global_batch": 8,
            "micro_batch": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "log_every": 4,
            "save_every": 3,
        },
    }
    settings["data"]["row_length"] = ROW_LENGTH
    for name, changes in sections.items():
        settings[name] = {**settings.get(name, {}), **changes}
    return settings


def write_config(settings: dict) -> Path:
    """The settings as a YAML file beside the run's folder."""
    output = Path(settings["training"]["output"])
    config = output.with_name(f"{output.name}.yaml")
    config.write_text(yaml.safe_dump(settings))
    return config


def start_job(settings: dict, *arguments: str, ranks: int = 2) -> subprocess.Popen:
    """launch/train.py on CPU ranks, in a process group of its own; one rank needs no launcher."""
    output = Path(settings["training"]["output"])
    config = write_config(settings)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        command += ["--master_port", str(free_port())]
    command += [str(ROOT / "launch" / "train.py"), "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment.pop("RANK", None)
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=output.parent,
        start_new_session=True,
    )


def run_job(settings: dict, *arguments: str, ranks: int = 2) -> tuple[int, str]:
    """Runs a job to its end: exit code and everything it printed."""
    job = start_job(settings, *arguments, ranks=ranks)
    try:
        printed, _ = job.communicate(timeout=240)
    finally:
        kill_job(job)
    return job.returncode, printed


def kill_job(job: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all its ranks."""
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    job.wait()


def read_metrics(output: Path) -> dict[int, dict]:
    """metrics.jsonl of a run: step -> values."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines) if "loss" in line}


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
