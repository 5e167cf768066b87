"""The services and files that a run's curves are reported to, by the trackers of accelerate (`training.report_to`)."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refreshkv.machine import is_full_disk
from refreshkv.settings import SettingsError, settings_to_dict
from refreshkv.train.config import RunConfig
from refreshkv.train.run_folder import flat_settings, run_id

PROJECT = "refreshkv"
"""The project of trackers that have projects, unless an environment variable of theirs names another."""


def validate_trackers(names: Sequence[str]) -> None:
    """Raises `SettingsError` if the package of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SettingsError(
                f"training.report_to: {name} needs the package of that name: pip install {name}, or leave it out"
            )


class Trackers:
    """The trackers of a run; rank 0 makes them. step: after which this process continues.

    Each keeps its own rules about where it writes and whether it needs a network: see docs/training.md. Raises
    `SettingsError` if one does not start, and leaves the error of a full disk as it is.
    """

    def __init__(self, config: RunConfig, step: int):
        self._trackers = [_started(name, config, step) for name in config.training.report_to]

    def log(self, values: dict[str, float], step: int) -> None:
        """Reports the values of a step, by readable name."""
        named = {name.replace(" ", "_"): value for name, value in values.items()}
        for tracker in self._trackers:
            tracker.log(named, step=step)

    def close(self) -> None:
        """Ends the reports; a tracker may wait until everything is sent."""
        for tracker in self._trackers:
            tracker.finish()


def _started(name: str, config: RunConfig, step: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers' log messages need it; the processes have joined already
    output = Path(config.training.output).resolve()
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](**_OPTIONS[name](config, output, step))
        tracker.main_process_only = False  # this process is the first one
        tracker.start()
    except Exception as error:  # each package has errors of its own
        if is_full_disk(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SettingsError(
            f"training.report_to: {name} did not start: {reason}; leave it out to train without"
        ) from error
    return tracker


def _tensorboard(config: RunConfig, output: Path, step: int) -> dict[str, Any]:
    return {"run_name": "tensorboard", "logging_dir": output, "purge_step": step + 1}


def _wandb(config: RunConfig, output: Path, step: int) -> dict[str, Any]:
    """A resumed run goes on under its id; with WANDB_MODE=offline everything stays in the run's folder."""
    options = {"dir": str(output), "id": run_id(output), "name": output.name, "resume": "allow"}
    return {"run_name": os.environ.get("WANDB_PROJECT", PROJECT), "config": settings_to_dict(config), **options}


def _trackio(config: RunConfig, output: Path, step: int) -> dict[str, Any]:
    """Trackio keeps runs in a folder of the user's (TRACKIO_DIR), by project and name."""
    name = f"{output.name}-{(run_id(output) or '')[:8]}"
    return {"run_name": PROJECT, "name": name, "resume": "allow", "config": flat_settings(settings_to_dict(config))}


def _mlflow(config: RunConfig, output: Path, step: int) -> dict[str, Any]:
    """Without MLFLOW_TRACKING_URI the run's folder holds MLflow's files."""
    import mlflow  # pyright: ignore[reportMissingImports]

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{output / 'mlflow.db'}")
    return {"experiment_name": PROJECT, "logging_dir": str(output / "mlflow"), "run_name": output.name}


_OPTIONS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
