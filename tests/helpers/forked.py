"""Console commands in forks of one process that has imported everything once; imports take longer than most commands.

    with CommandServer() as server:
        done = server.run(["generate", "--model", "model"], folder, environment={"LC_ALL": "C"})

A command gets its own working folder, standard streams, environment, time limit and memory limit.
"""

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("prepare", "train", "evaluate", "sweep", "experiment", "export", "generate", "show", "fetch", "doctor")
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
        environment |= {
            "PIP_INDEX_URL": "http://127.0.0.1:9",
            "PIP_RETRIES": "0",
        }  # a fetch that is not refused must not reach a network
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
        self._process.wait(60)

    def run(self, arguments: list[str], folder: Path, **settings: Any) -> Done:
        """Runs `refreshkv ARGUMENTS` in `folder`.

        settings: as those of `_become_command`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": arguments, "folder": str(folder), **settings}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


def serve() -> None:
    """Answers requests, a line of JSON each, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in [*LIBRARIES, *(f"refreshkv.{part}" for part in PARTS), *(f"refreshkv.launch.{c}" for c in COMMANDS)]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        pipes = [os.pipe() for _ in range(2)]
        child = os.fork()
        if child == 0:
            _become_command(pipes=pipes, **request)
        for _, written in pipes:
            os.close(written)
        streams = {read: bytearray() for read, _ in pipes}
        code = _wait(child, began + request.get("seconds", 60), streams)
        for read, _ in pipes:
            os.close(read)
        out, err = (content.decode(errors="replace") for content in streams.values())
        answer = {"code": code, "seconds": time.monotonic() - began, "out": out, "err": err}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait(child: int, end: float, streams: dict[int, bytearray]) -> int:
    """The exit code of a command that ends before `end`. streams: pipes, and what the command has written into each."""
    waiting, status, killed = select.poll(), None, False
    for number in streams:
        waiting.register(number, select.POLLIN)
    still_open = set(streams)
    while status is None or still_open:
        for number, _ in waiting.poll(5) if still_open else [(None, None)]:
            if number is None:
                time.sleep(0.005)
            elif block := os.read(number, 1 << 16):
                streams[number] += block
            else:
                waiting.unregister(number)
                still_open.remove(number)
        if status is None:
            ended, found = os.waitpid(child, os.WNOHANG)
            status = found if ended else None
        if not killed and (status is not None or time.monotonic() > end):
            killed = status is None
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what the command has left running, or the command itself
    return ENDED_LATE if killed else os.waitstatus_to_exitcode(status)


def _become_command(
    arguments: list[str],
    folder: str,
    pipes: list[tuple[int, int]],
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
        pipes: for standard output and standard error, the ends to read from and to write to.
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
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        os.dup2(os.open(stdout, os.O_WRONLY) if stdout else pipes[0][1], 1)
        os.dup2(pipes[1][1], 2)
        for number in [*pipes[0], *pipes[1]]:
            os.close(number)
        encoding = (environment or {}).get("PYTHONIOENCODING", "utf-8")
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            errors = "backslashreplace" if name == "stderr" else "strict"
            setattr(sys, name, open(number, mode, encoding=encoding, errors=errors, closefd=False))
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
    os._exit(0)  # nothing is left to tidy up, and that takes seconds
