"""Fill in the middle: an editing session recomputes what was typed, and prepared sequences hold their text."""

from dataclasses import replace

import pytest
import torch
from tokenizers import normalizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.data.config import DataConfig, FimConfig
from refreshkv.data.fim import FillInTheMiddle
from refreshkv.data.preparation import assign_document
from refreshkv.data.rows import load_rows, prepare_rows
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.prefix.recycling import put_new, recycle
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError
from tests.data.test_rows import make_texts, write_jsonl
from tests.helpers.models import tiny_enabled

NAMES = ("<pre>", "<suf>", "<mid>")
FIM = FimConfig(*NAMES, share=0.5, fragment_length=7)
ROW_LENGTH = 32


@pytest.fixture(scope="module")
def texts():
    return make_texts(60, seed=4)


@pytest.fixture(scope="module")
def tokenizer(texts):
    made = train_tokenizer(texts, 300)
    made.add_special_tokens({"additional_special_tokens": list(NAMES)})
    return made


def data_config(tmp_path, texts, tokenizer, **changes):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    config = DataConfig(
        folder=str(tmp_path / "rows"), path="json", data_files=source, streaming=True, row_length=ROW_LENGTH,
        tokenizer=str(tmp_path / "tokenizer"), fim=FIM,
    )  # fmt: skip
    return replace(config, **changes)


def rows_of(folder):
    """document -> its sequences in order."""
    found, rows = {}, load_rows(folder)
    for split in (rows.train, rows.validation, rows.test):
        for row in split:
            found.setdefault(row["document"], []).append(row["input_ids"].tolist())
    return found


def parts(row, marks, end):
    """before, middle, after of one sequence."""
    prefix, suffix, middle = (row.index(mark) for mark in marks)
    assert prefix == 0 and row[-1] == end and sum(row.count(mark) for mark in (*marks, end)) == 4
    return row[1:suffix], row[middle + 1 : -1], row[suffix + 1 : middle]


def test_the_text_of_each_document_is_restored_and_others_stay_as_they_are(tmp_path, texts, tokenizer):
    config = data_config(tmp_path, texts, tokenizer)
    report = prepare_rows(config, budget=4)
    changed = rows_of(config.folder)
    plain = rows_of(prepare_rows(replace(config, fim=None, folder=str(tmp_path / "plain")), budget=4).folder)
    marks, inside_words, kinds = tokenizer.convert_tokens_to_ids(list(NAMES)), 0, set()
    fim = FillInTheMiddle(tokenizer, FIM)
    for text in texts:
        digest = assign_document(text)[0]
        rows = changed.pop(digest, [])
        kinds.add(fim.is_chosen(digest))
        if not fim.is_chosen(digest):
            assert rows == plain.get(digest, [])
            continue
        tokens = []
        for row in rows:
            before, middle, after = parts(row, marks, tokenizer.eos_token_id)
            tokens += before + middle + after
            begin = tokenizer.decode(before)[-1:] + tokenizer.decode(middle)[:1]
            inside_words += len(begin) == 2 and begin.isalnum()
        restored = b"".join(_bytes(tokenizer, token) for token in tokens)
        assert text.encode().startswith(restored) and (rows == [] or len(restored) > ROW_LENGTH)
    assert not changed and kinds == {True, False} and inside_words > 5
    assert "50% of documents are fill-in-the-middle" in str(report)


