"""The tokenizer of a preparation, a model's own or a byte-level BPE trained on the documents, and how text is encoded.

Text stays text: `</s>` in a document or a task is four characters. Only our own code adds special tokens.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from refreshkv.data.config import DataConfig
from refreshkv.loading import PLAIN, Origin, load_tokenizer
from refreshkv.settings import SettingsError

END_OF_TEXT = "<|endoftext|>"
"""The only special token of a trained tokenizer: end of text, beginning of text, and padding."""


def model_tokenizer(name: str, origin: Origin = PLAIN) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises `SettingsError` if there is none or it has no end-of-text token."""
    tokenizer = load_tokenizer(name, "data.tokenizer", origin)
    if tokenizer.eos_token_id is None:
        raise SettingsError(
            f"data.tokenizer={name} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def origin_of(config: DataConfig) -> Origin:
    """Which state of `data.tokenizer` is loaded, and whether its code may run."""
    return Origin(config.tokenizer_revision, config.trust_remote_code)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most `vocabulary_size` tokens, fewer if the texts have too few repeated pairs.

    Every text can be encoded, so there is no unknown token. The same texts give the same tokenizer. All different words
    are counted in memory, so the texts should be a small model's corpus, not a large one's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


class SpecialTokens:
    """A tokenizer's special tokens, kept apart from text that names them.

    Args:
        setting: names the tokenizer in errors.
        further: added tokens that count as special here although the tokenizer does not say so. Some tokenizers have
            fill-in-the-middle tokens of this kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, setting: str, further: tuple[str, ...] = ()) -> None:
        self.tokenizer, self._setting = tokenizer, setting
        names: dict[int, str] = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content in further
        }
        names |= {cast(int, tokenizer.convert_tokens_to_ids(name)): name for name in tokenizer.all_special_tokens}
        unknown = cast("int | None", tokenizer.unk_token_id)
        if unknown is not None and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            names.pop(unknown, None)  # what stands for unknown text is no control token
        self._names = names
        longest_first = sorted(names.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if names else None

    def count_names(self, text: str) -> int:
        """How often a text names a special token."""
        return 0 if self._pattern is None else sum(1 for _ in self._pattern.finditer(text))

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, without any special token.

        Raises `SettingsError` for a tokenizer that gives special tokens for text.
        """
        if not texts:
            return []
        options: dict[str, Any] = {
            "add_special_tokens": False,
            "split_special_tokens": True,
            "return_attention_mask": False,
        }
        # verbose=True warns of texts longer than the model's context, but these are cut
        encoded = self.tokenizer(texts, verbose=False, **options)["input_ids"]
        return [
            ids if self._names.keys().isdisjoint(ids) else self._spelled_out(text, ids)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def encode_text(self, text: str) -> list[int]:
        """The same for a single text."""
        return self.encode_texts([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a prompt: what the tokenizer puts before a text, and the text; nothing ends it."""
        return [*self.added[0], *self.encode_text(text)]

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and behind a text by itself."""
        whole, bare = (list(self.tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        raise SettingsError(f"{self._setting}: it is not clear which tokens its tokenizer adds to a text")

    def _spelled_out(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, the tokens of `text`, with each special token replaced by the tokens of its name's letters.

        Tokenizers that look up whole words or the likeliest pieces find a special token's name in their vocabulary.
        """
        spelled, lowered = [], text.lower()
        for number in ids:
            name = self._names.get(number, "")
            if len(name) < 2:  # an ordinary token, also where it serves as a special one: a letter has no other
                spelled.append(number)
                continue
            letters = self._letters(name)
            if name.lower() not in lowered or not self._names.keys().isdisjoint(letters):
                raise SettingsError(
                    f"{self._setting}: its tokenizer gives the special token {name} for plain text; use one that has a "
                    "token of its own for unknown text"
                )
            spelled += letters
        return spelled

    def _letters(self, name: str) -> list[int]:
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [cast(int, self.tokenizer.convert_tokens_to_ids(letter)) for letter in name]
        return [token.id for letter in name for token in backend.model.tokenize(letter)]
