"""Countdown: search how four numbers make a fifth, and write the search (LongProc, Ye et al., arXiv 2501.05414)."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from random import Random
from typing import Any, ClassVar

from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.scoring import between_tags, leading_matches
from refreshkv.data.tasks.template import Template
from refreshkv.settings import SettingsError

LARGEST = 2000
"""The search drops results of at least this."""
HEADING = "# Search"
FOUND = "Target reached."
EQUATION = re.compile(r"\s*(\d{1,9})\s*([-+*/])\s*(\d{1,9})\s*=\s*(\d{1,9})\s*")
SMALLEST_TARGET = 10
EXAMPLE_LINES = 60
"""Most lines of the search in a solved example."""
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: Fraction(a, b) if b else None,
}


@dataclass(frozen=True)
class Countdown(Family):
    """The answer is long, not the prompt: there is one size. Problems are drawn until the written search has between a
    quarter of max_new_tokens and all of it."""

    max_new_tokens: int = 1024
    """Tokens that may be generated."""
    largest_number: int = 50
    """The four numbers lie between 1 and this."""
    largest_target: int = 100
    """The target lies between 10 and this."""
    examples: int = 2
    """Solved examples in the prompt: LongProc has two."""

    template: ClassVar[Template] = {
        "prompt": (
            "Make {target} out of {numbers}, using each number exactly once and the operations + - * / between two "
            "at a time. Results must be whole numbers below 2000 and not negative.\nSearch in this order: for every "
            "pair, from left to right, try the larger number +, -, *, / the smaller one. Drop a result that is not "
            "allowed, go on with the result put before the numbers that are left otherwise, and go back when nothing "
            "remains to be tried. Write the search line by line below # Search. Then write the three equations of the "
            "solution, one on each line, between <Solution> and </Solution>.\n\n"
        ),
        "answer_prefix": "",
    }
    redraws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"largest_number": 2, "largest_target": SMALLEST_TARGET, "examples": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise SettingsError(f"{name} must be at least {number}, got {getattr(self, name)}")

    def largest_size(self, index: int) -> int | None:
        return 1

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        problem = _problem(random, self.largest_number, self.largest_target)
        examples = _examples(self.examples, self.largest_number, self.largest_target)
        return Problem(problem.fields, problem.answer, problem.references, examples)

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """As `search_scores`."""
        return search_scores(prediction, references, HEADING, leading_matches)


def search_scores(
    prediction: str, references: dict[str, Any], heading: str, leading: Callable[[list[str], list[str]], int]
) -> dict[str, float]:
    """score: LongProc's accuracy, 1 for three equations that use all numbers and end in the target, whatever the
    search. partial: 1 for those, else the share of leading right lines of the search below the last `heading`.

    references: `numbers`, `target`, and the lines of the `search`. leading: (found, expected) -> leading right lines.
    """
    solution = between_tags(prediction, "Solution")
    if solution is not None and is_solution(solution, references["numbers"], references["target"]):
        return {"score": 1.0, "partial": 1.0}
    if heading not in prediction:
        return {"score": 0.0, "partial": 0.0}
    lines = prediction.rpartition(heading)[2].strip().split("\n")
    return {"score": 0.0, "partial": leading(lines, references["search"]) / len(references["search"])}


def search(numbers: list[int], target: int) -> tuple[list[str], list[str]]:
    """LongProc's depth-first search up to the first solution: its lines, and the equations of the solution.

    Pairs are tried from left to right, the larger number first, with + - * / in this order. A result that is no whole
    number or at least 2000, and a division by zero, are dropped; any other result is put before the remaining numbers.
    Raises `ValueError` if there is no solution.
    """
    lines: list[str] = []
    equations = _search(numbers, target, 0, lines)
    if equations is None:
        raise ValueError(f"no way from {numbers} to {target}")
    return lines, equations


def is_solution(text: str, numbers: list[int], target: int) -> bool:
    """Whether the lines of `text` are right equations, one fewer than `numbers`, that use each number and each result
    once and end in the target."""
    left, lines = list(numbers), text.split("\n")
    if len(lines) != len(numbers) - 1:
        return False
    for line in lines:
        equation = EQUATION.fullmatch(line)
        if equation is None:
            return False
        a, b, result = (int(equation[group]) for group in (1, 3, 4))
        for number in (a, b):
            if number not in left:
                return False
            left.remove(number)
        if OPERATIONS[equation[2]](a, b) != result:
            return False
        left.append(result)
    return left == [target]


@lru_cache(maxsize=8)
def _examples(count: int, largest_number: int, largest_target: int) -> tuple[Problem, ...]:
    """`count` problems with a short search; all prompts have the same ones, as in LongProc."""
    random, found = Random("examples"), []
    while len(found) < count:
        problem = _problem(random, largest_number, largest_target)
        if len(problem.references["search"]) <= EXAMPLE_LINES:
            found.append(problem)
    return tuple(found)


def _problem(random: Random, largest_number: int, largest_target: int) -> Problem:
    """Four numbers and a target that can be reached from them."""
    while True:
        numbers = [random.randint(1, largest_number) for _ in range(4)]
        target = _reachable(random, numbers)
        if target is not None and SMALLEST_TARGET <= target <= largest_target:
            break
    lines, equations = search(numbers, target)
    return Problem(
        fields={"numbers": ", ".join(map(str, numbers)), "target": str(target)},
        answer="\n".join([HEADING, *lines, "<Solution>", *equations, "</Solution>"]),
        references={"numbers": numbers, "target": target, "search": lines},
    )


def _search(numbers: list[int], target: int, depth: int, lines: list[str]) -> list[str] | None:
    """Equations from the numbers to the target, None if there are none; appends the search's lines to `lines`."""
    for a, b, rest in _pairs(numbers):
        for operation, compute in OPERATIONS.items():
            result = compute(a, b)
            equation = f"{a} {operation} {b} = {result}"
            line = f"{'  ' * depth}{a} {operation} {b}"
            reason = _fault(result)
            if reason is not None:
                lines.append(f"{line}: {reason}, drop")
            elif not rest:
                lines.append(f"{line} = {result}: {FOUND if result == target else f'not {target}, drop'}")
                if result == target:
                    return [equation]
            else:
                left = [int(result), *rest]
                lines.append(f"{line} = {result}: left {', '.join(map(str, left))}")
                found = _search(left, target, depth + 1, lines)
                if found is not None:
                    return [equation, *found]
    return None


def _pairs(numbers: list[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Yields (larger, smaller, remaining numbers) of each pair, from left to right."""
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
            yield max(numbers[i], numbers[j]), min(numbers[i], numbers[j]), rest


def _fault(result: int | Fraction | None) -> str | None:
    """Why the search drops a result; None if it does not."""
    if result is None:
        return "division by zero"
    if isinstance(result, Fraction) and result.denominator != 1:
        return "not whole"
    return "too large" if result >= LARGEST else None


def _reachable(random: Random, numbers: list[int]) -> int | None:
    """A number reached by combining the numbers at random; None if a step is not allowed or gives 0."""
    left = list(numbers)
    while len(left) > 1:
        a, b, rest = random.choice(list(_pairs(left)))
        result = random.choice(list(OPERATIONS.values()))(a, b)
        if _fault(result) is not None:
            return None
        left = [int(result), *rest]
    return left[0] or None