def _bytes(tokenizer, token):
    """The bytes of a byte-level token, by the letters that stand for them."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(letters[letter] for letter in tokenizer.convert_ids_to_tokens(token))


def test_preparing_again_gives_the_same(tmp_path, texts, tokenizer):
    config = data_config(tmp_path, texts, tokenizer)
    first = prepare_rows(config, budget=4).info["fingerprint"]
    again = replace(config, folder=str(tmp_path / "again"), data_files=config.data_files)
    assert prepare_rows(again, budget=4).info["fingerprint"] == first


def session(fim, model):
    """Types a text letter by letter; the prompt tokens computed at each request, and those of `typed`."""
    store, computed, typed_tokens = PrefixStore(None, 10**9, model), [], []
    before, after, typed = "the small cache holds what " * 8, " and forgets tokens again" * 8, "a query as"
    for length in range(len(typed) + 1):
        ids = torch.tensor([fim.prompt(before, after, typed[:length])])
        cache = RefreshCache(model.config, 400, RefreshConfig(budget=12, stride=4))
        reuse = recycle(store, cache, ids)
        with torch.no_grad():
            logits = model(ids[:, reuse.tokens :], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, model(ids).logits[:, -1], rtol=0, atol=1e-9)
        put_new(store, ids, cache, reuse, 1.0)
        computed.append(reuse.prompt_tokens - reuse.tokens)
        typed_tokens.append(ids.shape[1] - len(fim.prompt(before, after)))
    return computed, typed_tokens


def test_an_editing_session_recomputes_what_was_typed(tokenizer):
    """And the last two tokens, which a selection always needs. The prompt itself is computed once."""
    computed, typed = session(FillInTheMiddle(tokenizer, FIM), tiny_enabled(vocab_size=len(tokenizer)))
    assert computed[0] > 64 and computed[0] > 5 * max(computed[1:])
    assert all(count <= 2 + tokens for count, tokens in zip(computed[1:], typed[1:], strict=True))


def test_a_prompt_is_the_beginning_of_a_sequence(tokenizer):
    """Training equals generation: a prompt of a sequence's parts is that sequence up to the typed text."""
    fim, text = FillInTheMiddle(tokenizer, replace(FIM, fragment_length=10**6)), "naïve <pre> 漢字 tokens " * 9
    size = len(fim.prompt(text, "")) + 1
    row = fim.sequences(text, "0", size)
    assert len(row) == size
    marks = tokenizer.convert_tokens_to_ids(list(NAMES))
    before, middle, after = (fim.text(part) for part in parts(row, marks, tokenizer.eos_token_id))
    assert before + middle + after == text and row[:-1] == fim.prompt(before, after, middle)


def test_names_of_the_tokens_are_text_even_if_the_tokenizer_does_not_call_them_special(texts):
    made = train_tokenizer(texts, 300)
    made.add_tokens(list(NAMES))
    fim, marks = FillInTheMiddle(made, FIM), made.convert_tokens_to_ids(list(NAMES))
    tokens = fim.prompt("a <pre> b", "<mid>", "<suf")
    assert [token for token in tokens if token in marks] == [marks[0], marks[1], marks[2]]
    assert fim.text(tokens) == "<pre>a <pre> b<suf><mid><mid><suf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fim": replace(FIM, middle_token="<hole>")}, "^data.fim.middle_token=<hole> is no token of data.tokenizer"),
        ({"fim": replace(FIM, middle_token="a")}, "^data.fim.middle_token=a is an ordinary token"),
    ],
)
def test_tokenizers_without_the_tokens_are_refused(tmp_path, texts, tokenizer, changes, message):
    with pytest.raises(SettingsError, match=message):
        prepare_rows(data_config(tmp_path, texts, tokenizer, **changes), budget=4)


def test_a_tokenizer_that_changes_text_is_refused(texts):
    made = train_tokenizer(texts, 300)
    made.add_special_tokens({"additional_special_tokens": list(NAMES)})
    made.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(SettingsError, match="needs a byte-level tokenizer"):
        FillInTheMiddle(made, FIM)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "tasks", "tasks": {"chain_of_key": {}}, "tokenizer": "t"}, "data.fim means nothing"),
        ({"train_vocabulary": 300}, "data.fim needs a tokenizer"),
        ({"tokenizer": "t", "row_length": 7}, "data.row_length=7 is too short"),
    ],
)
def test_settings_that_cannot_work(values, message):
    with pytest.raises(SettingsError, match=message):
        DataConfig(fim=FIM, **values)


def test_fim_settings_are_checked():
    with pytest.raises(SettingsError, match="three different tokens"):
        FimConfig("<pre>", "<pre>", "<mid>")
    with pytest.raises(SettingsError, match="data.fim.share"):
        replace(FIM, share=1.5)
