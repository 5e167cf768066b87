"""Writes a run's checkpoints."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from refreshkv.files import PARTIAL, flush_to_disk, remove_folder, write_json
from refreshkv.settings import save_settings
from refreshkv.train.checkpoint_reader import set_aside
from refreshkv.train.config import RunConfig
from refreshkv.train.faults import WriteFailed
from refreshkv.train.manifest import write_manifest
from refreshkv.train.run_folder import RUN_FILE, STATE_FILE, State, finished_checkpoints, note_saved, step_folder


def save_checkpoint(
    engine: Any, output: Path, config: RunConfig, state: State, tokenizer: PreTrainedTokenizerBase | None
) -> Path:
    """Writes a checkpoint beside the others and returns its folder; all ranks call it together.

    The checkpoint counts once it has its final name. Afterwards rank 0 removes the oldest beyond
    `training.keep_checkpoints`. Raises `WriteFailed` on a rank that cannot write; the others
    notice when that rank ends.
    """
    folder = step_folder(output, state.step)
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
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
        _finish(partial, folder, output, config.training.keep_checkpoints)
    torch.distributed.barrier()
    return folder


def _finish(partial: Path, folder: Path, output: Path, kept: int) -> None:
    """Gives a written checkpoint its name and removes the oldest ones beyond `kept`; `WriteFailed` if that fails."""
    try:
        if folder.exists():
            set_aside(folder, "another checkpoint of the same step")
        os.rename(partial, folder)
        flush_to_disk(folder.parent)
        note_saved(output, int(folder.name.removeprefix("step-")))
        for old in finished_checkpoints(output)[:-kept]:
            remove_folder(old)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise WriteFailed(f"the checkpoint {folder} cannot take the place of an old one: {reason}") from error


def _write(
    engine: Any, partial: Path, config: RunConfig, state: State, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    rank = torch.distributed.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    torch.distributed.barrier()
    adapters_alone = config.training.adapter is not None
    engine.save_checkpoint(
        str(partial.parent), tag=partial.name, save_latest=False, exclude_frozen_parameters=adapters_alone
    )
    if rank == 0:
        _describe(partial, engine.module.causal_lm, config, state, tokenizer)
    torch.distributed.barrier()
    write_manifest(partial, rank, state.world_size)


def _describe(
    folder: Path, model: PreTrainedModel, config: RunConfig, state: State, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if getattr(model, "_auto_class", None) is not None:  # a class of the model's own code
        (folder / "model").mkdir()
        custom_object_save(model, folder / "model", config=cast(Any, model.config))
    model.config.save_pretrained(folder / "model")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder / "model")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "model")
    save_settings(config, folder / RUN_FILE)
    write_json(folder / STATE_FILE, vars(state), indent=1)
