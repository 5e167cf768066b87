"""Recognises errors that the machine causes and no line of the program: full disks, missing rights, too little memory.

Python raises `OSError` for them, but libraries in Rust and C++ raise types of their own, whose text alone tells.
"""

import errno
import os
import re

import torch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CAUSES = {
    **dict.fromkeys(FULL, "the disk is full, or a file may not become so large"),
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user has no right to",
    errno.EPERM: "this user has no right to",
    errno.ELOOP: "links lead back to themselves",
    errno.ENOTDIR: "a file is where a folder must be",
    errno.EISDIR: "a folder is where a file must be",
    errno.ENAMETOOLONG: "a name is too long",
    errno.EIO: "the disk cannot be read or written",
    errno.ESTALE: "the file system has gone",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open",
    errno.ENXIO: "a pipe has no reader, or a device is not there",
    errno.EAGAIN: "the machine has no room for another process or thread (ulimit -u)",
}
"""Number of an `OSError` -> what is the matter. Others, such as a missing file, may be our own mistakes."""
NUMBERED = re.compile(r"(?:os error |\[errno )(\d+)", re.IGNORECASE)
"""How libraries in Rust (`os error 28`) and pyarrow (`[errno 28]`) write the number."""
WRITTEN_OUT = {
    "no space left on device": errno.ENOSPC,
    "file too large": errno.EFBIG,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
    "file write failed": errno.ENOSPC,  # torch's archives
    "unexpected pos": errno.ENOSPC,  # likewise: less was written than asked for
}
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "memory allocation of", "malloc of size")


def machine_problem(error: BaseException) -> str | None:
    """One line for an error that the machine has caused, with the way out; None for any other error."""
    for cause in _chain(error):
        problem = _disk_problem(cause) or _memory_problem(cause)
        if problem:
            return problem
    return None


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk had no room for what was to be written."""
    return any(_number(cause) in FULL for cause in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """The error, and those that it came from."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if not isinstance(error, Exception):
        return None
    text = str(error).lower()
    if match := NUMBERED.search(text):
        return int(match[1])
    return next((number for words, number in WRITTEN_OUT.items() if words in text), None)


def _disk_problem(error: BaseException) -> str | None:
    number = _number(error)
    if number not in CAUSES:
        return None
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    file = f"{name}: " if name else ""
    way_out = "free space, or choose another folder" if number in FULL else "choose another folder or file"
    reason = os.strerror(number)
    cause = CAUSES[number] if CAUSES[number].lower() not in reason.lower() else "it cannot be used"
    return f"{file}{cause} ({reason}): {way_out}"


def _memory_problem(error: BaseException) -> str | None:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"not enough GPU memory: a smaller model, batch or length needs less ({text[:120]})"
    known = isinstance(error, RuntimeError) and any(words in text.lower() for words in NO_MEMORY)
    if isinstance(error, MemoryError) or known:
        return f"not enough memory: a smaller model, batch or length needs less ({text[:200] or 'MemoryError'})"
    return None
