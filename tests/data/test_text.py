"""Text stays text (issue 20, A6), whatever the tokenizer: no special token from a document or a task, none behind a
prompt."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from refreshkv.data.config import DataConfig
from refreshkv.data.rows import load_rows, prepare_rows
from refreshkv.data.tasks.questions import Questions
from refreshkv.data.tasks.task import Task
from refreshkv.data.tokenizer import SpecialTokens, train_tokenizer
from refreshkv.settings import SettingsError

TEXT = "a cat </s> sat <s>on</s> the <|endoftext|> mat"
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
LETTERS = sorted(set("".join(SPECIAL) + TEXT + "▁"))
MARKS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|endoftext|>"]}


def unigram():
    """As SentencePiece's models: the special tokens are pieces, and the likeliest ones."""
    pieces = [(name, 0.0) for name in SPECIAL] + [(letter, -2.0) for letter in LETTERS]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Metaspace()
    return made


def word_level(unknown="<unk>"):
    words = [*SPECIAL, *LETTERS, "cat", "sat", "on", "the", "mat"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def fast(made, adds=""):
    """adds: the special tokens that it puts before and behind each text."""
    made.add_special_tokens(SPECIAL)
    if adds:
        pairs = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=adds, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=made, **MARKS)


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python: a word is a token if it is in the vocabulary, else its letters are."""

    def __init__(self, ends=True, **settings):
        words = [*SPECIAL, *LETTERS, "cat"]
        self.ids, self.ends = {word: number for number, word in enumerate(words)}, ends
        self.words = words
        super().__init__(**settings)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.ids)

    def _tokenize(self, text, **_):
        parts = text.replace(" ", " ▁ ").split()
        return [token for part in parts for token in ([part] if part in self.ids else part)]

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return self.words[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, *token_ids_0, *([2] if self.ends else [])]


TOKENIZERS = {
    "unigram": lambda: fast(unigram(), "<s> $A </s>"),
    "words": lambda: fast(word_level(), "$A </s>"),
    "bytes": lambda: fast(byte_level(), "<s> $A"),
    "bytes, nothing added": lambda: fast(byte_level()),
    "slow": lambda: Slow(**MARKS),
    "slow, nothing behind": lambda: Slow(ends=False, **MARKS),
}
PUT_BEFORE = {"words": [], "bytes, nothing added": []}
PUT_BEHIND = {"unigram": [2], "words": [2], "slow": [2]}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_names_of_special_tokens_are_text(name):
    tokenizer = TOKENIZERS[name]()
    special = SpecialTokens(tokenizer, "--model")
    assert set(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) & {1, 2, 3}  # what is to be avoided
    ids = special.encode_text(TEXT)
    assert not set(ids) & {1, 2, 3} and len(ids) > 10
    assert special.count_names(TEXT) == 4
    plain = "a cat sat on the mat"
    assert special.encode_text(plain) == tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert special.encode_texts([TEXT, plain, ""]) == [ids, special.encode_text(plain), []]
    if name.startswith("bytes"):
        assert tokenizer.decode(ids) == TEXT
    assert set(tokenizer(TEXT)["input_ids"]) & {1, 2, 3}  # as before, for prompts of the user's own


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_ends_a_prompt(name):
    tokenizer = TOKENIZERS[name]()
    special = SpecialTokens(tokenizer, "--model")
    before, behind = PUT_BEFORE.get(name, [1]), PUT_BEHIND.get(name, [])
    assert tokenizer("a cat")["input_ids"] == [*before, *special.encode_text("a cat"), *behind]
    assert special.encode_prompt("a cat") == [*before, *special.encode_text("a cat")]
    assert special.added == (before, behind)


def test_a_tokenizer_without_a_token_for_unknown_text_is_refused():
    tokenizer = fast(word_level(unknown="</s>"))
    with pytest.raises(SettingsError, match="data.tokenizer: its tokenizer gives the special token </s> for"):
        SpecialTokens(tokenizer, "data.tokenizer").encode_text("a dog")


def test_a_letter_that_is_a_special_token_stays():
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.pad_token = "."
    special = SpecialTokens(tokenizer, "--model")
    assert special.encode_text("a.b") == tokenizer("a.b")["input_ids"]


@pytest.mark.parametrize("name", ["unigram", "bytes", "slow"])
def test_task_prompts_have_text_alone(name, tmp_path):
    """A document with </s> in it, and a tokenizer that ends each text."""
    question = {"question": "who </s>?", "answers": [{"text": "a cat"}]}
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": TEXT, "qas": [question]}]}]}))
    task = Task("qa_1", Questions(length=2000, data_files=str(file)))
    (example,) = task.examples(TOKENIZERS[name](), 1)
    assert TEXT in example.prompt
    assert example.prompt_ids[0] == 1 and not set(example.prompt_ids[1:] + example.answer_ids) & {1, 2, 3}


def test_documents_have_text_alone_and_the_report_counts_it(tmp_path):
    texts = [f"{TEXT} {number} " * 4 for number in range(30)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fast(byte_level(), "<s> $A </s>").save_pretrained(tmp_path / "tokenizer")
    config = DataConfig(
        folder=str(tmp_path / "rows"),
        path="json",
        data_files=str(tmp_path / "texts.jsonl"),
        tokenizer=str(tmp_path / "tokenizer"),
        row_length=16,
        streaming=True,
    )
    report = prepare_rows(config, budget=4)
    assert "names of special tokens in the documents, kept as ordinary text: 480" in str(report)
    rows = load_rows(config.folder)
    ids = [row["input_ids"].tolist() for split in (rows.train, rows.validation, rows.test) for row in split]
    assert ids and not any(number in (1, 3) for row in ids for number in row)
    assert all(2 not in row[:-1] for row in ids)  # a document's end alone
