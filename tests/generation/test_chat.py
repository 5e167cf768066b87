"""launch/chat.py: the turns of a chat in one cache."""

import io
import re

import pytest
import torch

from refreshkv import RefreshCache, RefreshConfig, SettingsError, generate
from refreshkv.generation.chat import Conversation
from tests.generation.test_generate import letters_tokenizer
from tests.helpers.models import tiny_enabled, tiny_model
from tests.helpers.scripts import load_script

REFRESH = RefreshConfig(budget=8, stride=4, select_stride=3, score_bits=8)
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
COUNTING = "{{ messages|length }}" + TEMPLATE  # of which no turn begins as the one before


def chat_tokenizer(template=TEMPLATE):
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_enabled(REFRESH, dtype=torch.float32).save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def script():
    return load_script("chat")


def chat(script, monkeypatch, capsys, lines, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    script.main([*map(str, arguments)])
    return capsys.readouterr().out


def expected_answers(model, questions, new):
    """The answers of one cache to chats that were put together token by token, and the numbers of the last line."""
    cache, ids, found = RefreshCache(config=model.config, max_cache_len=300), [], []
    letters = letters_tokenizer()
    for question in questions:
        known = cache.length
        ids += [1, *letters(question, add_special_tokens=False).input_ids, 2, 1]
        prompt = len(ids)
        ids = generate(model, torch.tensor([ids]), past_key_values=cache, max_new_tokens=new, do_sample=False)[
            0
        ].tolist()
        found.append(letters.decode(ids[prompt:], skip_special_tokens=True))
        ids = ids if ids[-1] == 2 else [*ids, 2]
    steps = [flags[:, 0, prompt:].sum(-1).tolist() for flags in (cache.full_steps, cache.selecting_steps)]
    return found, (prompt - known, prompt, cache.length, steps)


def test_turns_stay_in_one_cache(script, folder, monkeypatch, capsys):
    questions = ["ABCDEFGHIJKLMNOPQRST", "UVWX", "AAAABBBBCCCC"]
    out = chat(script, monkeypatch, capsys, questions, folder, "--max-new-tokens", "13", "--context", "300")
    model = tiny_enabled(REFRESH, dtype=torch.float32)
    answers, (new, prompt, length, (full, selecting)) = expected_answers(model, questions, 13)
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith("(")] == answers
    last = re.fullmatch(
        r"\((\d+) tokens at [\d.]+ tokens/s; (\d+) full, (\d+) selecting of (\d+) steps; (\d+) of (\d+) prompt tokens "
        r"computed in [\d.]+ s; (\d+) of 300 tokens in the cache, 8 in the small one\)",
        lines[-1],
    )
    steps = length - prompt
    assert [int(number) for number in last.groups()] == [steps + 1, full[0], selecting[0], steps, new, prompt, length]
    assert new < prompt / 2 and full[0] > 0 and selecting[0] > 0


def test_a_reset_begins_another_chat(script, folder, monkeypatch, capsys):
    lines = ["ABCDEFGHIJKLMNOPQRST", "", "/reset", "ABCDEFGHIJKLMNOPQRST", "/exit", "UVWX"]
    out = chat(script, monkeypatch, capsys, lines, folder, "--max-new-tokens", "9").splitlines()
    first, _, reset, second, _ = out
    assert reset == "(another chat)" and first == second


def test_a_template_that_rewrites_earlier_turns_is_computed_anew(script, folder, tmp_path, monkeypatch, capsys):
    tiny_enabled(REFRESH, dtype=torch.float32).save_pretrained(tmp_path)
    letters = chat_tokenizer(COUNTING.replace("{{ messages|length }}", "{{ 'A' if messages|length == 1 else 'B' }}"))
    letters.save_pretrained(tmp_path)
    out = chat(script, monkeypatch, capsys, ["ABCD", "EFGH"], tmp_path, "--max-new-tokens", "5")
    computed = re.findall(r"(\d+) of (\d+) prompt tokens computed", out)
    assert computed[0] == ("8", "8") and computed[1][0] == computed[1][1]


def test_a_chat_without_room_says_so(script, folder, monkeypatch, capsys):
    out = chat(script, monkeypatch, capsys, ["ABCDEFGHIJ", "KLMNOPQRSTUVWXYZ"], folder, "--context", "20")
    assert "13 of 20 tokens in the cache" in out
    assert "--context=20; begin another with /reset)" in out


def test_the_token_that_ends_an_answer_is_not_there_twice():
    conversation = Conversation(chat_tokenizer(), system="AB")
    prompt = conversation.prompt("CD")
    assert prompt == [1, 33, 34, 2, 1, 35, 36, 2, 1]
    conversation.add_answer([*prompt, 40, 41, 2], "HI")
    assert conversation.prompt("EF") == [*prompt, 40, 41, 2, 1, 37, 38, 2, 1]
    conversation.add_answer([*prompt, 40, 41], "HI")  # cut off
    conversation.messages = conversation.messages[:2] + conversation.messages[-1:]
    assert conversation.prompt("EF") == [*prompt, 40, 41, 2, 1, 37, 38, 2, 1]
    conversation.reset()
    assert conversation.prompt("CD") == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "1000"], "--context=1000 is more than the model's max_position_embeddings=512"),
        (["--context", "0"], "--context must be at least 1"),
        (["--seed", "1"], "--seed needs --sample"),
        (["refresh.strid=3"], "unknown setting refresh.strid"),
    ],
)
def test_the_script_refuses_in_one_line(script, folder, options, message):
    with pytest.raises(SettingsError, match=message):
        script.main([str(folder), *options])


def test_a_tokenizer_without_a_template_is_refused(script, tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="no chat template: continue texts with refreshkv generate"):
        script.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for", "unexpected"),
        ("{{ raise_exception('no users') }}", "no users"),
        ("{{ nothing.there }}", "undefined"),
        ("{# #}", "writes nothing"),
    ],
)
def test_templates_that_fail_are_refused_in_one_line(template, reason):
    with pytest.raises(SettingsError, match=f"MODEL: the tokenizer's chat template .*{reason}"):
        Conversation(chat_tokenizer(template)).prompt("ABC")


@pytest.mark.parametrize("line", ["\udcfc", None], ids=["let through by the locale", "refused by the stream"])
def test_lines_that_are_no_text_are_refused_in_one_line(script, folder, monkeypatch, line):
    stream = io.TextIOWrapper(io.BytesIO(b"\xfc\n"), "utf-8") if line is None else io.StringIO(line)
    monkeypatch.setattr("sys.stdin", stream)
    with pytest.raises(SettingsError, match="standard input is not UTF-8 text"):
        list(script.messages())


def test_sampling_takes_a_seed(script, folder, monkeypatch, capsys):
    options = (folder, "--max-new-tokens", "9", "--sample", "--temperature", "2.0")
    first, again, other = (
        chat(script, monkeypatch, capsys, ["ABCDEFGHIJ"], *options, "--seed", seed).splitlines()[0]
        for seed in (1, 1, 2)
    )
    assert first == again != other
