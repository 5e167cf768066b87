"""Where a run's curves go: each tracker offline, a resumed run, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest

from refreshkv import SettingsError
from refreshkv.settings import settings_from_dict
from refreshkv.train import trackers
from refreshkv.train.config import RunConfig
from refreshkv.train.log import RunLog
from refreshkv.train.run_folder import claim_output, foreign_file, validate_output
from tests.helpers.jobs import run_settings

VALUES = [{"loss": 3.0 - step / 10, "loss partial": 2.5, "tokens/s": 1000.0 + step} for step in range(1, 5)]


def config_for(output, *names):
    return settings_from_dict(RunConfig, run_settings(Path("rows"), output, training={"report_to": list(names)}))


def log_steps(config, first, last):
    log = RunLog(config, first - 1, is_writer=True)
    for step in range(first, last + 1):
        log.step(step, VALUES[step - 1])
    log.evaluation(last, {"full": 4.0, "refresh": 5.0})
    log.close()


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs the package {name}")


def scalars(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_goes_on_after_a_resume(tmp_path):
    """Steps that are taken again appear once."""
    output = tmp_path / "run"
    config = config_for(output, "tensorboard")
    claim_output(output, config, overwrite=False)
    log_steps(config, 1, 3)
    log_steps(config, 3, 4)
    found = scalars(output)
    assert found["loss"] == [(step, pytest.approx(VALUES[step - 1]["loss"])) for step in range(1, 5)]
    assert {"loss_partial", "tokens/s", "perplexity/full", "perplexity/refresh"} <= found.keys()
    assert foreign_file(output) is None


def test_no_trackers(tmp_path):
    output = tmp_path / "run"
    config = config_for(output)
    claim_output(output, config, overwrite=False)
    log_steps(config, 1, 2)
    assert not (output / "tensorboard").exists()
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2, 2]


@pytest.mark.slow
@needs("wandb")
def test_wandb_offline(tmp_path, monkeypatch):
    """Everything stays in the run's folder, which --overwrite may replace."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    output = tmp_path / "run"
    config = config_for(output, "tensorboard", "wandb")
    claim_output(output, config, overwrite=False)
    log_steps(config, 1, 3)
    wandb.teardown()  # its process writes the file at its end
    (file,) = (output / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"loss_partial" in content and b"perplexity/refresh" in content and b"learning_rate" in content
    assert scalars(output)["loss"] and foreign_file(output) is None
    validate_output(output, config, resume=False, overwrite=True)


@needs("mlflow")
def test_mlflow_offline(tmp_path):
    import mlflow

    output = tmp_path / "run"
    config = config_for(output, "mlflow")
    claim_output(output, config, overwrite=False)
    log_steps(config, 1, 3)
    (run,) = mlflow.search_runs(experiment_names=[trackers.PROJECT], output_format="list")
    assert run.data.metrics["loss"] == pytest.approx(VALUES[2]["loss"]) and foreign_file(output) is None


@needs("trackio")
def test_trackio_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    output = tmp_path / "run"
    config = config_for(output, "trackio")
    claim_output(output, config, overwrite=False)
    log_steps(config, 1, 3)
    assert any(file.is_file() for file in (tmp_path / "trackio").rglob("*"))


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="training.report_to: wandb needs the package .*: pip install wandb"):
        trackers.validate_trackers(["wandb"])


def test_a_tracker_that_does_not_start_is_refused(tmp_path, monkeypatch):
    def fail(config, output, step):
        raise OSError("no such server")

    monkeypatch.setitem(trackers._OPTIONS, "tensorboard", fail)
    config = config_for(tmp_path / "run", "tensorboard")
    with pytest.raises(SettingsError, match="training.report_to: tensorboard did not start: no such server; leave it"):
        trackers.Trackers(config, 0)


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="training.report_to"):
        config_for(tmp_path / "run", "comet")
