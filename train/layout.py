"""Loads a checkpoint into an engine, also one that another number of ranks has written.

The same layout reads its own files back, bit by bit. Another one goes through DeepSpeed's universal checkpoint: each
parameter and its moments in one piece, in a folder beside the checkpoint that is removed afterwards.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from refreshkv.settings import SettingsError
from refreshkv.train.checkpoint import State


def needs_conversion(state: State, world: int, stage: int, dtype: str) -> bool:
    """Whether `world` ranks with ZeRO `stage` need a checkpoint converted; `SettingsError` if that is impossible."""
    if state.zero_stage == stage and state.world_size == world:
        return False
    before, now = _way(state.zero_stage, dtype), _way(stage, dtype)
    if before != now:
        raise SettingsError(
            f"--resume: a checkpoint of ZeRO stage {state.zero_stage} does not convert to stage {stage} in {dtype} "
            f"(training.deepspeed): {before} there, {now} here; use a stage that stores the same way"
        )
    return before != WHOLE


WHOLE = "one optimizer for all"


def _way(stage: int, dtype: str) -> str:
    """How a stage stores the optimizer: DeepSpeed converts between numbers of ranks, not between these."""
    if stage == 3:
        return "an optimizer of parts of parameters"
    # bfloat16 has an optimizer of its own at stage 0, too
    return "an optimizer of parts of groups" if stage > 0 or dtype == "bf16" else WHOLE


def load(engine: Any, checkpoint: Path, convert: bool) -> None:
    """Puts weights, optimizer and learning-rate schedule of `checkpoint` into the engine; all ranks together.

    convert: the engine was built with `universal=True` for it. Needs as much free disk space again, for a while.
    """
    if not convert:
        engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        return
    universal = checkpoint.with_name(f"{checkpoint.name}.universal")
    is_first = dist.get_rank() == 0
    problem = [_convert(checkpoint, universal) if is_first else None]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise SettingsError(f"--resume: {checkpoint} cannot be converted to this layout: {problem[0]}")
    engine.load_checkpoint(str(universal.parent), tag=universal.name)
    dist.barrier()
    if is_first:
        shutil.rmtree(universal)


def _convert(checkpoint: Path, universal: Path) -> str | None:
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
        return None
    shutil.rmtree(universal, ignore_errors=True)
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.returncode}"
