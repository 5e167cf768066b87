"""A run's folder: the names of what lies in it, which of its checkpoints are finished, and who may use it.

`run.yaml` holds the settings, `run.json` the run's id and the step of its last checkpoint, `metrics.jsonl` the values
of each step, `checkpoints/step-NNNNNNN` what a run continues from, and `failure.txt` the message of a job that could
not go on.
"""

import fnmatch
import re
import shutil
import uuid
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from refreshkv.files import PARTIAL, REMOVED, clear_removed, remove_folder, write_json
from refreshkv.folders import make_folder, validate_folder
from refreshkv.ranges import show
from refreshkv.reading import read_own_json, refuse_special_files
from refreshkv.settings import SettingsError, read_yaml, save_settings, settings_from_dict, settings_to_dict
from refreshkv.train.config import RunConfig, current_names
from refreshkv.train.run_lock import LOCK_FILE

RUN_FILE = "run.yaml"
IDENTITY_FILE = "run.json"
STATE_FILE = "state.json"
METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.txt"
CHECKPOINT = re.compile(r"step-(\d{7,})")
"""The name of a finished checkpoint's folder."""
BEFORE_A_RUN = (LOCK_FILE, IDENTITY_FILE, f".{IDENTITY_FILE}{PARTIAL}", f".{RUN_FILE}{PARTIAL}", FAILURE_FILE)
"""Files that a job leaves in its folder if it is killed before it has written `RUN_FILE`: no run has begun."""
WRITTEN = (
    *(RUN_FILE, METRICS_FILE, *BEFORE_A_RUN, f".{METRICS_FILE}{PARTIAL}", "stuck-rank-*.txt"),
    *("tensorboard", "tensorboard/events.out.tfevents.*", "checkpoints", "checkpoints/zero_to_*.py"),
    *("wandb", "mlflow", "mlflow.db"),
    *("checkpoints/latest", "checkpoints/latest_universal", f"checkpoints/.step-*{REMOVED}"),
)
"""What a run writes into its folder, besides its checkpoints."""
WRITTEN_IN_CHECKPOINTS = ("*.pt", "manifest.json", STATE_FILE, RUN_FILE, "model", "model/*")
"""What a run writes into a checkpoint whose manifest cannot be read."""
UNFINISHED = (PARTIAL, ".universal")
"""Endings of the names of folders beside the checkpoints that never count."""

