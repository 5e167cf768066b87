"""Runs of adapters beside a tiny base model, for the tests."""

import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.jobs import SCRATCH, run_settings, write_config
from tests.helpers.ranks import Ranks, run_ranks, run_script

ADAPTER = {
    "rank": 4,
    "alpha": 8.0,
    "targets": ["q_proj", "v_proj", "down_proj"],
    "dropout": 0.1,
    "also_train": ["norm"],
}
STEPS, SAVE_EVERY = 6, 3


def make_base(rows: Path, folder: Path, **settings) -> Path:
    """A tiny base model with random weights and the tokenizer of the rows."""
    values = {name: value for name, value in SCRATCH.items() if name != "model_type"}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**values, "initializer_range": 0.1, **settings}))
    model.save_pretrained(folder)
    for file in (rows / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def adapter_settings(
    rows: Path, base: Path, output: Path, stage: int = 2, model=None, adapter=None, **training
) -> dict:
    """A complete run of adapters as nested values."""
    deepspeed = output.with_name(f"zero{stage}.json")
    zero = {"stage": stage, **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})}
    deepspeed.write_text(json.dumps({"zero_optimization": zero}))
    training = {
        "deepspeed": str(deepspeed),
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "learning_rate": 1e-2,
        **training,
    }
    training["adapter"] = ADAPTER if adapter is None else adapter
    settings = run_settings(rows, output, training=training)
    settings["model"] = {"path": str(base), **(model or {})}
    return settings


def start(settings: dict, *arguments: str, ranks: int = 2) -> Ranks:
    """Starts a run of `launch/train.py` on some ranks."""
    output = Path(settings["training"]["output"])
    given = ["--config", str(write_config(settings)), *arguments]
    return Ranks(ranks, output.with_name(f"{output.name}.txt"), run_script, given)


def finish(settings: dict, *arguments: str, ranks: int = 2) -> str:
    """Runs it to its end; what was printed."""
    output = Path(settings["training"]["output"])
    given = ["--config", str(write_config(settings)), *arguments]
    return run_ranks(ranks, output.with_name(f"{output.name}.txt"), run_script, given)
