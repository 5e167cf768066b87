"""Needles in a haystack: eight of RULER's thirteen tasks (Hsieh et al., COLM 2024, arXiv 2404.06654).

A needle states the value of a key; the question asks for the values of some keys. RULER takes its keys from the
library wonderwords and its haystacks from essays by Paul Graham.
"""

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal
from uuid import UUID

from refreshkv.data.tasks.essays import essay_sentences, generated_sentences
from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.scoring import match_all
from refreshkv.data.tasks.template import Template
from refreshkv.data.tasks.words import word_pairs
from refreshkv.settings import SettingsError

Kind = Literal["words", "numbers", "uuids"]
DEPTHS = 40
"""Evenly spaced positions in an essay, from the first to the last sentence, at which a needle can be."""


@dataclass(frozen=True)
class Needles(Family):
    """Size: lines of noise, sentences of the essay, or needles that are not asked for."""

    haystack: Literal["noise", "essay", "needles"] = "noise"
    """What surrounds the needles: one repeated line, running text, or other needles."""
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = 1
    """Keys that have needles, asked for or not."""
    values: int = 1
    """Values of each key, with a needle for each."""
    queries: int = 1
    """Keys that are asked for."""
    words: Literal["own", "wonderwords"] = "own"
    """The vocabulary of keys: this package's, or the library that RULER uses."""
    data_files: str | list[str] | None = None
    """Essays for the haystack (text, JSON or parquet files), such as RULER's PaulGrahamEssays.json."""
    text_column: str = "text"
    """The column of the essays' text."""

    template: ClassVar[Template] = {
        "needle": "The secret {kind} of {key} is {value}.",
        "noise": "Rain falls on the hill. A cart goes by. The lamp is lit. Someone hums. Then all is quiet.",
        "prompt": (
            "The text below hides some secret {kind}s, each said to belong to a name. Remember them: you will be asked "
            "for some of them.\n\n{context}\n\nWhich secret {kind}s of {query} does the text give?\n"
        ),
        "answer_prefix": "The text gives these secret {kind}s of {query}:",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keys", "values", "queries"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be a whole number >= 1, got {getattr(self, name)}")
        if self.haystack == "essay" and max(self.keys, self.queries) * self.values > DEPTHS:
            raise SettingsError(f"an essay has {DEPTHS} places for needles: lower keys, values or queries")
        if self.haystack != "essay" and self.data_files is not None:
            raise SettingsError(f"data_files means nothing for haystack={self.haystack}: leave it out")

    @property
    def substitutes(self) -> tuple[str, ...]:
        return ("generated sentences for essays",) if self.haystack == "essay" and self.data_files is None else ()

    @property
    def least_size(self) -> int:
        """One line for each needle, because RULER draws their positions without repetition."""
        return max(self.keys, self.queries) * self.values

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        count = max(self.keys, self.queries)
        others = size if self.haystack == "needles" else 0
        keys = self._distinct(random, self.key_kind, count + others)
        values = self._distinct(random, self.value_kind, count * self.values + others)
        owned = [values[i * self.values : (i + 1) * self.values] for i in range(count)]
        needles = [self._needle(template, keys[i], value) for i in range(count) for value in owned[i]]
        random.shuffle(needles)
        asked = random.sample(range(count), self.queries)
        answers = [value for i in asked for value in owned[i]]
        lines = self._haystack(random, size, template, keys[count:], values[count * self.values :])
        return Problem(
            fields={
                "kind": self.value_kind.removesuffix("s"),
                "context": self._hide(random, needles, lines),
                "query": _listed([keys[i] for i in asked]),
            },
            answer=" " + ", ".join(answers),
            references=answers,
        )

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """Share of the values in the prediction: RULER's string match."""
        return {"score": match_all(prediction, references)}

    def _needle(self, template: Template, key: str, value: str) -> str:
        return template["needle"].format(kind=self.value_kind.removesuffix("s"), key=key, value=value)

    def _haystack(self, random: Random, size: int, template: Template, keys: list[str], values: list[str]) -> list[str]:
        if self.haystack == "noise":
            return [template["noise"]] * size
        if self.haystack == "needles":
            return [self._needle(template, key, value) for key, value in zip(keys, values, strict=True)]
        if self.data_files is None:
            return generated_sentences(random, size)
        return essay_sentences(random, self.data_files, self.text_column, size)

    def _hide(self, random: Random, needles: list[str], lines: list[str]) -> str:
        """The haystack with the needles: in essays each at one of 40 depths, else before random lines."""
        if self.haystack == "essay":
            depths = random.sample(range(DEPTHS), len(needles))
            positions = [depth * len(lines) // (DEPTHS - 1) for depth in depths]
        else:
            positions = random.sample(range(len(lines)), len(needles))
        lines = list(lines)
        for position, needle in sorted(zip(positions, needles, strict=True), reverse=True):
            lines.insert(position, needle)
        return (" " if self.haystack == "essay" else "\n").join(lines)

    def _distinct(self, random: Random, kind: Kind, count: int) -> list[str]:
        """`count` different keys or values."""
        if kind == "numbers":
            return [str(number) for number in random.sample(range(10**6, 10**7), count)]
        if kind == "uuids":
            return [str(UUID(int=random.getrandbits(128), version=4)) for _ in range(count)]
        first, second = word_pairs(self.words)
        if count > len(first) * len(second):
            raise SettingsError(
                f"length needs {count} keys of words, and there are {len(first) * len(second)}: lower it"
            )
        numbers = random.sample(range(len(first) * len(second)), count)
        return [f"{first[n // len(second)]}-{second[n % len(second)]}" for n in numbers]


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f", and {items[-1]}"