FREE_TO_CHANGE = {
    "training.output",
    "training.log_every",
    "training.report_to",
    "training.evaluate_every",
    "training.evaluate_rows",
    "training.evaluate_tokens",
    "training.save_every",
    "training.keep_checkpoints",
    "training.timeout",
    "data.folder",  # the fingerprint of the rows is compared instead
    "hub.repo",
    "hub.private",
    "hub.checkpoints",
    # these change how the work is done and not what is computed: losses differ by rounding alone
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
    """How far a finished checkpoint came, and what wrote it (state.json)."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens seen."""
    world_size: int
    """Ranks of the job."""
    zero_stage: int
    rows: str
    """Fingerprint of the prepared rows."""
    run: str = ""
    """Id of the run; empty in checkpoints of earlier versions."""
    base: str = ""
    """Of adapters: what tells the model beside which they were trained from others (`train.adapter`)."""


def step_folder(output: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return output / "checkpoints" / f"step-{step:07d}"


def checkpoint_step(folder: Path) -> int | None:
    """The step in the name of a finished checkpoint's folder; None for other names."""
    match = CHECKPOINT.fullmatch(folder.name)
    return None if match is None else int(match[1])


def finished_checkpoints(output: Path) -> list[Path]:
    """The finished checkpoints of a run by their names, oldest first. `train.checkpoint_reader` checks them."""
    found = [folder for folder in (output / "checkpoints").glob("step-*") if checkpoint_step(folder) is not None]
    return sorted((folder for folder in found if folder.is_dir()), key=lambda folder: checkpoint_step(folder) or 0)


def run_id(output: Path) -> str | None:
    """The id of the run in a folder; None for a run of an earlier version, which has none."""
    return _identity(output).get("run")


def saved_step(output: Path) -> int | None:
    """The step of the last checkpoint that the run has written; None if it has written none, or is not known."""
    return _identity(output).get("saved")


def note_saved(output: Path, step: int) -> None:
    """Writes down that the run has a checkpoint of this step."""
    if identity := _identity(output):
        write_json(output / IDENTITY_FILE, {**identity, "saved": step})


def _identity(output: Path) -> dict[str, Any]:
    path = output / IDENTITY_FILE
    values = read_own_json(path, "training.output") if path.exists() else {}
    if not isinstance(values, dict):
        raise SettingsError(f"training.output: {path} holds no section with keys")
    return values


def read_state(checkpoint: Path) -> State:
    """The state.json of a finished checkpoint. Raises `ValueError` or `TypeError` if it cannot be read, or has other
    keys or values of another kind."""
    state = State(**read_own_json(checkpoint / STATE_FILE, "its state"))
    for field in fields(State):
        value = getattr(state, field.name)
        if type(value) is not field.type:
            raise ValueError(f"{field.name} in its {STATE_FILE} is {show(value)}")
    return state


def read_run(folder: Path) -> RunConfig:
    """The run.yaml of a run's or a checkpoint's folder, also one that an earlier release wrote.

    Raises `SettingsError` if it cannot be read or has settings that do not exist.
    """
    setting = f"the settings of the run in {folder}"
    refuse_special_files(folder / RUN_FILE, setting)
    values = read_yaml(folder / RUN_FILE, setting)
    if not values:
        raise SettingsError(
            f"{folder / RUN_FILE} is empty, and a run needs its settings: restore it, or name another folder"
        )
    return settings_from_dict(RunConfig, current_names(values))


def validate_output(output: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Raises `SettingsError` if the folder is in use and neither holds this run to resume nor a run to overwrite."""
    validate_folder(output, "training.output")
    if not output.exists() or (output.is_dir() and {path.name for path in output.iterdir()} <= {*BEFORE_A_RUN}):
        return
    if overwrite and not (output / RUN_FILE).is_file():
        raise SettingsError(f"training.output={output} is not a run's folder, so --overwrite leaves it; name another")
    if resume:
        _validate_same_run(output, config)
    elif not overwrite:
        raise SettingsError(
            f"training.output={output} is in use: continue it with --resume, or start anew with --overwrite"
        )
    elif foreign := foreign_file(output):
        raise SettingsError(
            f"training.output={output} also holds {foreign}, which the run has not written, and --overwrite would "
            "leave it among another run's files or delete it; move it away first"
        )


def foreign_file(output: Path) -> str | None:
    """The first file in a run's folder that the run has not written; None if there is none."""
    for path in sorted([*output.iterdir(), *output.glob("tensorboard/*"), *output.glob("checkpoints/*")]):
        name = path.relative_to(output).as_posix()
        is_checkpoint = path.parent.name == "checkpoints" and path.name.startswith("step-") and path.is_dir()
        if is_checkpoint and not path.name.endswith(UNFINISHED):
            if foreign := _foreign_in_checkpoint(path):
                return f"{name}/{foreign}"
        elif not is_checkpoint and not any(fnmatch.fnmatch(name, pattern) for pattern in WRITTEN):
            return name
    return None


def _foreign_in_checkpoint(folder: Path) -> str | None:
    try:
        listed = {*read_own_json(folder / "manifest.json", "its manifest")["files"], "manifest.json"}
        is_known = listed.__contains__
    except (ValueError, KeyError, TypeError):
        is_known = _is_written_in_checkpoints
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return next((name for name in names if not is_known(name)), None)


def _is_written_in_checkpoints(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in WRITTEN_IN_CHECKPOINTS)


def _validate_same_run(output: Path, config: RunConfig) -> None:
    if not (output / RUN_FILE).is_file():
        raise SettingsError(f"training.output={output} holds no run to resume (no {RUN_FILE}); name another folder")
    if changed := changed_setting(read_run(output), config):
        name, before, now = changed
        raise SettingsError(
            f"--resume: {name} was {before!r} and is now {now!r}; set it back, or start another run with another "
            "training.output"
        )


def changed_setting(
    before: RunConfig, now: RunConfig, free: Collection[str] = FREE_TO_CHANGE
) -> tuple[str, Any, Any] | None:
    """The first setting that is not `free` and differs: its name and both values; None if there is none."""
    old, new = flat_settings(settings_to_dict(before)), flat_settings(settings_to_dict(now))
    for name in sorted(old.keys() | new.keys()):
        if name not in free and old.get(name) != new.get(name):
            return name, old.get(name), new.get(name)
    return None


def flat_settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one dictionary with names such as `training.steps`."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def claim_output(output: Path, config: RunConfig, overwrite: bool) -> None:
    """Makes the run's folder and writes its id and settings there. overwrite: removes first what an earlier run wrote.

    A new run gets a new id. Raises `SettingsError` if anything cannot be removed: the earlier run would win.
    """
    try:
        if overwrite:
            _remove_run(output)
        make_folder(output, "training.output")
        (output / FAILURE_FILE).unlink(missing_ok=True)
        checkpoints = output / "checkpoints"
        for leftover in [leftover for ending in UNFINISHED for leftover in checkpoints.glob(f"step-*{ending}")]:
            shutil.rmtree(leftover)
        clear_removed(checkpoints)
        if not (output / RUN_FILE).exists():
            write_json(output / IDENTITY_FILE, {"run": uuid.uuid4().hex})
        save_settings(config, output / RUN_FILE)
    except OSError as error:
        raise SettingsError(f"training.output={output} cannot be written to: {error}") from error


def _remove_run(output: Path) -> None:
    """Removes what a run has written into its folder, `RUN_FILE` last. Links to other disks stay, empty."""
    for checkpoint in sorted((output / "checkpoints").glob("step-*")):
        remove_folder(checkpoint)
    for pattern in WRITTEN:
        if pattern in ("tensorboard", "checkpoints", RUN_FILE, LOCK_FILE):
            continue
        for file in output.glob(pattern):
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    for name in ("tensorboard", "checkpoints"):
        if (output / name).is_dir() and not (output / name).is_symlink():
            (output / name).rmdir()
    (output / RUN_FILE).unlink(missing_ok=True)
