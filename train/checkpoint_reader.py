"""Reads a run's checkpoints: one reader for resuming, exporting and experiments.

A folder named step-NNNNNNN in a run's `checkpoints` is a checkpoint, whatever lies in it. It is whole if every file is
as its manifest says, and it belongs to the run if it carries the run's id and settings. What is not whole is damaged
and never passed over in silence; nothing of a checkpoint is used before it has been checked.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from refreshkv.settings import SettingsError
from refreshkv.train.config import RunConfig
from refreshkv.train.manifest import MANIFEST_FILE, find_damage, gather
from refreshkv.train.run_folder import (
    RUN_FILE,
    STATE_FILE,
    State,
    changed_setting,
    checkpoint_step,
    finished_checkpoints,
    read_run,
    read_state,
    run_id,
    saved_step,
)
from refreshkv.train.safe_loading import find_code

DESCRIPTION = (STATE_FILE, RUN_FILE)
"""The files of a checkpoint that say what it is."""


class DamagedCheckpoint(Exception):
    """A checkpoint is not as it was written. The message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been checked."""

    folder: Path
    state: State
    settings: RunConfig


def open_checkpoint(folder: Path, rank: int = 0, world: int = 1, only: tuple[str, ...] | None = None) -> Checkpoint:
    """Checks a checkpoint, then reads its description; raises `DamagedCheckpoint`.

    All ranks call it together, and each checks its share of the files. only: check these files and no others.
    """
    problem = find_damage(folder, rank, world, only)
    if problem is not None:
        raise DamagedCheckpoint(problem)
    try:
        checkpoint = Checkpoint(folder, read_state(folder), read_run(folder))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedCheckpoint(" ".join(str(error).split()) or type(error).__name__) from error
    named = checkpoint_step(folder)
    if named not in (None, checkpoint.state.step):
        raise DamagedCheckpoint(f"its {STATE_FILE} is of step {checkpoint.state.step}")
    return checkpoint


def newest_described(output: Path) -> Checkpoint | None:
    """The newest checkpoint of a run whose description is whole, to look at before the work begins."""
    for folder in reversed(finished_checkpoints(output)):
        try:
            return open_checkpoint(folder, only=DESCRIPTION)
        except DamagedCheckpoint:
            continue  # `newest_checkpoint` sets it aside
    return None


def newest_checkpoint(
    output: Path, rank: int, world: int, config: RunConfig, rows: str
) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, None if there is none yet; and one line for each newer one, which is damaged.

    Damaged ones are renamed, so that they no longer count. All ranks call this together.

    Args:
        config: the run's settings of now.
        rows: fingerprint of the rows of now.

    Raises `SettingsError` if all checkpoints are damaged or gone, or if the newest whole one is of another run.
    """
    damaged: list[tuple[Path, str]] = []
    _validate_there(output)
    for folder in reversed(finished_checkpoints(output)):
        try:
            checkpoint = open_checkpoint(folder, rank, world)
        except DamagedCheckpoint as error:
            damaged.append((folder, str(error)))
            continue
        _validate_same_run(checkpoint, output, config)
        _validate_no_code(folder, "--resume", rank, world)
        if checkpoint.state.rows != rows:
            raise SettingsError("--resume: data.folder holds other rows than the run was started with")
        return checkpoint, [set_aside(folder, reason, rank) for folder, reason in damaged]
    if damaged:
        folder, reason = damaged[0]
        raise SettingsError(
            f"--resume: {folder} is damaged ({reason}), and no good checkpoint is left; start anew with --overwrite"
        )
    return None, []


def _validate_there(output: Path) -> None:
    """Raises `SettingsError` if checkpoints were saved and are not to be found."""
    checkpoints = output / "checkpoints"
    if checkpoints.is_symlink() and not checkpoints.exists():
        raise SettingsError(f"--resume: {checkpoints} leads to {os.readlink(checkpoints)}, which is not there")
    saved = saved_step(output)
    if saved and not finished_checkpoints(output):
        raise SettingsError(
            f"--resume: the checkpoint of step {saved} is not in {checkpoints}: bring it back, or start anew with "
            "--overwrite"
        )


