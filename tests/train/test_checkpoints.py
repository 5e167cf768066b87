"""Checkpoints by their readers: what is damaged, whose it is, and what overwriting a run removes."""

import errno
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from refreshkv.loading import load_configuration, load_model, model_folder
from refreshkv.settings import SettingsError, settings_from_dict
from refreshkv.train.checkpoint import _finish
from refreshkv.train.checkpoint_reader import find_checkpoint, is_trained, newest_checkpoint, newest_described
from refreshkv.train.config import RunConfig
from refreshkv.train.faults import WriteFailed
from refreshkv.train.loop import prepared
from refreshkv.train.manifest import write_manifest
from refreshkv.train.run_folder import (
    State,
    claim_output,
    finished_checkpoints,
    note_saved,
    run_id,
    step_folder,
    validate_output,
)
from refreshkv.train.run_lock import locked_run, validate_unlocked
from tests.helpers.jobs import run_settings

ROWS = "fingerprint of the rows"


def run_config(output, **training):
    return settings_from_dict(RunConfig, run_settings(Path("rows"), output, training=training))


def add_checkpoint(output, step, run=None, **training):
    """A checkpoint with a file of weights, as `save_checkpoint` leaves it."""
    folder = step_folder(output, step)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    torch.save({"module": {}}, folder / "mp_rank_00_model_states.pt")
    state = State(step, 100 * step, 1, 0, ROWS, run_id(output) if run is None else run)
    (folder / "state.json").write_text(json.dumps(vars(state)))
    settings = run_settings(Path("rows"), output, training=training)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    write_manifest(folder)
    return folder


