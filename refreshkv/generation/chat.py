"""A chat whose turns stay in one cache: the tokens of each turn follow those that the cache holds.

A chat template renders the messages as one text. Tokenizing that text may give other tokens for an answer than the
model generated. So only the text behind the last answer is tokenized, and the tokens before it are kept.
"""

from transformers import PreTrainedTokenizerBase

from refreshkv.cache.refresh import RefreshCache
from refreshkv.chat_template import chat_text
from refreshkv.settings import SettingsError

ANSWER = "\x02the answer\x03"
"""Stands for the last answer in a template's text, to find where it ends."""


class Conversation:
    """The messages of one chat, and the tokens that the model has seen of them.

    Args:
        tokenizer: has a chat template; `SettingsError` if not.
        system: the system message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None):
        if not tokenizer.chat_template:
            raise SettingsError("MODEL: its tokenizer has no chat template: continue texts with refreshkv generate")
        self.tokenizer, self.system = tokenizer, system
        self.reset()

    def reset(self) -> None:
        """Forgets all messages."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.tokens: list[int] = []
        """The tokens of the chat so far; empty if they are not known: the next prompt is then the whole chat."""

    def prompt(self, text: str) -> list[int]:
        """Adds a user message, and returns the tokens of the whole chat up to the next answer.

        They begin with `tokens`. If `tokens` is empty, the cache must be reset.
        """
        question = {"role": "user", "content": text}
        behind = self._text_behind_answer(question) if self.tokens else None
        if behind is None:
            self.tokens = []
            behind = self._rendered([*self.messages, question])
        new = self.tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"]
        self.messages.append(question)
        known = self.tokens
        if known and behind.startswith(str(self.tokenizer.decode(known[-1:]))) and new[:1] == known[-1:]:
            known = known[:-1]  # the token that ended the answer, which never entered the cache
        return [*known, *new]

    def add_answer(self, tokens: list[int], text: str) -> None:
        """Adds an answer. tokens: those of the whole chat, this answer included; empty if they are not known."""
        self.tokens = tokens
        self.messages.append({"role": "assistant", "content": text})

    def _text_behind_answer(self, question: dict[str, str]) -> str | None:
        """The template's text behind the last answer; None if the template now renders the text before it
        differently."""
        *before, _ = self.messages
        stand_in = {"role": "assistant", "content": ANSWER}
        start, found, behind = self._rendered([*before, stand_in, question]).partition(ANSWER)
        return behind if found and start == self._rendered(before) else None

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        return chat_text(self.tokenizer, messages, "MODEL")


def steps_line(cache: RefreshCache, prompt_tokens: int) -> str:
    """How many of the steps after the prompt were full and selecting steps, over the layers that are refreshed."""
    names = ("full", "selecting")
    flags = (cache.full_steps, cache.selecting_steps)
    refreshed = [number for number, sliding in enumerate(cache.is_sliding) if not sliding]
    parts = []
    for name, own in zip(names, flags, strict=True):
        counts = own[refreshed, 0, prompt_tokens:].sum(-1).tolist()
        least, most = min(counts), max(counts)
        parts.append(f"{least if least == most else f'{least}-{most}'} {name}")
    return f"{', '.join(parts)} of {cache.length - prompt_tokens} steps"
