"""Trains a tiny model for a few steps per case on all ranks, and saves real checkpoints with the weights to expect.

`main(folder)` runs on each rank. A case gives folder/<case>/checkpoints/step-0000003 as training writes it, and
folder/<case>/expected.pt.
"""

import json
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from refreshkv import RefreshConfig, Simulation
from refreshkv.data.config import DataConfig
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.train.checkpoint import save_checkpoint
from refreshkv.train.config import ModelConfig, RunConfig, TrainingConfig
from refreshkv.train.engine import build_engine, init_processes
from refreshkv.train.job import resolve
from refreshkv.train.loss import CausalLossModel
from refreshkv.train.model import build_model
from refreshkv.train.run_folder import State

CASES = {
    "zero0-fp32": (0, "fp32", False),
    "zero0-bf16": (0, "bf16", False),
    "zero1-bf16": (1, "bf16", False),
    "zero2-fp32-tied": (2, "fp32", True),
    "zero3-bf16": (3, "bf16", False),
    "zero3-fp32-tied": (3, "fp32", True),
}
"""Name -> ZeRO stage, `training.dtype`, tied embeddings."""

ROW_LENGTH, STEPS, VOCABULARY = 48, 3, 300
REFRESH = RefreshConfig(budget=8, stride=4, observation_window=2, recent_window=2, sink_tokens=1)


def write_deepspeed_json(folder: Path, stage: int) -> None:
    """Makes a case's folder, with the DeepSpeed JSON that its settings name. One rank does, before the others read."""
    folder.mkdir(parents=True)
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero}))


def run_config(folder: Path, dtype: str, tied: bool) -> RunConfig:
    """The settings of a case."""
    scratch = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    training = TrainingConfig(
        output=str(folder),
        deepspeed=str(folder / "deepspeed.json"),
        dtype=dtype,
        steps=10,
        global_batch=2,
        learning_rate=1e-2,
        lr_schedule="constant",
        warmup_steps=0,
    )
    data = DataConfig(folder=str(folder / "rows"), row_length=ROW_LENGTH)
    return RunConfig(model=ModelConfig(scratch=scratch), data=data, refresh=REFRESH, training=training)


def train_case(folder: Path, rank: int, world: int, stage: int, dtype: str, tied: bool, tokenizer) -> None:
    config = run_config(folder, dtype, tied)
    job = resolve(config, world, dry=True)
    engine = build_engine(CausalLossModel(build_model(job), "chunked"), job)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        rows = torch.randint(VOCABULARY, (1, ROW_LENGTH), generator=generator)
        logits = engine(rows, simulation=Simulation(24, REFRESH), use_cache=False).logits
        engine.backward(torch.nn.functional.cross_entropy(logits[0, :-1].float(), rows[0, 1:]))
        engine.step()
    state = State(STEPS, tokens=STEPS * world * ROW_LENGTH, world_size=world, zero_stage=stage, rows="fingerprint")
    save_checkpoint(engine, folder, config, state, tokenizer)
    weights = gathered_weights(engine.module, stage)
    if rank == 0:
        torch.save(weights, folder / "expected.pt")


def gathered_weights(model: torch.nn.Module, stage: int) -> dict[str, torch.Tensor]:
    """All parameters by name, whole, taken from the model itself and not from any file."""
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: weight.detach().clone() for name, weight in model.named_parameters(remove_duplicate=False)}


def main(folder: Path, cases: tuple[str, ...] = tuple(CASES)) -> None:
    rank, world = init_processes()
    texts = ["a small cache holds what the last full step asked for", "and is refreshed now and then"] * 20
    tokenizer = train_tokenizer(texts, VOCABULARY)
    for case in cases:
        stage, dtype, tied = CASES[case]
        if rank == 0:
            write_deepspeed_json(folder / case, stage)
        dist.barrier()
        train_case(folder / case, rank, world, stage, dtype, tied, tokenizer)
    dist.destroy_process_group()
