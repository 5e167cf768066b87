"""Named pipes in the place of files that we have written: reading them fails at once, and never waits."""

import os

import pytest

from refreshkv.attention.look_ahead_file import load_look_ahead
from refreshkv.checksums import digest, remembered
from refreshkv.evaluation.reports import open_output
from refreshkv.files import RECORD_FILE, not_on_record
from refreshkv.generation.custom_generate import FOLDER, write_custom_generate
from refreshkv.prefix.backend_folder import FolderBackend
from refreshkv.reading import refuse_special_files
from refreshkv.settings import SettingsError
from refreshkv.train.card import _prepared_splits
from refreshkv.train.experiment.jobs import Command, Job, _prepared_settings
from refreshkv.train.experiment.running import run_jobs
from refreshkv.train.export_folder import is_export
from refreshkv.train.public_files import public_run
from refreshkv.train.run_folder import foreign_file, read_run, read_state, run_id
from refreshkv.train.run_lock import locked_run
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.timeout(20)


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    """Who waits for a pipe's writer waits longer than a test may take."""
    monkeypatch.setattr("refreshkv.reading.SECONDS_FOR_A_WRITER", 1000.0)


def run_job(folder):
    job = Job("study/base", [Command("train.py", [], folder / "made")])
    run_jobs([job], [""], folder, folder / "logs", 10.0, print)


def lock(folder):
    with locked_run(folder):
        pass


REFUSED = {
    "run.json": run_id,
    "run.yaml": read_run,
    "state.json": read_state,
    ".training": lock,
    "logs/study-base.log": run_job,
    "public.yaml": lambda folder: public_run(folder / "public.yaml"),
    "look_ahead.safetensors": lambda folder: load_look_ahead(tiny_model(), folder),
    "store.json": lambda folder: FolderBackend(folder, {}, "--prefix-store"),
    "report.json": lambda folder: open_output(folder, ("report.json",), overwrite=True),
    "records.jsonl": lambda folder: open_output(folder, ("records.jsonl",), overwrite=True),
    f"{FOLDER}/generate.py": write_custom_generate,
}
"""File -> what reads it and refuses it in one line."""

TAKEN_FOR_ABSENT = {
    RECORD_FILE: (not_on_record, "has no list of the files"),
    "config.json": (is_export, "False"),
    "rows.json": (lambda folder: _prepared_settings(folder / "rows.json"), "{}"),
    "checkpoints/step-0000002/manifest.json": (foreign_file, "None"),
}
"""File -> what reads it and what it returns, as for a file that is not there."""


def with_pipe(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / name)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_pipes_are_refused_in_one_line(tmp_path, name):
    with pytest.raises(SettingsError) as raised:
        REFUSED[name](with_pipe(tmp_path, name))
    assert name.partition("/")[0] in str(raised.value) and "\n" not in str(raised.value)
    assert (tmp_path / name).is_fifo()


def test_a_folder_in_place_of_a_log_is_refused(tmp_path):
    (tmp_path / "logs/study-base.log").mkdir(parents=True)
    with pytest.raises(SettingsError, match="output: .*study-base.log is a folder"):
        run_job(tmp_path)


@pytest.mark.parametrize("name", TAKEN_FOR_ABSENT)
def test_pipes_are_no_files_of_ours(tmp_path, name):
    read, found = TAKEN_FOR_ABSENT[name]
    assert found in str(read(with_pipe(tmp_path, name)))
    assert (tmp_path / name).is_fifo()


def test_rows_and_kept_facts_are_computed_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("REFRESHKV_CACHE", str(tmp_path))
    with_pipe(tmp_path, "rows.json")
    assert _prepared_splits(str(tmp_path), "any") is None
    with_pipe(tmp_path, f"{digest(['a fact', []])}.json")
    assert remembered("a fact", [], lambda: 3) == 3


def test_hidden_folders_are_not_searched(tmp_path):
    """Such as .git of a cloned model, in which programs keep sockets; folders that are not hidden are searched."""
    refuse_special_files(with_pipe(tmp_path, ".git/modules/daemon.ipc"), "--model")
    with_pipe(tmp_path, "unit/.cache")
    with pytest.raises(SettingsError, match="--model: .*unit/.cache is a pipe, a socket or a device"):
        refuse_special_files(tmp_path, "--model")
