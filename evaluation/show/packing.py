"""Packs a recording into a text of base64, and reads it back. `page.js` reads the same bytes.

All numbers are whole, in groups of seven bits, the lowest first, with the eighth bit set in all bytes but the last:

    number of refreshed layers, and for each: its number, its heads, its choices, and for each choice
        its position less the one before, 1 for a full step or 0, and for each head
            how many positions are kept that were not before, or the other way round, and these in ascending order,
                each less the one before
            how many positions dropped out before the next choice, and these
"""

import base64
from collections.abc import Iterator

from refreshkv.evaluation.show.recording import Choice, Recording


def packed(recording: Recording) -> str:
    """The choices of a recording as a text."""
    content = bytearray()
    _write(content, len(recording.choices))
    for layer, made in recording.choices.items():
        heads = len(made[0].kept)
        for number in (layer, heads, len(made)):
            _write(content, number)
        before: list[set[int]] = [set() for _ in range(heads)]
        position = 0
        for choice in made:
            _write(content, choice.position - position)
            _write(content, int(choice.is_full))
            position = choice.position
            for head, kept in enumerate(choice.kept):
                _write_ascending(content, sorted(before[head].symmetric_difference(kept)))
                _write(content, len(choice.dropped[head]))
                for gone in choice.dropped[head]:
                    _write(content, gone)
                before[head] = set(kept)
    return base64.b64encode(content).decode()


def unpacked(text: str) -> dict[int, list[Choice]]:
    """The choices of each layer, from what `packed` returned."""
    numbers = _numbers(base64.b64decode(text))
    choices: dict[int, list[Choice]] = {}
    for _ in range(next(numbers)):
        layer, heads, count = next(numbers), next(numbers), next(numbers)
        before: list[set[int]] = [set() for _ in range(heads)]
        made, position = choices.setdefault(layer, []), 0
        for _ in range(count):
            position += next(numbers)
            choice = Choice(position, bool(next(numbers)), [], [])
            for head in range(heads):
                before[head] ^= set(_read_ascending(numbers))
                choice.kept.append(sorted(before[head]))
                choice.dropped.append([next(numbers) for _ in range(next(numbers))])
            made.append(choice)
    return choices


def _write(content: bytearray, number: int) -> None:
    while number > 127:
        content.append(number & 127 | 128)
        number >>= 7
    content.append(number)


def _write_ascending(content: bytearray, numbers: list[int]) -> None:
    _write(content, len(numbers))
    for number, before in zip(numbers, [0, *numbers], strict=False):
        _write(content, number - before)


def _read_ascending(numbers: Iterator[int]) -> Iterator[int]:
    number = 0
    for _ in range(next(numbers)):
        number += next(numbers)
        yield number


def _numbers(content: bytes) -> Iterator[int]:
    number, shift = 0, 0
    for byte in content:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield number
            number, shift = 0, 0
