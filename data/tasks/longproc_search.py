"""The search that LongProc's countdown prompts show and its scores compare (Ye et al., arXiv 2501.05414).

The order of the search is that of `refreshkv.data.tasks.countdown`; the lines are worded as LongProc's files word them,
so that its problems can be read and scored.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

from refreshkv.data.tasks.countdown import LARGEST, OPERATIONS

SEARCH_HEADING = "# Search Procedure"


@lru_cache(maxsize=1024)
def written_search(numbers: tuple[int, ...], target: int) -> tuple[tuple[str, ...], str]:
    """The lines of the search, and the whole answer: heading, lines, and the solution's equations between tags.

    Raises `ValueError` if the target cannot be reached.
    """
    left = list(numbers)
    lines = [f"Initial number set: {left}, target: {target}. {_options(left)}"]
    equations = _search(left, target, 0, lines)
    if equations is None:
        raise ValueError(f"no way from {left} to {target}")
    solution = "\n".join(equations)
    answer = (
        f"{SEARCH_HEADING}\n" + "\n".join(lines) + "\n\nNow we have found the target, let's trace back the solution:\n"
        f"Final step: {equations[2]}\nThe step before: {equations[1]}\nThe first step: {equations[0]}\n\n"
        f"Output the solution in the required format:\n<Solution>\n{solution}\n</Solution>\n"
    )
    return tuple(lines), answer


def leading_actions(found: Sequence[str], expected: Sequence[str]) -> int:
    """Number of leading lines of `found` that take the actions of `expected`, by LongProc's rule.

    A line that tries an operation agrees if its text before the equals sign is the same and both lines drop the result
    or neither does; every other line must be equal.
    """
    count = 0
    for line, wanted in zip(found, expected, strict=False):
        if line != wanted and not ("|- Try" in wanted and _same_action(line, wanted)):
            break
        count += 1
    return count


def _same_action(line: str, wanted: str) -> bool:
    dropped = "drop this branch"
    return line.split("=")[0] == wanted.split("=")[0] and (dropped in line) == (dropped in wanted)


def _search(numbers: list[int], target: int, depth: int, lines: list[str]) -> list[str] | None:
    """The equations from the numbers to the target, None if there are none; appends the search's lines to `lines`."""
    several = len(numbers) > 2
    for i, j in combinations(range(len(numbers)), 2):
        first, second = numbers[i], numbers[j]
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        if several:
            pair = f"Pick two numbers ({first}, {second}) (numbers left: {rest}). Try possible operations."
            lines.append(_indent(depth + 1) + pair)
        a, b = max(first, second), min(first, second)
        for sign in OPERATIONS:
            equations = _try(a, sign, b, rest, target, depth + 1 + several, lines)
            if equations is not None:
                return equations
    return None


def _try(a: int, sign: str, b: int, rest: list[int], target: int, depth: int, lines: list[str]) -> list[str] | None:
    """The equations that begin with `a sign b`, None if they do not reach the target."""
    result = OPERATIONS[sign](a, b)
    if result is None:
        lines.append(f"{_indent(depth)}Try {a} {sign} {b} (invalid operation). drop this branch.")
        return None
    shown = f"{a / b:.1f}" if result != int(result) else str(int(result))
    equation = f"{a} {sign} {b} = {shown}"
    line = f"{_indent(depth)}Try {equation}. "
    if result != int(result):
        lines.append(f"{line}{shown} is a decimal, drop this branch.")
    elif result >= LARGEST:
        lines.append(f"{line}{shown} exceeds the maximum intermediate result, drop this branch.")
    elif not rest:
        found = result == target
        verdict = f"== {target}, target found!" if found else f"!= {target}, drop this branch."
        lines.append(f"{line}Evaluate {shown} {verdict}")
        return [equation] if found else None
    else:
        numbers = [int(result), *rest]
        left = ", just two numbers left." if len(numbers) == 2 else f". {_options(numbers)}"
        lines.append(f"{line}Add {shown} to the number set. Current number set: {numbers}, target: {target}{left}")
        others = _search(numbers, target, depth, lines)
        return None if others is None else [equation, *others]
    return None


def _options(numbers: list[int]) -> str:
    return f"Options for choosing two numbers: {list(combinations(numbers, 2))}."


def _indent(depth: int) -> str:
    return " " * depth + "|- "
