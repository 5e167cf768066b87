"""Where a run's curves go: each tracker offline, a resumed run, and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refreshkv import SettingsError
from refreshkv.settings import settings_from_dict
from refreshkv.train import trackers
from refreshkv.train.config import RunConfig
from refreshkv.train.log import RunLog
from refreshkv.train.run_folder import claim_output, foreign_file, validate_output
from tests.helpers.jobs import ROOT, make_rows, read_metrics, run_settings, write_config

VALUES = [{"loss": 3.0 - step / 10, "loss partial": 2.5, "tokens/s": 1000.0 + step} for step in range(1, 5)]


def config_for(output, *names):
    return settings_from_dict(RunConfig, run_settings(Path("rows"), output, training={"report_to": list(names)}))


def log_steps(config, first, last):
    log = RunLog(config, first - 1, is_writer=True)
    for step in range(first, last + 1):
        log.step(step, VALUES[step - 1])
    log.evaluation(last, {"full": 4.0, "refresh": 5.0}, 0.9)
    log.close()


def stored(folder):
    """The bytes of all files in a folder."""
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


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
    assert {"loss_partial", "tokens/s", "perplexity/full", "perplexity/refresh", "acceptance"} <= found.keys()
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
def test_mlflow_offline(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # mlflow sets it: taken back after the test
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
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
    content = stored(tmp_path / "trackio")
    assert b'"loss":2.7' in content and b"loss_partial" in content and b"perplexity/refresh" in content


@pytest.mark.slow
@needs("wandb")
@needs("trackio")
@needs("mlflow")
def test_a_run_reports_to_all_four(tmp_path):
    """One run of each, with the values of metrics.jsonl, and nothing in the run's folder that is not the run's."""
    import mlflow

    output, folder = tmp_path / "run", tmp_path / "trackio"
    training = {"steps": 3, "save_every": 3, "report_to": ["tensorboard", "wandb", "trackio", "mlflow"]}
    config = write_config(run_settings(make_rows(tmp_path), output, training=training))
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder), "DS_ACCELERATOR": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config)]
    done = subprocess.run(command, env={**environment, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logged = [values["loss"] for _, values in sorted(read_metrics(output).items())]
    assert scalars(output)["loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(logged, 1)]
    assert f'"loss":{logged[-1]}'.encode() in stored(folder)
    mlflow.set_tracking_uri(f"sqlite:///{output / 'mlflow.db'}")
    (run,) = mlflow.search_runs(experiment_names=[trackers.PROJECT], output_format="list")
    assert run.data.metrics["loss"] == pytest.approx(logged[-1])
    (file,) = (output / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss_partial" in file.read_bytes() and foreign_file(output) is None


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
