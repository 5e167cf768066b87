"""Checkpoints: where they lie, when they count, and what a resumed run must share with the one that wrote them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refreshkv.settings import SettingsError, load_settings, save_settings, settings_to_dict
from refreshkv.train.config import RunConfig
from refreshkv.train.log import METRICS_FILE

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
    "data.folder",  # the rows' fingerprint is compared instead
}
"""Settings that a resumed run may change without changing any loss."""


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
        for name in (METRICS_FILE, RUN_FILE):
            (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    save_settings(config, output / RUN_FILE)


def _check_same_run(output: Path, config: RunConfig) -> None:
    if not (output / RUN_FILE).is_file():
        raise SettingsError(f"training.output={output} holds no run to resume (no {RUN_FILE}); name another folder")
    before = _flat(settings_to_dict(load_settings(RunConfig, output / RUN_FILE)))
    now = _flat(settings_to_dict(config))
    for name in sorted(before.keys() | now.keys()):
        if name not in FREE_TO_CHANGE and before.get(name) != now.get(name):
            raise SettingsError(
                f"--resume: {name} was {before.get(name)!r} and is now {now.get(name)!r}; set it back, or start "
                "another run with another training.output"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
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

    Returns its folder. Afterwards the oldest beyond `training.keep_checkpoints` are removed.
    """
    folder = step_folder(output, state.step)
    partial = folder.with_name(f"{folder.name}.partial")
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
    if is_first:
        _describe(partial, engine.module, config, state, tokenizer)
        shutil.rmtree(folder, ignore_errors=True)  # the same step, before a resumed run reached it again
        partial.rename(folder)
        for old in finished_checkpoints(output)[: -config.training.keep_checkpoints]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return folder


def _describe(
    folder: Path, model: PreTrainedModel, config: RunConfig, state: State, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    model.config.save_pretrained(folder / "model")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder / "model")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "model")
    save_settings(config, folder / RUN_FILE)
    (folder / STATE_FILE).write_text(json.dumps(vars(state), indent=1))


def load_newest(engine: Any, output: Path, world: int, zero_stage: int, rows: str) -> State | None:
    """Loads the newest finished checkpoint into the engine; None if the run has none yet.

    Raises `SettingsError` if the processes, the ZeRO stage or the rows are not those that it was written with.
    """
    checkpoints = finished_checkpoints(output)
    if not checkpoints:
        return None
    state = read_state(checkpoints[-1])
    if state.world_size != world:
        raise SettingsError(
            f"--resume: {checkpoints[-1]} was written by {state.world_size} ranks, this job has {world}"
        )
    if state.zero_stage != zero_stage:
        raise SettingsError(
            f"--resume: {checkpoints[-1]} was written with ZeRO stage {state.zero_stage}, training.deepspeed now says "
            f"{zero_stage}"
        )
    if state.rows != rows:
        raise SettingsError("--resume: data.folder holds other rows than the run was started with")
    engine.load_checkpoint(str(checkpoints[-1].parent), tag=checkpoints[-1].name)
    return state
