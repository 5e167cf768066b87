"""Variable tracking: one of RULER's thirteen tasks (arXiv 2404.06654).

A variable is given a number, a second one the first variable's value, and so on. The assignments are hidden in noise,
and the question asks for all variables that have the number.
"""

import string
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.scoring import match_all
from refreshkv.data.tasks.template import Template
from refreshkv.settings import SettingsError

EXAMPLE_NOISE = 10
"""Lines of noise in a solved example: the number that RULER's search for 500 tokens finds."""


@dataclass(frozen=True)
class VariableTracking(Family):
    """Size: lines of noise."""

    max_new_tokens: int = 30
    """Tokens that may be generated."""
    chains: int = 1
    """Chains of assignments. The question asks for the variables of the first."""
    hops: int = 4
    """Assignments of one variable to another in a chain of `hops + 1` variables."""
    examples: int = 1
    """Solved examples in the prompt: RULER has one."""

    template: ClassVar[Template] = {
        "noise": "Rain falls on the hill. A cart goes by. The lamp is lit. Someone hums. Then all is quiet.",
        "prompt": (
            "Some lines of the text below set a variable, to a number or to what another variable holds.\n\n{context}"
            "\n\nWhich variables hold {query} in the end?\n"
        ),
        "answer_prefix": "There are {count} variables that hold {query}:",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("chains", 1), ("hops", 1), ("examples", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be a whole number >= {least}, got {getattr(self, name)}")

    @property
    def least_size(self) -> int:
        """One line for each assignment of a chain, because RULER draws their positions without repetition."""
        return self.hops + 1

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        examples = tuple(
            self._problem(random, max(EXAMPLE_NOISE, self.hops + 1), 3, template) for _ in range(self.examples)
        )
        problem = self._problem(random, size, 5, template)
        return Problem(problem.fields, problem.answer, problem.references, examples)

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """Share of the chain's variables in the prediction: RULER's string match."""
        return {"score": match_all(prediction, references)}

    def _problem(self, random: Random, size: int, letters: int, template: Template) -> Problem:
        names = _names(random, self.chains * (self.hops + 1), letters)
        numbers = [str(number) for number in random.sample(range(10000, 100000), self.chains)]
        lines = [template["noise"]] * size
        for chain, number in enumerate(numbers):
            variables = names[chain * (self.hops + 1) : (chain + 1) * (self.hops + 1)]
            values = [number, *(f"VAR {name}" for name in variables)]
            positions = sorted(random.sample(range(len(lines)), len(variables)))
            for shift, (position, name, value) in enumerate(zip(positions, variables, values[:-1], strict=True)):
                lines.insert(position + shift, f"VAR {name} = {value}")
        answers = names[: self.hops + 1]
        return Problem(
            fields={"context": "\n".join(lines), "query": numbers[0], "count": str(len(answers))},
            answer=" " + ", ".join(answers),
            references=answers,
        )


def _names(random: Random, count: int, letters: int) -> list[str]:
    """`count` different names of `letters` capital letters."""
    numbers = random.sample(range(26**letters), count)
    return ["".join(string.ascii_uppercase[n // 26**i % 26] for i in range(letters)) for n in numbers]
