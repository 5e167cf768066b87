"""A run's folder: the names of what lies in it, which of its checkpoints are finished, and who may use it.

`run.yaml` holds the settings, `metrics.jsonl` the values of each step, `checkpoints/step-NNNNNNN` what a run continues
from, and `failure.txt` the message of a job that could not go on.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refreshkv.folders import make_folder, validate_folder
from refreshkv.settings import SettingsError, read_yaml, save_settings, settings_from_dict, settings_to_dict
from refreshkv.train.config import RunConfig, current_names

RUN_FILE = "run.yaml"
STATE_FILE = "state.json"
METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.txt"

FREE_TO_CHANGE = {
    "training.output",
    "training.log_every",
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


def step_folder(output: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return output / "checkpoints" / f"step-{step:07d}"


def finished_checkpoints(output: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(folder.parent for folder in (output / "checkpoints").glob(f"step-*[0-9]/{STATE_FILE}"))


def read_state(checkpoint: Path) -> State:
    """The state.json of a finished checkpoint."""
    return State(**json.loads((checkpoint / STATE_FILE).read_text()))


def read_run(folder: Path) -> RunConfig:
    """The run.yaml of a run's or a checkpoint's folder, also one that an earlier release wrote.

    Raises `SettingsError` if it cannot be read or has settings that do not exist.
    """
    values = read_yaml(folder / RUN_FILE, f"the settings of the run in {folder}")
    return settings_from_dict(RunConfig, current_names(values))


def validate_output(output: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Raises `SettingsError` if the folder is in use and neither holds this run to resume nor a run to overwrite."""
    validate_folder(output, "training.output")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if overwrite and not (output / RUN_FILE).is_file():
        raise SettingsError(f"training.output={output} is not a run's folder, so --overwrite leaves it; name another")
    if resume:
        _validate_same_run(output, config)
    elif not overwrite:
        raise SettingsError(
            f"training.output={output} is in use: continue it with --resume, or start anew with --overwrite"
        )


def _validate_same_run(output: Path, config: RunConfig) -> None:
    if not (output / RUN_FILE).is_file():
        raise SettingsError(f"training.output={output} holds no run to resume (no {RUN_FILE}); name another folder")
    before = flat_settings(settings_to_dict(read_run(output)))
    now = flat_settings(settings_to_dict(config))
    for name in sorted(before.keys() | now.keys()):
        if name not in FREE_TO_CHANGE and before.get(name) != now.get(name):
            raise SettingsError(
                f"--resume: {name} was {before.get(name)!r} and is now {now.get(name)!r}; set it back, or start "
                "another run with another training.output"
            )


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
    """Makes the run's folder and writes its settings there. overwrite: removes first what an earlier run wrote."""
    if overwrite:
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(output / name, ignore_errors=True)
        for trace in output.glob("stuck-rank-*.txt"):
            trace.unlink()
        for name in (METRICS_FILE, RUN_FILE):
            (output / name).unlink(missing_ok=True)
    make_folder(output, "training.output")
    (output / FAILURE_FILE).unlink(missing_ok=True)
    for leftover in [*output.glob("checkpoints/step-*.partial"), *output.glob("checkpoints/step-*.universal")]:
        shutil.rmtree(leftover)
    save_settings(config, output / RUN_FILE)
