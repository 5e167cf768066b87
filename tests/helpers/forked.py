"""Console commands in forks of one process that has imported everything once; imports take longer than most commands.

    with CommandServer() as server:
        done = server.run(["generate", "--model", "model"], folder, environment={"LC_ALL": "C"})

A command gets its own working folder, standard streams, environment, time limit and memory limit.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("prepare", "train", "evaluate", "sweep", "experiment", "export", "generate", "fetch", "doctor")
LIBRARIES = ("deepspeed", "matplotlib.pyplot", "transformers.models.llama.modeling_llama", "torch._dynamo")
PARTS = ("train.loop", "train.export", "train.hub", "train.preflight", "train.step_time", "evaluation.commands")
ROOM = 4 << 30
"""Bytes of address space that a command may take beside those of the server."""
ENDED_LATE = -1
"""In place of the exit code of a command that was killed at its time limit."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    """Exit code, minus the number of the signal that killed it, or `ENDED_LATE`."""
    out: str
    err: str
    seconds: float


class CommandServer:
    """Runs one command at a time."""

    def __enter__(self) -> "CommandServer":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
        environment |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "tests.helpers.forked"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)

    def run(self, arguments: list[str], folder: Path, streams: Path, **settings: Any) -> Done:
        """Runs `refreshkv ARGUMENTS` in `folder`; what it prints goes to files in `streams`.

        settings: as those of `_become_command`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": arguments, "folder": str(folder), "streams": str(streams), **settings}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        out, err = (_text(streams / name) for name in ("out", "err"))
        return Done(answer["code"], out, err, answer["seconds"])


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def serve() -> None:
    """Answers requests, a line of JSON each, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in [*LIBRARIES, *(f"refreshkv.{part}" for part in PARTS), *(f"refreshkv.launch.{c}" for c in COMMANDS)]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _become_command(**request)
        code = _wait(child, began + request.get("seconds", 60))
        answers.write(json.dumps({"code": code, "seconds": time.monotonic() - began}) + "\n")
        answers.flush()


def _wait(child: int, end: float) -> int:
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what the command has left running
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return ENDED_LATE
        time.sleep(0.005)


def _become_command(
    arguments: list[str],
    folder: str,
    streams: str,
    stdin: str = "/dev/null",
    stdout: str | None = None,
    environment: dict[str, str] | None = None,
    seconds: float = 60,
    file_bytes: int | None = None,
    read_only: str | None = None,
    mounted_bytes: tuple[str, int] | None = None,
) -> None:
    """Turns this process into a command.

    Args:
        stdin, stdout: files; relative ones lie below `folder`.
        seconds: the time limit, which `serve` keeps.
        file_bytes: largest file that it may write, as on a full disk.
        read_only: a folder below which nothing may be written.
        mounted_bytes: a folder, and the size of a small disk that is mounted there.
    """
    os.setpgid(0, 0)
    code = 120
    try:
        os.chdir(folder)
        files = (stdin, stdout or f"{streams}/out", f"{streams}/err")
        for number, (file, flags) in enumerate(zip(files, (os.O_RDONLY, *2 * [os.O_WRONLY | os.O_CREAT]), strict=True)):
            os.dup2(os.open(file, flags), number)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            errors = "backslashreplace" if name == "stderr" else "strict"
            setattr(sys, name, open(number, mode, encoding="utf-8", errors=errors, closefd=False))
        os.environ |= environment or {}
        if read_only or mounted_bytes:
            mount(read_only, mounted_bytes)
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["refreshkv", *arguments]
        code = _exit_code()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _exit_code() -> int:
    """Runs the console command as the interpreter would: the code of its `SystemExit`, 1 after any other error."""
    from refreshkv.launch.command import main

    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = 1 if isinstance(error.code, str) else error.code or 0
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            print("Exception ignored while flushing sys.stdout: Traceback", file=sys.stderr)
            return 120  # as the interpreter does
        return code
    raise AssertionError("a command ends with SystemExit")


def mount(read_only: str | None, small: tuple[str, int] | None) -> None:
    """Gives this process a file system of its own kind. Raises `OSError` where that is not allowed."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    new_user = 0 if os.geteuid() == 0 else 0x10000000
    _checked(libc.unshare(0x00020000 | new_user))
    _checked(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))  # MS_REC | MS_PRIVATE: for this process alone
    if small:
        folder, size = small
        _checked(libc.mount(b"none", os.path.abspath(folder).encode(), b"tmpfs", 0, f"size={size}".encode()))
    if read_only:
        path = os.path.abspath(read_only).encode()
        _checked(libc.mount(path, path, None, 0x1000, None))  # MS_BIND
        _checked(libc.mount(b"none", path, None, 0x1000 | 0x20 | 0x1, None))  # MS_BIND | MS_REMOUNT | MS_RDONLY


def _checked(result: int) -> None:
    import ctypes

    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def may_mount() -> bool:
    """Whether `mount` works here."""
    code = "from tests.helpers.forked import mount; mount(None, ('/tmp', 65536))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


if __name__ == "__main__":
    serve()
