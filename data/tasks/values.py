"""Values of task files, checked: an answer that is empty is in every text, and a missing one becomes the word None."""

import os
from collections.abc import Iterator
from typing import Any

from refreshkv.settings import SettingsError

SHOWN = 40
"""Characters of a wrong value that errors show."""


class Value:
    """A value of a task file, and where it stands: file, record and column.

    Other kinds of value than the asked one raise `SettingsError`, one line that says where.
    """

    def __init__(self, value: Any, place: str) -> None:
        self._value, self._place = value, place

    def __getitem__(self, key: str) -> "Value":
        """The value under a key."""
        if not isinstance(self._value, dict):
            raise self._wrong("a section with keys")
        if key not in self._value:
            raise SettingsError(f"{self._place} lacks {key}")
        return Value(self._value[key], f"{self._place}.{key}")

    def has(self, key: str) -> bool:
        """Whether there is a value under a key, and it is neither null nor false."""
        return isinstance(self._value, dict) and bool(self._value.get(key))

    def each(self, may_be_empty: bool = False) -> Iterator["Value"]:
        """The items of a list."""
        if not isinstance(self._value, list) or not (self._value or may_be_empty):
            raise self._wrong("a list" if may_be_empty else "a list that is not empty")
        return (Value(item, f"{self._place}[{number}]") for number, item in enumerate(self._value))

    def pair(self) -> tuple["Value", "Value"]:
        """The two items of a list of two."""
        if not isinstance(self._value, list) or len(self._value) != 2:
            raise self._wrong("a list of two")
        first, second = self.each()
        return first, second

    def text(self) -> str:
        """A text, which may be empty."""
        if not isinstance(self._value, str):
            raise self._wrong("text")
        return self._value

    def filled(self) -> str:
        """A text with at least one letter."""
        if not isinstance(self._value, str) or not self._value.strip():
            raise self._wrong("text that is not empty")
        return self._value

    def texts(self) -> list[str]:
        """A text that is not empty, or a list of such texts."""
        return [self.filled()] if isinstance(self._value, str) else [item.filled() for item in self.each()]

    def _wrong(self, wanted: str) -> SettingsError:
        shown = " ".join(repr(self._value).split())
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        return SettingsError(f"{self._place} must be {wanted}, got {shown}")


def file_state(file: str) -> tuple[int, int] | None:
    """Size and time of a local file, so that what was read of it is not taken for a later content; None for others."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns
