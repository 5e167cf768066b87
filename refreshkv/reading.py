"""Reads the files that a user names: text of a sensible size, UTF-8, whose content has the expected form.

Everything else raises `SettingsError`, one line that names the setting and the file: a folder, a device, a pipe that
nothing writes to, a loop of links, another encoding, a file larger than memory.
"""

import codecs
import errno
import glob
import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from refreshkv.errors import SettingsError

LARGEST_TEXT = 64 << 20
"""Bytes of the largest text that is read: some ten million tokens."""
LARGEST_SETTINGS = 16 << 20
"""Bytes of the largest file of settings."""
LARGEST_REPORT = 1 << 30
"""Bytes of the largest file of results."""
SECONDS_FOR_A_WRITER = 5.0
"""How long a named pipe may have no writer."""
MOST_NODES = 1_000_000
"""Values of a YAML file, those behind aliases counted each time that they are named."""


def read_text(path: str | Path, setting: str, largest: int = LARGEST_TEXT) -> str:
    """The text of a UTF-8 file, or of what is written into a pipe such as `<(command)`.

    Raises `SettingsError` that names `setting` and the file if it is missing, no file, larger than `largest` bytes, or
    not UTF-8.
    """
    return _decoded(read_bytes(path, setting, largest), str(path), setting)


def read_bytes(path: str | Path, setting: str, largest: int = LARGEST_TEXT) -> bytes:
    """The content of a file or pipe; errors as in `read_text`."""
    try:
        # without O_NONBLOCK a pipe that no process writes to would be waited for, without end
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{setting}: {unreadable(path, error)}") from None
    mode = os.fstat(number).st_mode
    if stat.S_ISDIR(mode):
        os.close(number)
        raise SettingsError(f"{setting}: {path} is a folder, not a file")
    with open(number, "rb", buffering=0) as file:
        if stat.S_ISFIFO(mode):
            return _limited(file, str(path), setting, largest, _first_written(number, path, setting))
        if not stat.S_ISREG(mode):
            raise SettingsError(f"{setting}: {path} is a device, not a file")
        return _limited(file, str(path), setting, largest)


def refuse_special_files(path: str | Path, setting: str) -> None:
    """Raises `SettingsError` if a file, or one below a folder, is a pipe or a device: libraries would wait for it.

    What cannot be looked at passes: reading it says why. Hidden folders inside pass too, for libraries do not read
    them: .git may be large, and programs keep sockets in such folders.
    """
    files = []
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names]
    for file in files or [str(path)]:
        try:
            mode = os.stat(file).st_mode
        except (OSError, ValueError):
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise SettingsError(f"{setting}: {file} is a pipe, a socket or a device, not a file")


def refuse_special_sources(sources: Any, setting: str) -> None:
    """`refuse_special_files` for the local files among what `datasets` reads: paths with or without *, addresses, lists
    and dictionaries of them."""
    if isinstance(sources, dict):
        sources = list(sources.values())
    if isinstance(sources, (list, tuple)):
        for source in sources:
            refuse_special_sources(source, setting)
    elif isinstance(sources, str) and "://" not in sources and "\0" not in sources:
        for file in glob.glob(os.path.expanduser(sources), recursive=True):
            refuse_special_files(file, setting)


def read_standard_input(setting: str, largest: int = LARGEST_TEXT) -> str:
    """The UTF-8 text on standard input, whatever the locale; errors as in `read_text`."""
    if sys.stdin is None:
        raise SettingsError(f"{setting}: standard input is closed")
    source = getattr(sys.stdin, "buffer", None)
    if source is None:
        return sys.stdin.read()  # a text that stands in for it
    return _decoded(_limited(source, "standard input", setting, largest), "standard input", setting)


def read_json(path: str | Path, setting: str, largest: int = LARGEST_REPORT) -> Any:
    """The value of a JSON file; `SettingsError` that names `setting` and the file if it cannot be read."""
    text = read_text(path, setting, largest)
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{setting}: {path} is not readable JSON: {_one_line(error)}") from None


def read_own_json(path: str | Path, setting: str) -> Any:
    """`read_json` of a file that we have written: a pipe in its place is refused, where `read_json` would wait for a
    writer."""
    refuse_special_files(path, setting)
    return read_json(path, setting)


def read_yaml_value(path: str | Path, setting: str) -> Any:
    """The value of a YAML file, None for an empty one; `SettingsError` as in `parse_yaml` and `read_text`."""
    text = read_text(path, setting, LARGEST_SETTINGS)
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{setting}: {path} is not readable YAML: {_one_line(error)}") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `yaml.YAMLError` also for a key that comes twice, a value that holds itself, and
    aliases that stand for millions of values."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a date such as 2020-13-45
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """Reads YAML without what would be silently lost or never end."""

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None:
            _count_values(node, {}, set())
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        own: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key must be text", key.start_mark)
            if (key.tag, key.value) in own:
                problem = f"the key {key.value} comes twice"
                raise ConstructorError(None, None, problem, key.start_mark)
            own.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counted: dict[int, int], above: set[int]) -> int:
    """Values in a tree of nodes whose parts may be the same node. above: nodes that hold this one."""
    if id(node) in above:
        raise ComposerError(None, None, "a value holds itself", node.start_mark)
    if id(node) not in counted:
        parts: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        inside = above | {id(node)} if parts else above
        children = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        counted[id(node)] = 1 + sum(_count_values(child, counted, inside) for child in children)
    if counted[id(node)] > MOST_NODES:
        raise ComposerError(None, None, "its aliases stand for millions of values", node.start_mark)
    return counted[id(node)]


def unreadable(path: str | Path, error: Exception) -> str:
    """Why a file cannot be opened, in words that name it."""
    if isinstance(error, FileNotFoundError):
        target = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
        return f"there is no file {path}{target}"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return f"{path} cannot be read: its links lead back to themselves"
    return f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"


def _first_written(number: int, path: str | Path, setting: str) -> bytes:
    """The beginning of what a process writes into the pipe; b"" if one is about to, for which later reads wait."""
    end = time.monotonic() + SECONDS_FOR_A_WRITER
    while True:
        try:
            block = os.read(number, 1 << 16)
        except BlockingIOError:  # a writer that has written nothing yet
            block = None
        if block != b"":
            os.set_blocking(number, True)
            return block or b""
        if time.monotonic() > end:
            raise SettingsError(f"{setting}: {path} is a pipe that no process writes to: start its writer first")
        time.sleep(0.05)


def _limited(file: Any, name: str, setting: str, largest: int, begun: bytes = b"") -> bytes:
    content = bytearray(begun)
    try:
        while block := file.read(min(1 << 20, largest + 1 - len(content))):
            content += block
            if len(content) > largest:
                raise SettingsError(f"{setting}: {name} is larger than {largest / 2**20:,.0f} MB: take a part of it")
    except OSError as error:
        raise SettingsError(f"{setting}: {name} cannot be read: {error.strerror or error}") from None
    return bytes(content)


def _decoded(content: bytes, name: str, setting: str) -> str:
    try:
        return codecs.utf_8_decode(content, "strict", True)[0]
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{setting}: {name} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}): convert it, "
            "for example with iconv -t utf-8"
        ) from None


def _one_line(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
