"""Sets up the engine of a run and continues from a checkpoint, also from one that another layout has written.

The same layout (ranks and ZeRO stage) reads its own files back, bit by bit. Another one goes through DeepSpeed's
universal checkpoint: each parameter and its moments in one piece, in a folder beside the checkpoint that is removed
afterwards.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from refreshkv.attention import sequence_parallel
from refreshkv.settings import SettingsError
from refreshkv.train.checkpoint_reader import newest_checkpoint
from refreshkv.train.engine import build_engine
from refreshkv.train.job import Job
from refreshkv.train.loss import CausalLossModel
from refreshkv.train.run_folder import State
from refreshkv.train.safe_loading import tensors_only


def needs_conversion(
    state: State, world: int, stage: int, optimizer: str = "adamw", has_adapters: bool = False
) -> bool:
    """Whether `world` ranks at ZeRO `stage` read a checkpoint in the universal form only.

    Raises `SettingsError` if they cannot read it at all. optimizer: `training.optimizer`. has_adapters: whether
    `training.adapter` is set.
    """
    if state.zero_stage == stage and state.world_size == world:
        return False
    if not (state.zero_stage == stage or {state.zero_stage, stage} == {1, 2}):
        raise SettingsError(
            f"--resume: a checkpoint of ZeRO stage {state.zero_stage} does not convert to stage {stage} "
            f"(training.deepspeed): go on with stage {state.zero_stage}, or start another run from an export of it "
            "(launch/export.py, model.path)"
        )
    if stage and has_adapters:
        raise SettingsError(
            "--resume: a checkpoint of training.adapter does not convert to another layout: go on with "
            f"{state.world_size} ranks and ZeRO stage {state.zero_stage} (training.deepspeed), which wrote it"
        )
    if stage and optimizer == "adamw-8bit":
        raise SettingsError(
            "--resume: the moments of training.optimizer=adamw-8bit do not convert to another layout: go on with "
            f"{state.world_size} ranks and ZeRO stage {state.zero_stage} (training.deepspeed), which wrote the "
            f"checkpoint, not {world} and stage {stage}"
        )
    return stage > 0  # at stage 0 every rank has the whole optimizer


def start_engine(
    model: CausalLossModel, job: Job, rank: int, resume: bool, note: Callable[[str], None]
) -> tuple[Any, State, list[str]]:
    """Sets up the engine and, to resume, loads the newest good checkpoint; all ranks call it together.

    Returns the engine, what has been done so far, and lines for the user. note: called with what is being done, as a
    sign of progress.
    """
    training, rows = job.config.training, job.prepared.info["fingerprint"]
    checkpoint, messages = None, []
    done, convert = State(0, 0, job.world, job.zero_stage, rows), False
    if resume:
        note("looking for a checkpoint")
        checkpoint, damaged = newest_checkpoint(job.output, rank, job.world, job.config, rows)
        messages = [f"warning: {line}" for line in damaged]
    if checkpoint is not None:
        done = checkpoint.state
        has_adapters = training.adapter is not None
        convert = needs_conversion(done, job.world, job.zero_stage, training.optimizer, has_adapters)
    note("setting up the engine")
    mpu = sequence_parallel.start(model.causal_lm, job.sequence_parallel_size, training.micro_batch)
    engine = build_engine(model, job, mpu, universal=convert)
    if checkpoint is not None:
        note(f"loading {checkpoint.folder}")
        load(engine, checkpoint.folder, convert)
    if resume:
        messages.insert(0, f"continuing after step {done.step}" if checkpoint else "no finished checkpoint yet")
    return engine, done, messages


def load(engine: Any, checkpoint: Path, convert: bool) -> None:
    """Loads weights, optimizer and learning-rate schedule of `checkpoint` into the engine; all ranks call it together.

    convert: go through the universal form, for which the engine must have been built with `universal=True`. Needs as
    much free disk space again until it is loaded.
    """
    if not convert:
        with tensors_only():
            # a checkpoint of adapters lacks the weights that are not trained
            engine.load_checkpoint(
                str(checkpoint.parent), tag=checkpoint.name, load_module_strict=not engine.module.has_frozen
            )
        return
    universal = checkpoint.with_name(f"{checkpoint.name}.universal")
    is_first = dist.get_rank() == 0
    problem = [_convert(checkpoint, universal) if is_first else None]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise SettingsError(f"--resume: {checkpoint} cannot be converted to this layout: {problem[0]}")
    with tensors_only():
        engine.load_checkpoint(str(universal.parent), tag=universal.name)
    dist.barrier()
    if is_first:
        shutil.rmtree(universal)


def _convert(checkpoint: Path, universal: Path) -> str | None:
    """Writes the universal form, in a process of its own; returns the reason if that fails."""
    workers = str(max(1, min(8, (os.cpu_count() or 2) // 2)))
    shutil.rmtree(universal, ignore_errors=True)
    command = [sys.executable, "-m", "refreshkv.train.universal", "--inject_missing_state"]
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
