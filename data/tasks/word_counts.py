"""The most frequent words: common and frequent words extraction, two of RULER's thirteen (arXiv 2404.06654)."""

import string
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, ClassVar, Literal

from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.scoring import match_all
from refreshkv.data.tasks.template import Template
from refreshkv.data.tasks.words import coined_words, wonderwords_vocabulary
from refreshkv.settings import SettingsError

SHORT = 4096
"""RULER repeats words less often in prompts shorter than this many tokens."""


@dataclass(frozen=True)
class CommonWords(Family):
    """A numbered list in which a few words are frequent and all others rare. Size: different words in it."""

    max_new_tokens: int = 120
    """Tokens that may be generated."""
    common: int = 10
    """Frequent words: the answer."""
    common_repeats: int | None = None
    """Repetitions of each; None for RULER's: 30, and 6 if `length` is below 4096."""
    uncommon_repeats: int | None = None
    """Repetitions of the others; None for RULER's: 3, and 1 if `length` is below 4096."""
    examples: int = 1
    """Solved examples in the prompt: RULER has one."""
    words: Literal["own", "wonderwords"] = "own"
    """The vocabulary: words that this package coins, or the library that RULER uses."""

    template: ClassVar[Template] = {
        "prompt": (
            "Some words in this numbered list come far more often than the others.\n\n{context}\n\nWhich {count} words "
            "come most often in the list?\n"
        ),
        "answer_prefix": "The {count} words that come most often:",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        often, seldom = self.repeats
        if self.common < 1 or self.examples < 0 or not often > seldom >= 1:
            raise SettingsError(
                f"common must be at least 1, examples at least 0 and common_repeats above uncommon_repeats, got "
                f"{self.common}, {self.examples}, {often} and {seldom}"
            )

    @property
    def repeats(self) -> tuple[int, int]:
        """Repetitions of each common word and of each other word."""
        often, seldom = (30, 3) if self.length >= SHORT else (6, 1)
        return self.common_repeats or often, self.uncommon_repeats or seldom

    @property
    def least_size(self) -> int:
        return self.common + 1

    def largest_size(self, index: int) -> int | None:
        return len(_vocabulary()) if self.words == "wonderwords" else None

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        words, often, seldom = (40, 10, 3) if self.length >= SHORT else (20, 3, 1)
        words = max(words, self.common + 1)
        examples = tuple(self._problem(random, words, often, seldom) for _ in range(self.examples))
        problem = self._problem(random, size, *self.repeats)
        return Problem(problem.fields, problem.answer, problem.references, examples)

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """Share of the common words in the prediction: RULER's string match."""
        return {"score": match_all(prediction, references)}

    def _problem(self, random: Random, size: int, often: int, seldom: int) -> Problem:
        words = coined_words(random, size) if self.words == "own" else random.sample(_vocabulary(), size)
        common = words[: self.common]
        listed = common * often + words[self.common :] * seldom
        random.shuffle(listed)
        return Problem(
            fields={"context": _numbered(listed), "count": str(self.common)},
            answer=" " + _numbered(common),
            references=common,
        )


@dataclass(frozen=True)
class FrequentWords(Family):
    """Made-up words whose frequencies follow a Zeta distribution. Size: words before rounding, the dots included."""

    max_new_tokens: int = 50
    """Tokens that may be generated."""
    alpha: float = 2.0
    """Exponent: the word of rank r is r^-alpha times as frequent as the first."""
    vocabulary: int | None = None
    """Different words, the dots among them; None for RULER's: a fiftieth of `length`."""
    letters: int = 6
    """Letters of a word."""

    template: ClassVar[Template] = {
        "prompt": (
            "The text below is in code. Count how often each code word comes, and leave the dots out.\n\n{context}\n\n"
            "Which three code words come most often?\n"
        ),
        "answer_prefix": "The three code words that come most often:",
    }
    least_size: ClassVar[int] = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 1 or self.letters < 2 or self.different < 5:
            raise SettingsError(
                f"alpha must be above 1, letters at least 2 and vocabulary at least 5, got {self.alpha}, "
                f"{self.letters} and {self.different}"
            )
        counts = self.counts(self.least_size)
        if counts[3] <= counts[4]:
            raise SettingsError(f"alpha={self.alpha}: the fourth and the fifth word come equally often; use about 2")

    @property
    def different(self) -> int:
        """Different words, the dots among them."""
        return self.vocabulary or max(5, self.length // 50)

    def counts(self, size: int) -> list[int]:
        """Repetitions of the word of each rank, rounded down."""
        total = _zeta(self.alpha)
        return [int(size * rank**-self.alpha / total) for rank in range(1, self.different + 1)]

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        numbers = random.sample(range(26**self.letters), self.different)
        words = ["".join(string.ascii_lowercase[n // 26**i % 26] for i in range(self.letters)) for n in numbers]
        words[0] = "..."  # RULER replaces the first rank by noise
        text = [word for word, count in zip(words, self.counts(size), strict=True) for _ in range(count)]
        random.shuffle(text)
        return Problem(fields={"context": " ".join(text)}, answer=" " + ", ".join(words[1:4]), references=words[1:4])

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """Share of the three words in the prediction: RULER's string match."""
        return {"score": match_all(prediction, references)}


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


@lru_cache(maxsize=1)
def _vocabulary() -> list[str]:
    return wonderwords_vocabulary()


@lru_cache(maxsize=8)
def _zeta(alpha: float) -> float:
    """Riemann's zeta function: a sum of the first terms, and the integral of the rest."""
    terms = 10_000
    return sum(rank**-alpha for rank in range(1, terms)) + (terms - 0.5) ** (1 - alpha) / (alpha - 1)