def _validate_same_run(checkpoint: Checkpoint, output: Path, config: RunConfig, setting: str = "--resume") -> None:
    """Raises `SettingsError` if the checkpoint is not of the run in `output` with the settings `config`."""
    known = run_id(output)
    if known is not None and checkpoint.state.run != known:
        raise SettingsError(
            f"{setting}: {checkpoint.folder} is of another run than {output / RUN_FILE}; move it out of that folder"
        )
    changed = changed_setting(checkpoint.settings, config)
    if changed:
        name, before, now = changed
        raise SettingsError(
            f"{setting}: {checkpoint.folder} was trained with {name}={before!r}, the run in {output} has {now!r}; move "
            "it out of that folder"
        )


def _validate_no_code(folder: Path, setting: str, rank: int = 0, world: int = 1) -> None:
    """Raises `SettingsError` if a file holds more than tensors and plain values, on all ranks alike.

    `tensors_only` would not load it either, but only on the rank whose file it is, when the others already wait.
    """
    files = sorted(folder.glob("*.pt"))[rank::world]
    found = [problem for share in gather([_code_in(file) for file in files], world) for problem in share if problem]
    if found:
        raise SettingsError(
            f"{setting}: {folder}: {found[0]}, which is neither a tensor nor a plain value; loading it could run code, "
            "so it is not loaded"
        )


def _code_in(file: Path) -> str | None:
    try:
        return find_code(file)
    except Exception as error:  # torch's and pickle's errors for what is no file of torch.save have many types
        return f"{file.name} is no file of torch.save ({type(error).__name__})"


def set_aside(checkpoint: Path, reason: str, rank: int = 0) -> str:
    """Renames a damaged checkpoint so that it no longer counts; returns the line that tells the user."""
    aside, number = checkpoint.with_name(f"{checkpoint.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    if rank == 0:
        os.rename(checkpoint, aside)
    return f"{checkpoint} is damaged ({reason}); it is now {aside.name}, and the one before is used"


def find_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, or the newest one of the run in it, checked; for exports.

    Raises `SettingsError` if there is none, if it is damaged, or if it is not of the run whose folder it lies in.
    """
    if not folder.is_dir():
        raise SettingsError(f"CHECKPOINT: there is no folder {folder}")
    if checkpoint_step(folder) is None and not (folder / MANIFEST_FILE).is_file():
        if folder.name.startswith("step-"):
            raise _unfinished(folder)
        finished = finished_checkpoints(folder)
        if not finished:
            raise SettingsError(f"CHECKPOINT: {folder} is neither a finished checkpoint nor a run that has one")
        folder = finished[-1]
    elif folder.name.startswith("step-") and checkpoint_step(folder) is None:
        raise _unfinished(folder)
    try:
        checkpoint = open_checkpoint(folder)
    except DamagedCheckpoint as error:
        older = [other for other in finished_checkpoints(folder.parent.parent) if other.name < folder.name]
        hint = f"; the one before is {older[-1]}" if older else ""
        raise SettingsError(f"CHECKPOINT: {folder} is damaged or incomplete: {error}{hint}") from error
    run = folder.parent.parent
    if folder.parent.name == "checkpoints" and (run / RUN_FILE).is_file():
        _validate_same_run(checkpoint, run, read_run(run), "CHECKPOINT")
    _validate_no_code(folder, "CHECKPOINT")
    return checkpoint


def _unfinished(folder: Path) -> SettingsError:
    return SettingsError(
        f"CHECKPOINT: {folder} was not finished, or was set aside as damaged; give the run's folder to take its newest "
        "finished one"
    )


def is_trained(settings: RunConfig, folder: Path) -> bool:
    """Whether `folder` is a whole checkpoint of a run with these settings: what an experiment need not train again."""
    if not folder.is_dir():
        return False
    try:
        checkpoint = open_checkpoint(folder)
    except DamagedCheckpoint:
        return False  # training continues with --resume, which sets it aside and says so
    return changed_setting(checkpoint.settings, settings) is None