@pytest.fixture
def output(tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path / "run"
    claim_output(folder, run_config(folder), overwrite=False)
    for step in (2, 4):
        add_checkpoint(folder, step)
    return folder


def resumed(output, **training):
    """What --resume continues from, and what it says."""
    return newest_checkpoint(output, 0, 1, run_config(output, **training), ROWS)


def content(folder):
    """Each file's bytes; of what is no file, its kind and address."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[path] = path.read_bytes() if path.is_file() else (stat.S_IFMT(status.st_mode), status.st_ino)
    return found


def gone(name):
    return lambda folder: (folder / name).unlink()


def wrong(name, text):
    return lambda folder: (folder / name).write_text(text)


def listed(name, text):
    """The file's new content is on the manifest, too: only its meaning is wrong."""

    def change(folder):
        (folder / name).write_text(text)
        write_manifest(folder)

    return change


def pipe(name):
    """A named pipe that nothing writes to: who opens it waits without end."""

    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def folder_instead(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def device(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return change


def unlisted_pipe(folder):
    os.mkfifo(folder / "model" / "generation_config.json")


def unlisted_settings(folder):
    pipe("run.yaml")(folder)
    write_manifest(folder)


def shorter(folder):
    file = folder / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-5])


def another_rank(folder):
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_7_mp_rank_00_optim_states.pt")


def model_code(folder):
    (folder / "model" / "modeling_planted.py").write_text("")


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def half_removed(folder):
    """What a kill during a removal in place would leave."""
    for name in ("manifest.json", "run.yaml", "mp_rank_00_model_states.pt"):
        (folder / name).unlink()


def left_out_of_the_manifest(folder):
    (folder / "state.json").rename(folder / "aside")
    write_manifest(folder)
    (folder / "aside").rename(folder / "state.json")


STATE = {"step": 4, "tokens": 1, "world_size": 1, "zero_stage": 0, "rows": ROWS}
DAMAGES = {
    "no state": gone("state.json"),
    "state cut off": wrong("state.json", '{"step": 4'),
    "state is a list": listed("state.json", "[]"),
    "state is null": listed("state.json", "null"),
    "state with other keys": listed("state.json", '{"steps": 4}'),
    "state with values of another kind": listed("state.json", json.dumps({**STATE, "tokens": "many"})),
    "state of another step": listed("state.json", json.dumps({**STATE, "step": 2})),
    "state not on the manifest": left_out_of_the_manifest,
    "no settings": gone("run.yaml"),
    "settings cut off": listed("run.yaml", "training: {"),
    "settings unknown": listed("run.yaml", "training:\n  stepps: 3\n"),
    "settings empty": listed("run.yaml", ""),
    "no manifest": gone("manifest.json"),
    "manifest cut off": wrong("manifest.json", "{"),
    "manifest is a list": wrong("manifest.json", "[]"),
    "manifest without files": wrong("manifest.json", "{}"),
    "manifest of texts": wrong("manifest.json", '{"files": {"state.json": "x"}}'),
    "weights gone": gone("mp_rank_00_model_states.pt"),
    "weights cut off": shorter,
    "one rank too many": another_rank,
    "model file too many": model_code,
    "manifest is a pipe": pipe("manifest.json"),
    "state is a pipe": pipe("state.json"),
    "settings are a pipe": pipe("run.yaml"),
    "settings are a pipe and not on the manifest": unlisted_settings,
    "weights are a pipe": pipe("mp_rank_00_model_states.pt"),
    "model file is a pipe": pipe("model/config.json"),
    "model file is a pipe too many": unlisted_pipe,
    "manifest is a folder": folder_instead("manifest.json"),
    "state is a folder": folder_instead("state.json"),
    "weights are a folder": folder_instead("mp_rank_00_model_states.pt"),
    "manifest is a device": device("manifest.json"),
    "settings are a device": device("run.yaml"),
    "weights are a device": device("mp_rank_00_model_states.pt"),
    "empty": emptied,
    "half removed": half_removed,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_is_not_missing(output, damage):
    """Every reader finds the damage: resuming sets the checkpoint aside and says so, others refuse or train again."""
    newest = step_folder(output, 4)
    DAMAGES[damage](newest)
    before = content(newest)
    assert not is_trained(run_config(output), newest)
    for given in (output, newest):
        with pytest.raises(SettingsError, match="CHECKPOINT: .*step-0000004 is damaged or incomplete: .+step-0000002"):
            find_checkpoint(given)
    assert newest_described(output).state.step in (2, 4)
    assert content(newest) == before

    checkpoint, warnings = resumed(output)
    assert checkpoint.state.step == 2 and checkpoint.settings == run_config(output)
    (warning,) = warnings
    assert str(newest) in warning and "step-0000004.damaged" in warning and "\n" not in warning
    assert not newest.exists() and len(content(output / "checkpoints" / "step-0000004.damaged")) == len(before)
    assert find_checkpoint(output).state.step == 2 and is_trained(run_config(output), step_folder(output, 2))


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_changes_if_all_are_damaged(output, damage):
    for checkpoint in finished_checkpoints(output):
        DAMAGES[damage](checkpoint)
    before = content(output)
    if damage == "state of another step":
        return  # step 2 is then as it was
    with pytest.raises(SettingsError, match="--resume: .* is damaged .* no good checkpoint is left.*--overwrite"):
        resumed(output)
    assert content(output) == before


def test_what_was_set_aside_is_never_replaced(output):
    for number in ("damaged", "damaged-2"):
        gone("state.json")(step_folder(output, 4))
        _, (warning,) = resumed(output)
        assert f"step-0000004.{number}" in warning
        add_checkpoint(output, 4)
    names = [path.name for path in (output / "checkpoints").glob("*damaged*")]
    assert sorted(names) == ["step-0000004.damaged", "step-0000004.damaged-2"]


@pytest.mark.parametrize("lost", ["removed", "link to nowhere", "folder of checkpoints removed"])
def test_checkpoints_that_were_saved_are_missed(output, tmp_path, lost):
    """A disk that is not mounted is no reason to begin anew."""
    note_saved(output, 4)
    for checkpoint in finished_checkpoints(output):
        shutil.rmtree(checkpoint)
    if lost != "removed":
        (output / "checkpoints").rmdir()
    if lost == "link to nowhere":
        (output / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(SettingsError, match="--resume: .*checkpoints"):
        resumed(output)


def test_a_checkpoint_says_whose_it_is(output, tmp_path):
    """Copied here, or left by a run that was overwritten: neither resumed, exported nor taken for trained."""
    add_checkpoint(output, 6, run="another")
    for read in (lambda: resumed(output), lambda: find_checkpoint(output)):
        with pytest.raises(SettingsError, match="step-0000006 is of another run than .*run.yaml; move it out"):
            read()
    shutil.rmtree(step_folder(output, 6))
    add_checkpoint(output, 6, learning_rate=0.5)
    for read in (lambda: resumed(output), lambda: find_checkpoint(output)):
        with pytest.raises(SettingsError, match="step-0000006 was trained with training.learning_rate=0.5, the run"):
            read()
    assert not is_trained(run_config(output), step_folder(output, 6))
    alone = shutil.move(step_folder(output, 6), tmp_path / "best")
    assert find_checkpoint(Path(alone)).state.step == 6  # by itself it may be exported
    add_checkpoint(output, 8, save_every=7, keep_checkpoints=9)  # what changes nothing that is trained
    assert resumed(output)[0].state.step == 8 and is_trained(run_config(output), step_folder(output, 8))


def test_runs_of_earlier_versions_are_still_read(output):
    (output / "run.json").unlink()
    add_checkpoint(output, 6, run="")
    state = json.loads((step_folder(output, 6) / "state.json").read_text())
    del state["run"]
    listed("state.json", json.dumps(state))(step_folder(output, 6))
    assert resumed(output)[0].state.step == 6 and find_checkpoint(output).state.step == 6


def test_a_checkpoint_is_no_model(output):
    for given in (output, step_folder(output, 4)):
        for read in (
            lambda name: model_folder(name, "--model"),
            lambda name: load_configuration(name, "--model"),
            lambda n: load_model(n, "--model"),
        ):
            with pytest.raises(SettingsError, match="--model: .* holds checkpoints of training.*launch/export.py"):
                read(str(given))


def link_to_another_disk(output, disk, name):
    shutil.move(output / name, disk / "there")
    (output / name).symlink_to(disk / "there")


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "checkpoints/step-0000004", "."])
def test_overwriting_behind_a_link_removes_the_old_run(output, tmp_path, name):
    """The old run's checkpoints would otherwise win. The link stays, and nothing beside what it leads to is touched."""
    (output / "tensorboard").mkdir()
    (output / "tensorboard" / "events.out.tfevents.1").touch()
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "mine.txt").write_text("mine")
    if name == ".":
        shutil.move(output, disk / "there")
        output.symlink_to(disk / "there")
    else:
        link_to_another_disk(output, disk, name)
    config = run_config(output, seed=7)
    validate_output(output, config, resume=False, overwrite=True)
    before = run_id(output)
    claim_output(output, config, overwrite=True)
    assert finished_checkpoints(output) == [] and run_id(output) not in (None, before)
    assert not list(output.glob("tensorboard/*")) and (disk / "mine.txt").read_text() == "mine"
    assert resumed(output, seed=7) == (None, [])
    if name != "checkpoints/step-0000004":
        assert output.is_symlink() or (output / name).is_symlink()


