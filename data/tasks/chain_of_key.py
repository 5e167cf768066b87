"""Chain-of-key: follow keys through a long list (Xu et al., arXiv 2411.05787, appendix A.6).

A key is a few words. Its last word is the first word of exactly one other key, its successor. The answer names the
next T keys of the chain, so each of them has to be found somewhere else in the prompt.
"""

import re
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.scoring import leading_matches
from refreshkv.data.tasks.template import Template
from refreshkv.data.tasks.words import coined_words
from refreshkv.settings import SettingsError

KEY = re.compile(r"[a-z]+(?:-[a-z]+)+")


@dataclass(frozen=True)
class ChainOfKey(Family):
    """Size: keys in the prompt. They form one ring and are listed in random order."""

    max_new_tokens: int = 256
    """Tokens that may be generated."""
    keys: int = 10
    """T, the number of keys to generate."""
    words_per_key: int = 2
    """Words of a key, its first and last included."""
    syllables: int = 3
    """Syllables of a word. Longer words are easier: the first tokens of a key's last word tell which key comes next."""

    template: ClassVar[Template] = {
        "prompt": (
            "Here are keys, each made of words joined by hyphens. The key that comes after another is the one whose "
            "first word is the other's last word.\n\n{context}\n\nStart from the key {start} and write the {count} "
            "keys that come after it, in order.\n"
        ),
        "answer_prefix": "The keys after {start}:",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys < 1 or self.words_per_key < 2:
            raise SettingsError(
                f"keys must be at least 1 and words_per_key at least 2, got {self.keys} and {self.words_per_key}"
            )
        if not 2 <= self.syllables <= 8:
            raise SettingsError(f"syllables must be between 2 and 8, got {self.syllables}")

    @property
    def least_size(self) -> int:
        """T + 1: the answer never comes around to the start."""
        return self.keys + 1

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        words = coined_words(random, size * (self.words_per_key - 1), self.syllables)
        links, inner = words[:size], iter(words[size:])
        ring = [
            "-".join([links[i], *(next(inner) for _ in range(self.words_per_key - 2)), links[(i + 1) % size]])
            for i in range(size)
        ]
        start, chain = ring[0], ring[1 : self.keys + 1]
        listed = random.sample(ring, size)
        return Problem(
            fields={"context": "\n".join(listed), "start": start, "count": str(self.keys)},
            answer=" " + ", ".join(chain),
            references={"start": start, "chain": chain},
        )

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """The number of leading right keys over T. The prediction may begin with the start itself."""
        found, chain = KEY.findall(prediction), references["chain"]
        if found[:1] == [references["start"]]:
            found = found[1:]
        return {"score": leading_matches(found, chain) / len(chain)}
