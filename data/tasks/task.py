"""A task: words a family's problems, and fits each prompt to a number of tokens."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from refreshkv.chat_template import chat_text
from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.template import Template, load_template
from refreshkv.data.tokenizer import SpecialTokens
from refreshkv.settings import SettingsError, settings_to_dict

FULL_ENOUGH = 0.98
"""The search for a longer prompt ends at this share of the tokens available for it."""

FEW_REDRAWS = 5
"""Most problems drawn for one example until its answer fits."""
MOST_REDRAWS = 300
"""The same for families with `redraws`."""


@dataclass(frozen=True)
class Example:
    """One problem as text and tokens."""

    index: int
    prompt: str
    prompt_ids: list[int]
    """The prompt's tokens, behind the special tokens that the tokenizer puts before a text."""
    answer: str
    answer_ids: list[int]
    """The answer's tokens, without an end-of-text token."""
    references: Any


@dataclass(frozen=True)
class Task:
    """A named task. Name, settings, tokenizer, purpose and index determine an example."""

    name: str
    family: Family

    @property
    def label(self) -> str:
        """The name in tables and files, with "-substitute" if generated text replaces the benchmark's files."""
        return f"{self.name}-substitute" if self.family.substitutes else self.name

    @cached_property
    def template(self) -> Template:
        """The wording, with the parts of `template_file` in place of the family's."""
        return load_template(self.family.wording, self.family.template_file, f"tasks.{self.name}.template_file")

    def settings(self) -> dict[str, Any]:
        """The family's settings as JSON values."""
        return settings_to_dict(self.family)

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """Scores between 0 and 1 by name, see `Family.score`."""
        return self.family.score(prediction, references)

    def examples(
        self,
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        purpose: str = "evaluation",
        prompt_tokens: int | None = None,
        answer_tokens: int | None = None,
    ) -> Iterator[Example]:
        """Yields the first `count` examples of at least `shortest_prompt` tokens; each has the most units that fit.

        Args:
            purpose: part of the seed, so that training and evaluation have different generated problems.
            prompt_tokens, answer_tokens: most tokens of a prompt and of an answer; None to use the settings.

        Raises `SettingsError` if the prompt or the answer cannot fit.
        """
        prompt_room = prompt_tokens or self.family.length - self.family.max_new_tokens
        answer_room = answer_tokens or self.family.max_new_tokens
        start, special = self.family.least_size, SpecialTokens(tokenizer, "--model")
        yielded = 0
        for index in itertools.count():
            if yielded == count:
                return
            try:
                size, example = self._fitting(special, purpose, index, start, prompt_room, answer_room)
            except SettingsError as error:
                own = str(error).startswith("tasks.")
                raise SettingsError(str(error) if own else f"tasks.{self.name}.{error}") from None
            start = size if index == 0 else start  # the others have about the first one's size
            if len(example.prompt_ids) >= self.family.shortest_prompt:
                yielded += 1
                yield example

    def _fitting(
        self, special: SpecialTokens, purpose: str, index: int, start: int, prompt: int, answer: int
    ) -> tuple[int, Example]:
        """The size and the longest example; a problem with too long an answer is drawn again, `FEW_REDRAWS` times."""
        for attempt in range(FEW_REDRAWS):
            seed = f"{self.name}:{self.family.seed}:{purpose}:{index}" + (f":{attempt}" if attempt else "")
            if self.family.redraws:
                seed = self._redrawn(special, seed, index, answer)
            size, example = self._longest(special, seed, index, start, prompt)
            tokens = len(example.answer_ids)
            if not self.family.answer_fits or tokens <= answer:
                return size, example
        raise SettingsError(
            f"tasks.{self.name}.max_new_tokens={answer} cannot hold the right answer ({tokens} tokens): raise it"
        )

    def _redrawn(self, special: SpecialTokens, seed: str, index: int, room: int) -> str:
        """A seed whose answer has more than a quarter of `room` tokens and at most `room`."""
        for attempt in range(MOST_REDRAWS):
            problem = self.family.draw(Random(f"{seed}:{attempt}"), self.family.least_size, index, self.template)
            if room // 4 < len(special.encode_text(problem.answer)) <= room:
                return f"{seed}:{attempt}"
        raise SettingsError(
            f"tasks.{self.name}.max_new_tokens={room}: of {MOST_REDRAWS} problems none has an answer of that length; "
            "raise it"
        )

    def _longest(self, special: SpecialTokens, seed: str, index: int, start: int, room: int) -> tuple[int, Example]:
        """The largest size whose prompt has at most `room` tokens, or fills `FULL_ENOUGH` of them, and its example.

        The next size to try is proportional to the tokens of the last, within the sizes known to fit and not to fit.
        """
        least, most = self.family.least_size, self.family.largest_size(index)
        fitting, too_large, best = least - 1, (most + 1) if most is not None else None, None
        size = max(least, start if most is None else min(start, most))
        while True:
            example = self._build(special, seed, size, index)
            tokens = len(example.prompt_ids)
            if tokens <= room:
                fitting, best = size, example
                if tokens >= FULL_ENOUGH * room:
                    break
            else:
                too_large = size
            if too_large is not None and too_large - fitting <= 1:
                break
            proportional = max(size * room // tokens, fitting + 1)
            size = proportional if too_large is None else min(proportional, too_large - 1)
        if best is None:
            raise SettingsError(
                f"tasks.{self.name}.length={self.family.length} is too short: the shortest prompt has {tokens} tokens, "
                f"and there is room for {room} before max_new_tokens={self.family.max_new_tokens}; raise it"
            )
        return fitting, best

    def _build(self, special: SpecialTokens, seed: str, size: int, index: int) -> Example:
        problem = self.family.draw(Random(seed), size, index, self.template)
        prompt = self._word(special, problem)
        return Example(
            index=index,
            prompt=prompt,
            prompt_ids=_chat_tokens(special, prompt) if self.family.chat else special.encode_prompt(prompt),
            answer=problem.answer,
            answer_ids=special.encode_text(problem.answer),
            references=problem.references,
        )

    def _word(self, special: SpecialTokens, problem: Problem) -> str:
        solved = "".join(f"{self._question(item)}{self._prefix(item)}{item.answer}\n\n" for item in problem.examples)
        question = solved + self._question(problem)
        if self.family.chat:
            question = _chat(special.tokenizer, question, self.name)
        return question + self._prefix(problem)

    def _question(self, problem: Problem) -> str:
        return self.template["prompt"].format(**problem.fields)

    def _prefix(self, problem: Problem) -> str:
        return self.template["answer_prefix"].format(**problem.fields)


def _chat_tokens(special: SpecialTokens, text: str) -> list[int]:
    """The tokens of a prompt in the tokenizer's chat template, which writes its special tokens as text."""
    # verbose=True warns of texts longer than the model's context, and the search for the longest prompt tries some
    return special.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _chat(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise SettingsError(f"tasks.{name}.chat: the tokenizer has no chat template; set it to false")
    chat = chat_text(tokenizer, [{"role": "user", "content": text}], f"tasks.{name}.chat")
    if text.strip() not in chat:
        raise SettingsError(
            f"tasks.{name}.chat: the tokenizer's chat template changes the prompt or leaves it out; set it to false"
        )
    return chat
