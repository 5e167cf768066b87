"""What every command does around its own work: one-line errors, exit codes, and the name of a missing extra."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from refreshkv.settings import SettingsError

PARENT = "REFRESHKV_ENDS_WITH"
"""Environment variable with the process id of the process that a command must not outlive."""
PR_SET_PDEATHSIG = 1
"""Number of the operation in Linux's prctl."""

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("deepspeed", "accelerate", "tensorboard"),
    "eval": ("datasets", "matplotlib"),
    "tasks": ("rouge_score", "wonderwords", "zstandard", "inscriptis", "lxml"),
    "embeddings": ("sentence_transformers",),
    "gguf": ("gguf",),
    "gpu": ("triton", "liger_kernel", "pynvml"),
    "8bit": ("bitsandbytes",),
    "flash-attn": ("flash_attn",),
}
"""Extra of pyproject.toml -> the modules that it adds. `train` also brings what `eval` does."""


def run(main: Callable[[list[str]], None], extra: str | None = None) -> NoReturn:
    """Calls `main` with the command line's arguments and exits: 0, 2 after a `SettingsError`, 130 after Ctrl-C.

    A `SettingsError` is printed as one line on stderr, without a traceback; in a job of several processes only rank 0
    prints. A missing module of `EXTRAS` is such an error too, with the extra to install: `extra` if given.
    """
    _end_with_parent()
    try:
        main(sys.argv[1:])
    except SettingsError as error:
        _print_error(str(error))
        sys.exit(2)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        brought = next((name for name, modules in EXTRAS.items() if missing in modules), None)
        if brought is None:
            raise
        if brought in ("train", "eval"):
            brought = extra or brought
        _print_error(f"{missing} is not installed: pip install 'refreshkv[{brought}]'")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


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
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
