"""What each rank of tests/train/test_gradients.py runs: it builds real engines in turn and saves their gradients."""

import json
import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from refreshkv import RefreshConfig, Simulation
from refreshkv.attention import sequence_parallel
from refreshkv.settings import settings_from_dict
from refreshkv.simulation.distillation import DistillationConfig
from refreshkv.train.batch import Batch, make_batch
from refreshkv.train.config import RunConfig
from refreshkv.train.engine import build_engine, init_processes
from refreshkv.train.job import Job, resolve
from refreshkv.train.loss import CausalLossModel
from refreshkv.train.recomputation import recompute_layers
from refreshkv.train.step import backward, step_and_norm
from tests.helpers.jobs import ROOT
from tests.helpers.models import random_ids, tiny_enabled

LENGTH, ROWS, MICRO_BATCH = 32, 8, 2
SIMULATIONS = {
    "fixed": Simulation(9, RefreshConfig(budget=6, stride=4)),
    "similarity": Simulation(9, RefreshConfig(budget=6, stride=3, threshold=0.1)),
    "selecting": Simulation(9, RefreshConfig(budget=6, stride=6, threshold=0.1, select_stride=2, score_bits=4)),
    "full": None,
}


@dataclass(frozen=True)
class Case:
    """One engine's gradients."""

    stage: int
    sequence: int
    simulation: str
    kv_heads: int = 4
    heads: int = 8
    loss: str = "chunked"
    recompute: bool | float = False
    offload: bool = False
    distilled: bool = False
    whole_layers: bool = False
    """Stage 3 gathers a layer at a time, not each of its modules."""
    family: str = "llama"

    @property
    def distillation(self) -> DistillationConfig:
        return DistillationConfig(weight=0.5 if self.distilled else 0.0, temperature=2.0)


def shape_of(case: Case) -> dict[str, int]:
    return {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "hidden_size": 64}


def model_of(case: Case):
    softcap = {"final_logit_softcapping": 2.0} if case.family == "gemma2" else {}
    return tiny_enabled(family=case.family, dtype=torch.float32, initializer_range=0.12, **shape_of(case), **softcap)


def all_rows() -> dict[str, Tensor]:
    """Rows of tasks with answers of very different lengths, so that ranks and columns count unequal tokens."""
    answers = torch.tensor([1, 20, 5, 11, 2, 17, 9, 3])
    return {"input_ids": random_ids(ROWS, LENGTH, seed=3), "prompt_length": LENGTH - answers, "answer_length": answers}


def write_gradients(cases: list[Case], folder: str) -> None:
    """Gradients and norm of each case, as rank 0 sees them, in `folder`."""
    rank, world = init_processes(timeout=60)
    for number, case in enumerate(cases):
        gradients, norm = gradients_of(case, rank, world, Path(folder))
        if rank == 0:
            torch.save({"gradients": gradients, "norm": norm}, Path(folder) / f"{world}-{number}.pt")
        dist.barrier()
    dist.destroy_process_group()


def gradients_of(case: Case, rank: int, world: int, folder: Path) -> tuple[dict[str, Tensor], float]:
    model = model_of(case)
    if case.recompute:
        recompute_layers(model, case.recompute, case.offload)
    with redirect_stdout(StringIO()), sequence_parallel.started(model, case.sequence, MICRO_BATCH) as mpu:
        loss_model = CausalLossModel(model, case.loss, case.distillation)
        engine = build_engine(loss_model, job_of(case, folder, world), mpu)
        batches = batches_of(rank // case.sequence, world // case.sequence)
        batches = [batch.columns(rank, case.sequence) for batch in batches]
        backward(engine, batches, SIMULATIONS[case.simulation], case.sequence, lambda doing: None)
        gradients = {name: gradient_of(engine, p).clone() for name, p in engine.module.named_parameters()}
        norm = step_and_norm(engine)
        engine.destroy()
    return gradients, norm


def gradient_of(engine, parameter) -> Tensor:
    if engine.zero_optimization_stage() == 0:
        return parameter.grad
    return safe_get_full_grad(parameter)


def batches_of(rank: int, world: int) -> list[Batch]:
    rows = all_rows()
    mine = list(range(ROWS))[rank::world]
    return [
        make_batch({name: rows[name][mine[i : i + MICRO_BATCH]] for name in rows}, "answers", torch.device("cpu"))
        for i in range(0, len(mine), MICRO_BATCH)
    ]


def job_of(case: Case, folder: Path, world: int) -> Job:
    path = folder / f"zero{case.stage}-{os.environ['RANK']}.json"
    zero = {"stage": case.stage}
    if case.stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    if case.whole_layers:
        own = json.loads((ROOT / "configs" / "deepspeed" / "zero3-layers.json").read_text())["zero_optimization"]
        zero |= {"leaf_module": own["leaf_module"]}
    path.write_text(json.dumps({"zero_optimization": zero}))
    training = {"deepspeed": str(path), "dtype": "fp32", "global_batch": ROWS, "micro_batch": MICRO_BATCH}
    model = {"scratch": {"model_type": "llama", **shape_of(case)}}
    settings = {"model": model, "training": training, "parallel": {"sequence": case.sequence}}
    return resolve(settings_from_dict(RunConfig, settings), world, dry=True)
