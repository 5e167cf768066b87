"""Fill in the middle as in EFIM: prompts that end with what is being typed, and sequences to train on.

Guo et al., "EFIM: Efficient Serving of LLMs for Infilling Tasks with Improved KV Cache Reuse", 2025,
https://arxiv.org/abs/2505.21889. A prompt is PREFIX before SUFFIX after MIDDLE typed. Typing changes its end only, so
a `refreshkv.prefix.store.PrefixStore` has everything before. The text typed so far may end inside a word. A model
learns to go on from there if its texts were cut into fragments at any character before they became tokens.

Written from the paper's abstract and the usual order of fill-in-the-middle tokens; the lengths of fragments are ours.
"""

import random
from itertools import accumulate
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from refreshkv.data.config import FimConfig
from refreshkv.data.tokenizer import SpecialTokens
from refreshkv.settings import SettingsError

PROBE = ("  half a wo", "rd,\tna", "ïve\n", "\n e\u0301 漢", "字")
"""Fragments whose tokens must decode to their text."""


class FillInTheMiddle:
    """Fill-in-the-middle prompts and sequences of one tokenizer.

    Args:
        setting: names the tokenizer in errors.

    Raises `SettingsError` for a tokenizer that lacks one of the tokens, or whose fragments do not decode to their text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: FimConfig, setting: str = "data.tokenizer") -> None:
        self.config, self._special = config, SpecialTokens(tokenizer, setting, config.names)
        self._prefix = self._token("prefix_token", setting)
        self._suffix = self._token("suffix_token", setting)
        self._middle = self._token("middle_token", setting)
        self._end = cast(int, tokenizer.eos_token_id)
        self._validate_restores(setting)

    def prompt(self, prefix: str, suffix: str, typed: str = "") -> list[int]:
        """The tokens of a prompt: what stands before the cursor, what stands after it, and what was typed since.

        Keep `prefix` and `suffix` as they were when typing began, and let `typed` grow: then only its tokens are new.
        """
        before, after, middle = self._special.encode_texts([prefix, suffix, typed])
        begin = self._special.added[0]
        return [*begin, self._prefix, *before, self._suffix, *after, self._middle, *middle]

    def is_chosen(self, digest: str) -> bool:
        """Whether the document with this short hash (`assign_document`) is among the share."""
        return _random(digest, "choice").random() < self.config.share

    def sequences(self, text: str, digest: str, row_length: int) -> list[int]:
        """A document's tokens: sequences of exactly `row_length`, one after another, and the rest that fills none.

        Each sequence is PREFIX before SUFFIX after MIDDLE middle END, of consecutive text; before + middle + after is
        the text. Gaps begin and end between fragments, so at any character.
        """
        draw = _random(digest, "cuts")
        fragments = self._special.encode_texts(_cut(text, self.config.fragment_length, draw))
        tokens = [token for fragment in fragments for token in fragment]
        ends = {*accumulate(map(len, fragments))}
        size, sequences = row_length - 4, []
        whole = len(tokens) // size * size
        for start in range(0, whole, size):
            cuts = [end - start for end in range(start, start + size + 1) if end in ends]
            sequences += self._sequence(tokens[start : start + size], cuts, draw)
        return sequences + tokens[whole:]

    def _sequence(self, tokens: list[int], cuts: list[int], draw: random.Random) -> list[int]:
        """One sequence; cuts: where fragments end in `tokens`."""
        cuts = sorted({0, len(tokens), *cuts})  # a sequence may begin or end inside a fragment
        first, last = sorted(draw.choices(cuts, k=2))
        before, middle, after = tokens[:first], tokens[first:last], tokens[last:]
        return [self._prefix, *before, self._suffix, *after, self._middle, *middle, self._end]

    def _token(self, name: str, setting: str) -> int:
        token = getattr(self.config, name)
        number = self._special.tokenizer.get_vocab().get(token)
        if number is None:
            raise SettingsError(
                f"data.fim.{name}={token} is no token of {setting}: name the tokenizer's own fill-in-the-middle tokens "
                "or leave data.fim out"
            )
        if number not in self._special.tokenizer.added_tokens_decoder:
            raise SettingsError(
                f"data.fim.{name}={token} is an ordinary token of {setting}, which text can contain: name an added one"
            )
        return cast(int, number)

    def _validate_restores(self, setting: str) -> None:
        tokens = [token for fragment in self._special.encode_texts(list(PROBE)) for token in fragment]
        if self.text(tokens) != "".join(PROBE):
            raise SettingsError(
                f"{setting}: tokens of text that is cut inside words do not decode to the text; data.fim needs a "
                "byte-level tokenizer that adds no space"
            )

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, unchanged; special tokens by their names."""
        options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return cast(str, self._special.tokenizer.decode(tokens, **options))


def _random(digest: str, purpose: str) -> random.Random:
    """Numbers that depend on the document alone, whatever other documents there are."""
    return random.Random(f"{digest} {purpose}")


def _cut(text: str, mean: int, draw: random.Random) -> list[str]:
    """Cuts a text at characters drawn without regard to words: fragments of `mean` characters on average."""
    count = min(len(text) // mean, max(len(text) - 1, 0))
    cuts = sorted(draw.sample(range(1, len(text)), count)) if count else []
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
