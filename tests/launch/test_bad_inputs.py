"""Each bad input of `tests/launch/bad_inputs.py` ends in one line that names the setting, and leaves files alone."""

import hashlib
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest

from refreshkv.launch.command import main
from tests.helpers.forked import CommandServer, Done, may_mount
from tests.launch.bad_inputs import Case, cases
from tests.launch.world import make_world, write_inputs

SECONDS = 60
"""Longest time of a case: most take less than one second, but machines are shared."""
ERROR = re.compile(r"(^|: )error: ")
LOCKS = (".lock", ".results.lock")
"""Empty files that stay where a command has been at work."""
TABLE = cases()


@pytest.fixture(scope="session")
def server():
    with CommandServer() as started:
        yield started


@pytest.fixture(scope="session")
def world(server, tmp_path_factory):
    """The folder of good inputs."""
    folder = tmp_path_factory.mktemp("bad-inputs")
    make_world(server, folder / "world")
    return folder / "world"


@pytest.fixture(scope="session")
def can_mount():
    return may_mount()


def named(case: Case) -> str:
    return case.name


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids=named)
def test_one_line(case, server, world, tmp_path, can_mount):
    if not can_mount and {"read_only", "mounted_bytes"} & case.settings.keys():
        pytest.skip("no file system can be mounted here")
    folder = tmp_path / "copy"
    shutil.copytree(world, folder, symlinks=True)
    change_files(case, folder)
    before = contents(folder)
    done = run(case, server, folder)
    problems = [*judge(case, done), *changed(before, contents(folder), case)]
    assert not problems, "; ".join(problems) + f"\n$ refreshkv {case.command}\n{done.out[-2000:]}\n{done.err[-4000:]}"


def change_files(case: Case, folder: Path) -> None:
    for name, change in case.files.items():
        path = folder / name
        if callable(change):
            change(path)
        elif isinstance(change, bytes):
            path.write_bytes(change)
        else:
            path.write_text(change)


def run(case: Case, server: CommandServer, folder: Path) -> Done:
    settings = {"seconds": SECONDS, **case.settings}
    if case.stdin is not None:
        settings["stdin"] = case.stdin
    return server.run(case.command.split(" "), folder, **settings)


def judge(case: Case, done: Done) -> list[str]:
    """What is wrong with the code and the words."""
    problems = [] if done.code == case.code else [f"exit code {done.code}, not {case.code}"]
    lines = done.err.strip().splitlines()
    last = done.out if case.code == 0 else lines[-1] if lines else ""
    if case.code != 0:
        if not ERROR.search(last):
            problems.append(f"no line of an error: {last!r}")
        if sum(bool(ERROR.search(line)) for line in lines) > 1:
            problems.append("more than one line of an error")
    lacking = [word for word in case.words if not any(part in last for part in word.split("|"))]
    problems += [f"the line lacks {word!r}: {last!r}" for word in lacking]
    if "Traceback" in done.out + done.err:
        problems.append("a traceback")
    return problems


def contents(folder: Path) -> dict[str, str]:
    """Path -> kind and checksum of everything below `folder`."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink():
                value = f"link to {os.readlink(path)}"
            elif path.is_file():
                with path.open("rb") as file:
                    value = hashlib.file_digest(file, "blake2b").hexdigest()
            else:
                value = "folder" if path.is_dir() else "special"
            found[str(path.relative_to(folder))] = value
    return found


def changed(before: dict[str, str], after: dict[str, str], case: Case) -> list[str]:
    """What the command overwrote, removed, or left half done."""
    lost = [path for path, value in before.items() if after.get(path) != value]
    partial = [path for path in after.keys() - before.keys() if ".partial" in path]
    problems = [f"changed: {', '.join(lost)}"] if lost else []
    return [*problems, f"left: {', '.join(partial)}"] if partial else problems


@pytest.mark.parametrize("case", [case for case in TABLE if case.is_sample], ids=named)
def test_a_sample(case, tmp_path, monkeypatch, capsys):
    """Cases that are refused before anything is loaded, in this process: a server would take longer to start."""
    write_inputs(tmp_path / "copy")
    change_files(case, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(sys, "argv", ["refreshkv", *case.command.split(" ")])
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = contents(tmp_path / "copy")
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    problems = judge(case, Done(int(ended.value.code), printed.out, printed.err, 0.0))
    assert [*problems, *changed(before, contents(tmp_path / "copy"), case)] == []


def test_the_table_is_large_and_covers_every_command():
    assert len(TABLE) >= 100
    commands = {case.command.split()[0] for case in TABLE}
    assert commands >= {"prepare", "train", "evaluate", "sweep", "experiment", "export", "generate", "fetch", "doctor"}
    assert 10 <= sum(case.is_sample for case in TABLE) <= 20
