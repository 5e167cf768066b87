"""The console command as a process of its own, which forks of one process cannot show; how errors become one line."""

import errno
import os
import subprocess
import sys

import pytest

from refreshkv import cli
from refreshkv.errors import SettingsError
from refreshkv.machine import is_full_disk, machine_problem
from refreshkv.ranges import COUNT, SEED, Range
from tests.helpers.jobs import ROOT


def command(line, shell="{}", **environment):
    """`refreshkv LINE`; shell: what a shell does with the command."""
    started = f"{sys.executable} -m refreshkv {line}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", shell.format(started)], env=environment, capture_output=True, timeout=120, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("shell", "code", "message"),
    [
        ("{} > /dev/full", 2, "error: standard output cannot be written to"),
        ("{} >&-", 0, ""),
        ("{} 2>&-", 0, ""),
        ("{} >&- 2>&- <&-", 0, ""),
        ("set -o pipefail; {} | true", None, ""),
    ],
)
def test_standard_streams(shell, code, message):
    done = command("--help", shell)
    error = done.stderr.decode()
    assert "Traceback" not in error and "Exception ignored" not in error
    assert error.startswith(message) and len(error.splitlines()) == bool(message)
    assert done.returncode == code if code is not None else done.returncode in (0, cli.READER_GONE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
    ],
    ids=lambda environment: "-".join(environment.values()),
)
def test_locales(environment, tmp_path):
    """UTF-8 in, whatever the locale says; what the terminal cannot show is written with backslashes."""
    model = ROOT / "base" / "python-4m"
    line = f"generate --model {model} --prompt-file - --max-new-tokens 2"
    words = tmp_path / "wörter.txt"
    words.write_bytes("déjà vu – naïve".encode())
    done = command(line, f"{{}} < '{words}'", **environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    words.write_bytes("déjà vu".encode("latin-1"))
    done = command(line, f"{{}} < '{words}'", **environment)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("error: --prompt-file: standard input is not UTF-8")


def exit_of(main, monkeypatch, capsys, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["refreshkv"])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    return ended.value.code, capsys.readouterr().err


def raising(error):
    def main(arguments):
        raise error

    return main


class RustError(Exception):
    """Stands for an error of a library in Rust."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SettingsError("training.steps\n must be more"), "training.steps must be more"),
        (OSError(errno.ENOSPC, "No space left on device", "out/report.json"), "out/report.json: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: this user has no right"),
        (RustError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RustError("Error while serializing: I/O error: File too large (os error 27)"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0"), "the disk is full"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "not enough memory",
        ),
        (MemoryError("Unable to allocate 9 TiB"), "not enough memory"),
    ],
)
def test_errors_of_the_user_and_the_machine_are_one_line(error, words, monkeypatch, capsys):
    code, printed = exit_of(raising(error), monkeypatch, capsys)
    assert code == 2 and printed.startswith("error: ") and words in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), FileNotFoundError("x"), RuntimeError("x")])
def test_our_own_mistakes_keep_their_traceback(error, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["refreshkv"])
    with pytest.raises(type(error)):
        cli.run(raising(error))


def test_the_traceback_of_one_line_can_be_seen(monkeypatch, capsys):
    _, printed = exit_of(raising(SettingsError("x")), monkeypatch, capsys, REFRESHKV_TRACEBACK="1")
    assert printed.startswith("Traceback") and printed.endswith("error: x\n")


def test_the_cause_of_an_error_counts():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as cause:
            raise RuntimeError("the writer failed") from cause
    except RuntimeError as error:
        assert is_full_disk(error) and "the disk is full" in machine_problem(error)
    assert machine_problem(RuntimeError("the writer failed")) is None


@pytest.mark.parametrize(
    ("environment", "prints"),
    [({}, True), ({"RANK": "0", "WORLD_SIZE": "2"}, True), ({"RANK": "1", "WORLD_SIZE": "2"}, False)]
    + [({"RANK": "5", "WORLD_SIZE": "2"}, True), ({"RANK": "x", "WORLD_SIZE": "2"}, True), ({"RANK": "1"}, True)],
)
def test_one_rank_prints(environment, prints, monkeypatch, capsys):
    _, printed = exit_of(raising(SettingsError("x")), monkeypatch, capsys, **environment)
    assert printed == ("error: x\n" if prints else "")


@pytest.mark.parametrize(
    ("wanted", "inside", "outside"),
    [
        (COUNT, [1, 2**31 - 1], [0, -1, 2**31, 10**400]),
        (SEED, [0, 2**32 - 1], [-1, 2**32]),
        (Range(0, 1, above=True), [1e-300, 0.5, 1], [0, -0.1, 1.1, float("nan"), float("inf"), -float("inf")]),
        (Range(0, 1, below=True), [0, 0.999], [1, -1e-9, float("nan")]),
    ],
)
def test_ranges(wanted, inside, outside):
    assert [wanted.problem(value) for value in inside] == [None] * len(inside)
    assert all(wanted.problem(value) for value in outside)
