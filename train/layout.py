"""Loads a checkpoint into an engine, also one that another number of ranks or another ZeRO stage has written.

The same layout reads its own files back, bit by bit. Another one goes through DeepSpeed's universal checkpoint: each
parameter and its moments in one piece, in a folder beside the checkpoint that is removed afterwards.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from refreshkv.settings import SettingsError
from refreshkv.train.checkpoint import State


def needs_conversion(state: State, world: int, stage: int, optimizer: str = "adamw") -> bool:
    """Whether `world` ranks with ZeRO `stage` need a checkpoint converted; `SettingsError` if that is impossible.

    optimizer: `training.optimizer`.
    """
    if state.zero_stage == stage and state.world_size == world:
        return False
    if bool(state.zero_stage) != bool(stage):
        raise SettingsError(
            f"--resume: a checkpoint of ZeRO stage {state.zero_stage} does not convert to stage {stage} "
            "(training.deepspeed): only one of them divides the optimizer; keep stage 0, or a stage from 1 to 3"
        )
    if stage and optimizer == "adamw-8bit":
        raise SettingsError(
            "--resume: the moments of training.optimizer=adamw-8bit do not convert to another layout: go on with "
            f"{state.world_size} ranks and ZeRO stage {state.zero_stage} (training.deepspeed), which wrote the "
            f"checkpoint, not {world} and stage {stage}"
        )
    return stage > 0  # at stage 0 every rank has the whole optimizer


def load(engine: Any, checkpoint: Path, convert: bool, written_at: int = 0) -> None:
    """Puts weights, optimizer and learning-rate schedule of `checkpoint` into the engine; all ranks together.

    convert: the engine was built with `universal=True` for it. written_at: the checkpoint's ZeRO stage. Needs as
    much free disk space again, for a while.
    """
    if not convert:
        engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        return
    universal = checkpoint.with_name(f"{checkpoint.name}.universal")
    is_first = dist.get_rank() == 0
    stages = written_at, engine.zero_optimization_stage()
    problem = [_convert(checkpoint, universal, *stages) if is_first else None]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise SettingsError(f"--resume: {checkpoint} cannot be converted to this layout: {problem[0]}")
    engine.load_checkpoint(str(universal.parent), tag=universal.name)
    dist.barrier()
    if is_first:
        shutil.rmtree(universal)


def _convert(checkpoint: Path, universal: Path, before: int, now: int) -> str | None:
    """Writes the universal form, in a process of its own; the reason if that fails."""
    workers = str(max(1, min(8, (os.cpu_count() or 2) // 2)))
    shutil.rmtree(universal, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(universal)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    (universal.parent / "latest_universal").unlink(missing_ok=True)
    if result.returncode == 0:
        if before != 3 and now == 3:
            _for_parts_of_parameters(universal)
        elif before == 3 and now != 3:
            _for_parts_of_groups(universal)
        return None
    shutil.rmtree(universal, ignore_errors=True)
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.returncode}"


GROUPS_STATES, PARTS_STATES = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
"""Where stages 0 to 2, and stage 3, look for what is not divided, such as the learning-rate schedule."""


def _for_parts_of_parameters(universal: Path) -> None:
    """What stage 3 reads otherwise than stages 1 and 2 write it: the name of a file, and where the step stands."""
    shutil.copy(universal / GROUPS_STATES, universal / PARTS_STATES)
    file = universal / "zero" / "optimizer_state.pt"
    states = torch.load(file, weights_only=False)
    step = torch.load(next((universal / "zero").glob("*/step.pt")), weights_only=False)
    states["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": states["param_groups"]}
    torch.save(states, file)


def _for_parts_of_groups(universal: Path) -> None:
    """The other way: parameters and moments with their shapes, and the step beside them."""
    model = torch.load(universal / PARTS_STATES, weights_only=False)
    torch.save(model, universal / GROUPS_STATES)
    file = universal / "zero" / "optimizer_state.pt"
    states = torch.load(file, weights_only=False)
    step = states["optimizer_state_dict"]["state"][0]["step"]
    states.setdefault("ds_version", deepspeed.__version__)
    torch.save(states, file)
    for name, shape in {name: shape for group in model["param_shapes"] for name, shape in group.items()}.items():
        folder = universal / "zero" / name
        for part in folder.glob("*.pt"):
            torch.save({"param": torch.load(part, weights_only=False).view(shape), "cat_dim": 0}, part)
        torch.save(step, folder / "step.pt")