@pytest.mark.parametrize(
    "function",
    ["refreshkv.files.os.replace", "refreshkv.files.shutil.rmtree", "refreshkv.train.run_folder.Path.unlink"],
)
def test_a_run_that_cannot_be_removed_is_not_overwritten(output, monkeypatch, function):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    (output / "metrics.jsonl").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(function, refuse)
        with pytest.raises(SettingsError, match="training.output=.* cannot be written to: .*Permission denied"):
            claim_output(output, run_config(output, seed=7), overwrite=True)
    assert "seed: 7" not in (output / "run.yaml").read_text()


OWN = {
    "beside the run": "notes.txt",
    "hidden": ".notes",
    "in a folder": "thesis/chapter.tex",
    "an export": "model/config.json",
    "among the checkpoints": "checkpoints/notes.txt",
    "a file called like a checkpoint": "checkpoints/step-best",
    "a folder among the checkpoints": "checkpoints/best/notes.txt",
    "in a checkpoint": "checkpoints/step-0000002/notes.txt",
    "in a checkpoint's model": "checkpoints/step-0000004/model/notes.txt",
    "among the curves": "tensorboard/notes.txt",
}


@pytest.mark.parametrize("place", OWN)
def test_overwriting_a_run_refuses_what_the_run_has_not_written(output, place):
    file = output / OWN[place]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    before = content(output)
    with pytest.raises(SettingsError, match=r"training.output=.* also holds .*(notes|thesis|model|best).*move it away"):
        validate_output(output, run_config(output), resume=False, overwrite=True)
    validate_output(output, run_config(output), resume=True, overwrite=False)
    assert content(output) == before


