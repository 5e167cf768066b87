"""A family of tasks: the settings that all families share, and what each of them implements."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from refreshkv.data.tasks.template import Template
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class Problem:
    """One problem, before it is put into words."""

    fields: dict[str, str]
    """The values of the template's placeholders."""
    answer: str
    """The right continuation of the prompt, with its leading space or line break."""
    references: Any
    """What `Family.score` compares a prediction with: JSON values."""
    examples: tuple["Problem", ...] = ()
    """Solved problems in the prompt before this one."""


@dataclass(frozen=True)
class Family(ABC):
    """The settings that all tasks share; subclasses implement `draw` and `score`.

    A problem's size is in the family's own unit, the one that makes its prompts longer: keys, sentences, documents.
    """

    length: int = 4096
    """Tokens of a prompt and its answer together. The prompt gets `length - max_new_tokens` of them."""
    max_new_tokens: int = 128
    """Tokens that may be generated."""
    seed: int = 42
    """Seed of the problems."""
    template_file: str | None = None
    """YAML file with another wording: its template parts replace the task's own."""
    chat: bool = False
    """Put the question into the tokenizer's chat template, as one user message."""

    template: ClassVar[Template]
    """The wording: `prompt`, `answer_prefix`, and parts of the family's own."""
    least_size: ClassVar[int] = 1
    """The smallest size of a problem."""
    answer_fits: ClassVar[bool] = True
    """Whether an answer of more than max_new_tokens tokens is an error, because it could not be generated."""
    shortest_prompt: ClassVar[int] = 0
    """Problems whose prompt has fewer tokens are left out; families that read files have it as a setting."""
    redraws: ClassVar[bool] = False
    """Whether problems are drawn until an answer fits, because the answers' lengths differ much."""

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be a whole number >= {least}, got {getattr(self, name)}")
        if self.max_new_tokens >= self.length:
            raise SettingsError(
                f"length={self.length} is prompt and answer together, and max_new_tokens={self.max_new_tokens} leaves "
                "no prompt: raise length"
            )

    @property
    def wording(self) -> Template:
        """The template, before `template_file` replaces parts of it."""
        return self.template

    @abstractmethod
    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        """A problem of `size` units from the random generator alone, or, in families that read a file, its problem
        `index`."""

    @abstractmethod
    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """Scores between 0 and 1 by name. The first is called "score" and is the task's result."""

    def largest_size(self, index: int) -> int | None:
        """The largest size of problem `index`; None if there is no limit."""
        return None

    @property
    def substitutes(self) -> tuple[str, ...]:
        """For each part of the benchmark that is replaced by generated text a phrase such as "sentences for essays"."""
        return ()
