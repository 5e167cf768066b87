"""A family of tasks: the settings that all families share, and what each of them implements."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from refreshkv.data.tasks.template import Template
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class Problem:
    """One problem, not yet worded."""

    fields: dict[str, str]
    """The values of the template's placeholders."""
    answer: str
    """The right continuation of the prompt, with the space or line break it begins with."""
    references: Any
    """What the family's scorer compares with: plain values."""
    examples: tuple["Problem", ...] = ()
    """Solved problems that stand before this one in the prompt."""


@dataclass(frozen=True)
class Family(ABC):
    """The settings that all tasks share, and what a family of tasks has to bring. Sizes are in its own units: keys,
    sentences, rows, whatever makes its prompts longer."""

    length: int = 4096
    """Tokens of a prompt and its answer together: the prompt gets `length - max_new_tokens`."""
    max_new_tokens: int = 128
    """Tokens that may be generated."""
    seed: int = 42
    """Seed of the problems."""
    template_file: str | None = None
    """YAML file with another wording: the pieces it names replace the task's own."""
    chat: bool = False
    """Wrap the prompt in the tokenizer's chat template, as one user message."""

    template: ClassVar[Template]
    """The wording: `prompt`, `answer_prefix`, and pieces of the family's own."""
    least_size: ClassVar[int] = 1
    answer_fits: ClassVar[bool] = True
    """Whether an answer that max_new_tokens cannot hold is an error: it could not be generated."""
    redraws: ClassVar[bool] = False
    """Whether problems differ so much in the length of their answers that they are drawn until one fits."""

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be a whole number >= {least}, got {getattr(self, name)}")
        if self.max_new_tokens >= self.length:
            raise SettingsError(
                f"length={self.length} is prompt and answer together, and max_new_tokens={self.max_new_tokens} leaves "
                "no prompt: raise length"
            )

    @abstractmethod
    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        """A problem of `size` units. `index` numbers the problems, for families that read them from a file."""

    @abstractmethod
    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """Figures between 0 and 1 by name; the first is called score and is the task's own."""

    def largest_size(self, index: int) -> int | None:
        """The most units there are; None for no end."""
        return None

    @property
    def substitutes(self) -> tuple[str, ...]:
        """What stands in for something that the benchmark reads from files, one phrase each."""
        return ()
