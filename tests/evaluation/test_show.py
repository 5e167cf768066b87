"""The page of one generation: what it says each head holds is what the cache held, at every step."""

import json
import random
import re
import shutil
import subprocess

import pytest
import torch

from refreshkv import NEVER, RefreshCache, RefreshConfig
from refreshkv.data.tasks.words import coined_words
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.evaluation.show.packing import packed, unpacked
from refreshkv.evaluation.show.page import build_page, token_texts
from refreshkv.evaluation.show.recording import Choice, Recording
from refreshkv.launch.show import record
from refreshkv.ops.naive.step import small_cache
from refreshkv.settings import SettingsError
from tests.helpers.models import random_ids, tiny_enabled
from tests.helpers.scripts import load_script

PROMPT, NEW = 30, 24
CONFIGS = {
    "full steps": RefreshConfig(budget=9, stride=7),
    "selecting steps": RefreshConfig(budget=9, stride=8, select_stride=3, score_bits=4),
    "by similarity": RefreshConfig(budget=9, stride=2, threshold=0.4),
    "never": RefreshConfig(budget=5, stride=NEVER),
    "all": RefreshConfig(budget=1000, stride=7),
}


class Tokens:
    """What `record` reads of a tokenizer."""

    eos_token_id, pad_token_id = 2, 0


def recorded(config):
    """A model, and the recording of one generation."""
    model = tiny_enabled(config, eos_token_id=None, layers=3)
    return model, record(model, Tokens(), random_ids(1, PROMPT), config, NEW)


@torch.no_grad()
def held_by_the_cache(model, config, tokens):
    """(layer, head, position) -> what the token there attended to, and what the head held after a choice there."""
    cache, ids = RefreshCache(model.config, len(tokens), config), torch.tensor([tokens])
    model(ids[:, :PROMPT], past_key_values=cache)
    attended, chosen = {}, {(i, h, PROMPT - 1): own for i, h, own in selections(cache)}
    for position in range(PROMPT, len(tokens) - 1):
        queues = [small_cache(position, layer.row_state, layer.selected.long())[0] for layer in cache.layers]
        model(ids[:, position : position + 1], past_key_values=cache)
        for number, head, own in selections(cache):
            is_full, is_selecting = (
                bool(flags[number, 0, position]) for flags in (cache.full_steps, cache.selecting_steps)
            )
            seen = [column for column in queues[number][head].tolist() if column >= 0]
            seen = own if is_selecting else list(range(position + 1)) if is_full else sorted(seen)
            attended[number, head, position] = seen
            if is_full or is_selecting:
                chosen[number, head, position] = own
    return attended, chosen


def selections(cache):
    for number, layer in enumerate(cache.layers):
        for head, ranks in enumerate(layer.selected[0].tolist()):
            yield number, head, sorted(column for column in ranks if column >= 0)


