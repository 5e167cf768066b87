"""What every command does around its own work: one-line errors, exit codes, and the name of a missing extra.

An error that the user or the machine causes is one line. Any other error is a mistake of ours and keeps its traceback.
"""

import ctypes
import os
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from refreshkv.errors import SettingsError

PARENT = "REFRESHKV_ENDS_WITH"
"""Environment variable with the process id of the process that a command must not outlive."""
PR_SET_PDEATHSIG = 1
"""Number of the operation in Linux's prctl."""

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("deepspeed", "tensorboard"),
    "eval": ("datasets", "pyarrow", "matplotlib", "accelerate"),
    "adapters": ("peft",),
    "lm-eval": ("lm_eval",),
    "tasks": ("rouge_score", "wonderwords", "zstandard", "inscriptis", "lxml"),
    "embeddings": ("sentence_transformers",),
    "gguf": ("gguf",),
    "serve": ("fastapi", "uvicorn", "openai"),
    "gpu": ("triton", "liger_kernel", "pynvml"),
    "8bit": ("bitsandbytes",),
    "flash-attn": ("flash_attn",),
}
"""Extra of pyproject.toml -> the modules that it adds. `train` also brings what `eval` does."""

TRACEBACK = "REFRESHKV_TRACEBACK"
"""Environment variable: with any value but 0, errors of one line have their traceback above them."""

OUTPUT_FAILS = "standard output cannot be written to; its disk may be full ({}): send it to another place"

REFUSED, READER_GONE, INTERRUPTED = 2, 141, 130
"""Exit codes: an error that the user can mend; standard output was closed by its reader, as in `| head`; Ctrl-C."""


def run(main: Callable[[list[str]], None], extra: str | None = None) -> NoReturn:
    """Calls `main` with the command line's arguments and exits.

    The codes: 0, or what `main` exits with; 2 after an error that the user or the machine caused; 130 after Ctrl-C; 141
    if the reader of standard output has gone.

    Such an error is printed as one line on stderr; in a job of several processes only rank 0 prints. The traceback
    comes with it if the environment has REFRESHKV_TRACEBACK=1. A missing module of `EXTRAS` is such an error too, with
    the extra to install: `extra` if given. All other errors are raised.
    """
    _end_with_parent()
    _prepare_streams()
    threading.excepthook = _report_thread
    try:
        code = _exit_code(main)
        _flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        output_fails = _standard_output_fails(error)
        if isinstance(error, BrokenPipeError):
            sys.exit(READER_GONE)
        message = OUTPUT_FAILS.format(error) if output_fails else _message(error, extra)
        if message is None:
            raise
        if os.environ.get(TRACEBACK, "0") != "0":
            traceback.print_exc()
        _print_error(message)
        sys.exit(REFUSED)
    sys.exit(code)


def _exit_code(main: Callable[[list[str]], None]) -> int | str | None:
    try:
        main(sys.argv[1:])
    except SystemExit as error:
        return error.code
    return 0


def _message(error: Exception, extra: str | None) -> str | None:
    """The line of an error that the user or the machine caused; None for any other."""
    if isinstance(error, SettingsError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing_extra(error, extra)
    from refreshkv.machine import machine_problem  # imports torch, which help and wrong options do without

    return machine_problem(error)


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """Prints the error of a thread: one line for one that the machine has caused, such as a full disk."""
    from refreshkv.machine import machine_problem  # as above

    problem = None if failed.exc_value is None else machine_problem(failed.exc_value)
    if problem is None:
        threading.__excepthook__(failed)
    else:
        print(f"warning: {problem}", file=sys.stderr, flush=True)


def _missing_extra(error: ModuleNotFoundError, extra: str | None) -> str | None:
    missing = (error.name or "").partition(".")[0]
    brought = next((name for name, modules in EXTRAS.items() if missing in modules), None)
    if brought is None:
        return None
    if brought in ("train", "eval"):
        brought = extra or brought
    return f"{missing} is not installed: pip install 'refreshkv[{brought}]'"


def _prepare_streams() -> None:
    """Makes the standard streams safe to use: open, and able to write every character."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get the number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _standard_output_fails(error: Exception) -> bool:
    """Whether `error` comes from writing to standard output; if so, what is buffered there is thrown away.

    Only an `OSError` without a file's name can come from there. The function then writes a line break: if that fails
    too, standard output is at fault. It writes none to a terminal or a pipe, where a reader would see it.
    """
    if not isinstance(error, OSError) or error.filename is not None or sys.stdout is None:
        return False
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # a stream in memory
        return False
    try:
        _flush()
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor):
            return False
        os.write(descriptor, b"\n")
        return False
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        return True


def _end_with_parent() -> None:
    """Lets the kernel kill this process when the one that started it ends, if that one has asked so (`PARENT`).

    A killed experiment would otherwise leave runs behind that write into the folders of its next call. Linux only.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def _print_error(message: str) -> None:
    if _is_first_rank():
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _is_first_rank() -> bool:
    """Whether this process is rank 0 of its job, or no launcher says rightly which it is."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "")
    return not (rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world))
