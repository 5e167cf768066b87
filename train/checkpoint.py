"""Checkpoints: where they lie, when they count, and what a resumed run must share with the one that wrote them."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refreshkv.files import write_json
from refreshkv.settings import SettingsError, load_settings, save_settings, settings_to_dict
from refreshkv.train.config import RunConfig
from refreshkv.train.faults import FAILURE_FILE, WriteFailed
from refreshkv.train.log import METRICS_FILE
from refreshkv.train.manifest import find_damage, write_manifest

RUN_FILE = "run.yaml"
STATE_FILE = "state.json"
FREE_TO_CHANGE = {
    "training.output",
    "training.log_every",
    "training.evaluate_every",
    "training.evaluate_rows",
    "training.evaluate_tokens",
    "training.save_every",
    "training.keep_checkpoints",
    "training.timeout",
    "data.folder",  # the rows' fingerprint is compared instead
    "hub.repo",
    "hub.private",
    "hub.checkpoints",
    # how the work is done, not what is computed: losses differ by rounding alone
    "training.deepspeed",
    "training.micro_batch",
    "training.activation_checkpointing",
    "training.activation_offload",
    "training.kernels",
    "training.loss",
    "parallel.sequence",
}
"""Settings that a resumed run may change without changing what is trained."""


@dataclass(frozen=True)
class State:
    """What a finished checkpoint says of itself (state.json)."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens seen."""
    world_size: int
    zero_stage: int
    rows: str
    """Fingerprint of the prepared rows."""


def check_output(output: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Refuses a folder in use, unless it holds this very run to be resumed, or any run to be overwritten."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if overwrite and not (output / RUN_FILE).is_file():
        raise SettingsError(f"training.output={output} is not a run's folder, so --overwrite leaves it; name another")
    if resume:
        _check_same_run(output, config)
    elif not overwrite:
        raise SettingsError(
            f"training.output={output} is in use: continue it with --resume, or start anew with --overwrite"
        )


def claim_output(output: Path, config: RunConfig, overwrite: bool) -> None:
    """Makes the run's folder and writes its settings there; with `overwrite`, removes what an earlier run wrote."""
    if overwrite:
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(output / name, ignore_errors=True)
        for trace in output.glob("stuck-rank-*.txt"):
            trace.unlink()
        for name in (METRICS_FILE, RUN_FILE):
            (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / FAILURE_FILE).unlink(missing_ok=True)
    for leftover in [*output.glob("checkpoints/step-*.partial"), *output.glob("checkpoints/step-*.universal")]:
        shutil.rmtree(leftover)
    save_settings(config, output / RUN_FILE)


def _check_same_run(output: Path, config: RunConfig) -> None:
    if not (output / RUN_FILE).is_file():
        raise SettingsError(f"training.output={output} holds no run to resume (no {RUN_FILE}); name another folder")
    before = flat_settings(settings_to_dict(load_settings(RunConfig, output / RUN_FILE)))
    now = flat_settings(settings_to_dict(config))
    for name in sorted(before.keys() | now.keys()):
        if name not in FREE_TO_CHANGE and before.get(name) != now.get(name):
            raise SettingsError(
                f"--resume: {name} was {before.get(name)!r} and is now {now.get(name)!r}; set it back, or start "
                "another run with another training.output"
            )


def flat_settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def step_folder(output: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return output / "checkpoints" / f"step-{step:07d}"


def finished_checkpoints(output: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(folder.parent for folder in (output / "checkpoints").glob(f"step-*[0-9]/{STATE_FILE}"))


def read_state(checkpoint: Path) -> State:
    """The state.json of a finished checkpoint."""
    return State(**json.loads((checkpoint / STATE_FILE).read_text()))


def save_checkpoint(
    engine: Any, output: Path, config: RunConfig, state: State, tokenizer: PreTrainedTokenizerBase | None
) -> Path:
    """Writes a checkpoint beside the others, by all ranks together; it counts once it has its final name.

    Returns its folder. Afterwards the oldest beyond `training.keep_checkpoints` are removed. Raises `WriteFailed` on a
    rank that cannot write; the others then wait in vain, and find out when that one ends.
    """
    folder = step_folder(output, state.step)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        _write(engine, partial, config, state, tokenizer)
    except (OSError, RuntimeError) as error:
        if "peer" in str(error):  # not ours: another rank failed
            raise
        shutil.rmtree(partial, ignore_errors=True)  # its space is needed
        reason = " ".join(str(error).split())[:200]
        raise WriteFailed(
            f"the checkpoint of step {state.step} cannot be written to {folder.parent}: {reason}"
        ) from error
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # the same step, before a resumed run reached it again
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
        _describe(partial, engine.module, config, state, tokenizer)
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
    """The newest checkpoint whose files are as they were written, None if there is none yet; and one line for each
    damaged one before it, which is set aside. All ranks together.

    Raises `SettingsError` if all are damaged, or were made with other rows (`rows`: the fingerprint of these).
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
    """Renames a damaged checkpoint so that it no longer counts; the line that says so."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
    return f"{checkpoint} is damaged ({reason}); it is now {aside.name}, and the one before is used"
