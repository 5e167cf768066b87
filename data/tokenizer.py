"""The tokenizer of a preparation: a model's own, or a byte-level BPE trained on the documents."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from refreshkv.loading import load_tokenizer
from refreshkv.settings import SettingsError

END_OF_TEXT = "<|endoftext|>"
"""The only special token of a trained tokenizer: end of text, beginning of text, and padding."""


def model_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises `SettingsError` if there is none or it has no end-of-text token."""
    tokenizer = load_tokenizer(name, "data.tokenizer")
    if tokenizer.eos_token_id is None:
        raise SettingsError(
            f"data.tokenizer={name} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


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
