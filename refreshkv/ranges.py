"""Ranges of numbers, and the one line for a number outside its own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refreshkv.errors import SettingsError

LARGEST_INTEGER = 2**63 - 1
"""Largest whole number that any setting may have: what libraries count in."""
LARGEST_COUNT = 2**31 - 1
"""Largest count of tokens or steps: kernels count in 32 bits."""
LARGEST_SEED = 2**32 - 1
"""Largest seed: NumPy takes no larger one."""
SHOWN_CHARACTERS = 60
"""Characters of a value that an error shows."""


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`. Infinity and NaN are in no range."""

    least: float
    most: float = LARGEST_COUNT
    above: bool = False
    """Whether `least` itself is outside."""
    below: bool = False
    """Whether `most` itself is outside."""
    hint: str = ""
    """What errors say at their end."""

    def problem(self, value: float) -> str | None:
        """What a number must be that `value` is not; None if the range has it."""
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if value < self.least or (self.above and value == self.least):
            return f"must be {'more than' if self.above else 'at least'} {self.least}"
        if value > self.most or (self.below and value == self.most):
            return f"must be {'less than' if self.below else 'at most'} {self.most}"
        return None


SEED = Range(0, LARGEST_SEED)
COUNT = Range(1)
COUNT_OR_NONE = Range(0)
SECONDS = Range(0, 10**7, above=True)
"""A time: up to four months, which every clock and library can hold."""
GIGABYTES = Range(0, 10**6, above=True)


def validate_numbers(values: Any, ranges: Mapping[str, Range], prefix: str = "") -> None:
    """Raises `SettingsError` for the first attribute of `values` that lies outside its range; None is in every range.

    An attribute may be a number or a list of numbers. prefix: what errors put before the name, such as "training.";
    with "--" names are written as options.
    """
    for name, wanted in ranges.items():
        value = getattr(values, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (problem := wanted.problem(number)):
                shown = name.replace("_", "-") if prefix == "--" else name
                hint = f"; {wanted.hint}" if wanted.hint else ""
                raise SettingsError(f"{prefix}{shown} {problem}, got {show(value)}{hint}")


def show(value: Any) -> str:
    """A value as an error shows it: its beginning, if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
