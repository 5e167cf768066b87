"""Writes a run's checkpoints, and finds the newest good one."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refreshkv.files import write_json
from refreshkv.settings import SettingsError, save_settings
from refreshkv.train.config import RunConfig
from refreshkv.train.faults import WriteFailed
from refreshkv.train.manifest import find_damage, write_manifest
from refreshkv.train.run_folder import RUN_FILE, STATE_FILE, State, finished_checkpoints, read_state, step_folder


def save_checkpoint(
    engine: Any, output: Path, config: RunConfig, state: State, tokenizer: PreTrainedTokenizerBase | None
) -> Path:
    """Writes a checkpoint beside the others and returns its folder; all ranks call it together.

    The checkpoint counts once it has its final name. Afterwards rank 0 removes the oldest beyond
    `training.keep_checkpoints`. Raises `WriteFailed` on a rank that cannot write; the others
    notice when that rank ends.
    """
    folder = step_folder(output, state.step)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        _write(engine, partial, config, state, tokenizer)
    except (OSError, RuntimeError) as error:
        if "peer" in str(error):  # another rank failed, not this one
            raise
        shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        reason = " ".join(str(error).split())[:200]
        raise WriteFailed(
            f"the checkpoint of step {state.step} cannot be written to {folder.parent}: {reason}"
        ) from error
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # a resumed run writes the same step again
        os.rename(partial, folder)
        for old in finished_checkpoints(output)[: -config.training.keep_checkpoints]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return folder


def _write(
    engine: Any, partial: Path, config: RunConfig, state: State, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    rank = torch.distributed.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
    if rank == 0:
        _describe(partial, engine.module.causal_lm, config, state, tokenizer)
    torch.distributed.barrier()
    write_manifest(partial, rank, state.world_size)


def _describe(
    folder: Path, model: PreTrainedModel, config: RunConfig, state: State, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    model.config.save_pretrained(folder / "model")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder / "model")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "model")
    save_settings(config, folder / RUN_FILE)
    write_json(folder / STATE_FILE, vars(state), indent=1)


def newest_checkpoint(output: Path, rank: int, world: int, rows: str) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, None if there is none yet; and one line for each newer one, which is damaged.

    Damaged ones are renamed, so that they no longer count. All ranks call this together. Raises `SettingsError` if all
    checkpoints are damaged, or if the run was started with other rows. rows: fingerprint of the rows of now.
    """
    damaged = []
    for checkpoint in reversed(finished_checkpoints(output)):
        problem = find_damage(checkpoint, rank, world)
        if problem is None:
            if read_state(checkpoint).rows != rows:
                raise SettingsError("--resume: data.folder holds other rows than the run was started with")
            return checkpoint, [_set_aside(folder, reason, rank) for folder, reason in damaged]
        damaged.append((checkpoint, problem))
    if damaged:
        folder, reason = damaged[0]
        raise SettingsError(
            f"--resume: {folder} is damaged ({reason}), and no good checkpoint is left; start anew with --overwrite"
        )
    return None, []


def _set_aside(checkpoint: Path, reason: str, rank: int) -> str:
    """Renames a damaged checkpoint so that it no longer counts; returns the line that tells the user."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
    return f"{checkpoint} is damaged ({reason}); it is now {aside.name}, and the one before is used"