def page_data(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


FAST = ("selecting steps", "by similarity")


@pytest.mark.parametrize("name", [pytest.param(own, marks=[] if own in FAST else pytest.mark.slow) for own in CONFIGS])
def test_the_page_holds_what_the_cache_held(name):
    config = CONFIGS[name]
    model, recording = recorded(config)
    attended, chosen = held_by_the_cache(model, config, recording.tokens)
    assert len(recording.tokens) == PROMPT + NEW
    assert {key: recording.attended(*key) for key in attended} == attended

    data = page_data(build_page(recording, [f"<{token}>" for token in recording.tokens], "</script>", {}))
    choices = unpacked(data["choices"])
    kept = {
        (layer, head, choice.position): own
        for layer, made in choices.items()
        for choice in made
        for head, own in enumerate(choice.kept)
    }
    assert kept == chosen and choices == recording.choices
    assert sum(map(len, kept.values())) == sum(map(len, chosen.values())) > 0
    assert data["promptLength"] == PROMPT and data["budget"] == config.largest_budget(PROMPT)
    assert len(data["texts"]) == PROMPT + NEW


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
@pytest.mark.parametrize("name", ["selecting steps", pytest.param("full steps", marks=pytest.mark.slow)])
def test_the_script_shows_what_the_cache_held(name, tmp_path):
    """All heads at all positions, forwards and back, as the slider moves."""
    config = CONFIGS[name]
    model, recording = recorded(config)
    attended, chosen = held_by_the_cache(model, config, recording.tokens)
    page = build_page(recording, [str(token) for token in recording.tokens], name, {})
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    wanted = [list(key) for key in {**attended, **chosen}]
    random.Random(0).shuffle(wanted)
    (tmp_path / "run.js").write_text(
        f"{script}\nconst recording = read({json.dumps(page_data(page))});\n"
        f"console.log(JSON.stringify({wanted}.map(([l, h, p]) => recording.held(l, h, p))));"
        "console.log(JSON.stringify(recording.layers.map((own) => own.choices.map((c) => c.returned))));"
    )
    printed = subprocess.run(["node", tmp_path / "run.js"], capture_output=True, text=True, check=True).stdout
    shown, returned = map(json.loads, printed.splitlines())
    for key, own in zip(map(tuple, wanted), shown, strict=True):
        assert own == (chosen[key] if key in chosen else attended[key])
    for layer, made in recording.choices.items():
        assert returned[layer] == came_back(made)


BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


def in_a_browser(page, step, layer, head):
    """What a headless browser makes of the page: positions of the marked tokens, and the number that it counted."""
    address = f"{page.as_uri()}#step={step}&layer={layer}&head={head}"
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/profile"]
    dom = subprocess.run([*line, "--dump-dom", address], capture_output=True, text=True, timeout=60).stdout
    text = re.search(r'<p id="text">(.*?)</p>', dom, re.DOTALL)[1]
    spans = re.findall(r"<span[^>]*>", text)
    marked = [at for at, span in enumerate(spans) if "background" in span]
    return marked, int(re.search(r'data-held="(\d+)"', dom)[1])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
@pytest.mark.parametrize("name", ["selecting steps", "by similarity"])
def test_a_browser_marks_what_the_cache_held(name, tmp_path):
    config = CONFIGS[name]
    model, recording = recorded(config)
    attended, chosen = held_by_the_cache(model, config, recording.tokens)
    page = tmp_path / "page.html"
    page.write_text(build_page(recording, [f"<{token}>" for token in recording.tokens], name, {}), encoding="utf-8")
    some = random.Random(0).sample(sorted(chosen), 2) + random.Random(1).sample(sorted(attended), 2)
    for layer, head, position in some:
        marked, count = in_a_browser(page, position - (PROMPT - 1), layer, head)
        held = chosen.get((layer, head, position)) or attended[layer, head, position]
        assert marked == held and count == len(held)


def came_back(made):
    """For each choice and head the positions that are kept, were not before, but earlier."""
    found, seen = [], [set() for _ in made[0].kept]
    for number, choice in enumerate(made):
        before = made[number - 1].kept if number else [[] for _ in choice.kept]
        found.append(
            [sorted((set(own) - set(was)) & old) for own, was, old in zip(choice.kept, before, seen, strict=True)]
        )
        seen = [old | set(own) for own, old in zip(choice.kept, seen, strict=True)]
    return found


def test_large_numbers_are_packed():
    made = [
        Choice(200_000, True, [[0, 127, 128, 16_384, 200_000]], [[128, 16_384]]),
        Choice(200_001, False, [[5]], [[]]),
    ]
    recording = Recording(200_001, 5, list(range(200_003)), {7: made})
    assert unpacked(packed(recording)) == {7: made}


def test_texts_of_tokens_join_to_the_text():
    tokenizer = train_tokenizer([" ".join(coined_words(random.Random(0), 200))], 300)
    text = "two words\n  and  </script> é"
    assert "".join(token_texts(tokenizer.encode(text, add_special_tokens=False), tokenizer)).replace("\ufffd", "") in (
        text,
        text.replace("é", ""),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    tokenizer = train_tokenizer([" ".join(coined_words(random.Random(0), 200))], 300)
    settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0}
    tiny_enabled(dtype=torch.float32, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_writes_one_file(model, tmp_path, capsys):
    prompt, page = tmp_path / "prompt.txt", tmp_path / "page.html"
    prompt.write_text(" ".join(coined_words(random.Random(1), 20)) + " <b>&amp;")
    line = f"{model} --prompt-file {prompt} --output {page} --max-new-tokens 6 --budget 8 refresh.select_stride=2"
    load_script("show").main(line.split())
    assert "new tokens" in capsys.readouterr().out
    data = page_data(page.read_text())
    assert "".join(data["texts"]).startswith(prompt.read_text()) and data["settings"]["select_stride"] == "2"
    assert not re.search(r"(src|href)=|https?://", page.read_text())  # no network
    with pytest.raises(SettingsError, match="--overwrite"):
        load_script("show").main(line.split())
    with pytest.raises(SettingsError, match="is a folder"):
        load_script("show").main([str(model), "--prompt-file", str(prompt), "--output", str(tmp_path)])