def test_overwriting_a_run_takes_all_that_a_run_leaves(output):
    """Also what kills and faults have left: the same command can be given again."""
    for name in ("step-0000006.partial", "step-0000004.universal", "step-0000002.damaged", ".step-0000001.removed"):
        shutil.copytree(step_folder(output, 2), output / "checkpoints" / name)
    gone("manifest.json")(step_folder(output, 4))
    names = ["metrics.jsonl", "failure.txt", "stuck-rank-0.txt", ".run.yaml.partial", ".metrics.jsonl.partial"]
    for name in (*names, "checkpoints/zero_to_fp32.py", "checkpoints/latest"):
        (output / name).touch()
    validate_output(output, run_config(output, seed=7), resume=False, overwrite=True)
    claim_output(output, run_config(output, seed=7), overwrite=True)
    assert sorted(os.listdir(output)) == ["run.json", "run.yaml"]


@pytest.mark.parametrize(
    "left", [[], ["run.json"], [".run.json.partial"], ["run.json", ".run.yaml.partial", "failure.txt"]]
)
def test_a_job_killed_before_its_run_began_has_begun_none(tmp_path, left):
    output = tmp_path / "run"
    output.mkdir()
    for name in left:
        (output / name).write_text("{}")
    for resume in (False, True):
        validate_output(output, run_config(output), resume=resume, overwrite=False)
    claim_output(output, run_config(output), overwrite=False)
    assert run_id(output)


def test_the_oldest_leave_their_names_first(output, monkeypatch):
    """A kill in a removal leaves no half of a checkpoint under a name that counts; the next start clears it away."""

    def killed(path, *arguments, **options):
        assert Path(path).name == ".step-0000002.removed"
        raise KeyboardInterrupt

    partial = add_checkpoint(output, 6).rename(output / "checkpoints" / "step-0000006.partial")
    with monkeypatch.context() as patched:
        patched.setattr("refreshkv.files.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            _finish(partial, step_folder(output, 6), output, kept=2)
    assert [folder.name for folder in finished_checkpoints(output)] == ["step-0000004", "step-0000006"]
    assert resumed(output)[0].state.step == 6
    claim_output(output, run_config(output), overwrite=False)
    assert sorted(os.listdir(output / "checkpoints")) == ["step-0000004", "step-0000006"]


def test_a_checkpoint_of_the_same_step_is_set_aside(output):
    partial = add_checkpoint(output, 6).rename(output / "checkpoints" / "step-0000006.partial")
    gone("state.json")(add_checkpoint(output, 6))
    _finish(partial, step_folder(output, 6), output, kept=5)
    assert (output / "checkpoints" / "step-0000006.damaged").is_dir() and find_checkpoint(output).state.step == 6


def test_an_old_checkpoint_that_cannot_be_removed_is_named(output, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "step-0000002")

    partial = add_checkpoint(output, 6).rename(output / "checkpoints" / "step-0000006.partial")
    monkeypatch.setattr("refreshkv.files.shutil.rmtree", refuse)
    with pytest.raises(WriteFailed, match="step-0000006 cannot take the place of an old one: .*Permission denied"):
        _finish(partial, step_folder(output, 6), output, kept=2)
    assert resumed(output)[0].state.step == 6


def test_one_job_at_a_time_trains_in_a_folder(output):
    with locked_run(output):
        with pytest.raises(SettingsError, match="another job trains in training.output="):
            validate_unlocked(output)
        job: Any = SimpleNamespace(config=run_config(output), output=output)
        with (
            pytest.raises(SettingsError, match="wait until it has ended, or name another folder"),
            prepared(job, resume=True, overwrite=False),
        ):
            pass
    validate_unlocked(output)


def test_a_lock_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / ".training").mkdir()
    with (
        pytest.raises(SettingsError, match=r"training.output: .*/\.training cannot .*Is a directory.*another folder"),
        locked_run(tmp_path),
    ):
        pass


def test_without_locks_training_goes_on_with_a_warning(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.warns(UserWarning, match="cannot be locked .No locks available.: start no second job"),
        locked_run(tmp_path),
    ):
        pass
