"""Long generation: the texts are those of the decoders, full attention's judgement is its own, and the report."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from refreshkv import RefreshConfig
from refreshkv.evaluation.continuations.generation import (
    GREEDILY,
    TEXT,
    Continuation,
    Continuations,
    continue_sequences,
    sampled,
)
from refreshkv.evaluation.continuations.measures import common_prefix, in_blocks, repetition
from refreshkv.evaluation.continuations.report import summarize
from refreshkv.evaluation.strategies import build_strategies
from refreshkv.settings import SettingsError
from tests.evaluation.test_sweep import place  # noqa: F401  # a fixture
from tests.helpers.models import random_ids, tiny_enabled
from tests.helpers.scripts import load_script

PROMPT, NEW = 24, 12
CONFIG = RefreshConfig(budget=6, pool_kernel=1, stride=4)
DRAWN = sampled(temperature=1.0, top_p=1.0, seed=3)


@pytest.fixture(scope="module")
def model():
    return tiny_enabled(CONFIG)


def as_rows(count=3):
    return Dataset.from_dict({"input_ids": random_ids(count, PROMPT + NEW).tolist()}).with_format("torch")


def run(model, path, names=("full", "refresh:4"), decodings=(GREEDILY,), **options):
    strategies = build_strategies(list(names), CONFIG)
    return continue_sequences(
        model, as_rows(), strategies, list(decodings), NEW, Continuations(path), progress=False, **options
    )


def test_measures_by_hand():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 / 5)
    assert repetition([1, 1, 1, 1, 1], 2) == pytest.approx(3 / 4) and repetition([1, 2], 4) == 0
    assert (common_prefix([1, 2, 3], [1, 2, 4]), common_prefix([1], [1]), common_prefix([1], [2])) == (2, 1, 0)
    assert in_blocks([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]], 2) == [2.5, 4.5]
    assert in_blocks([[1.0, 2.0]], 8) == [1.0, 2.0]


@torch.no_grad()
def test_full_attention_writes_its_likeliest_tokens_and_judges_all(model, tmp_path):
    found = run(model, tmp_path / "texts.jsonl", batch_size=2)
    assert [(one.strategy, one.index) for one in found] == [
        (name, i) for name in (TEXT, "full", "refresh S=4") for i in range(3)
    ]
    rows = as_rows()[:]["input_ids"]
    assert [one.tokens for one in found[:3]] == rows[:, PROMPT:].tolist()
    assert all(all(one.likeliest) for one in found[3:6])
    differ = 0
    for one in found:  # the slow way: one token after the other
        ids = rows[one.index, :PROMPT].tolist()
        for token, loss, likeliest in zip(one.tokens, one.losses, one.likeliest, strict=True):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert loss == pytest.approx(F.cross_entropy(logits, torch.tensor(token)).item(), rel=1e-5)
            assert likeliest == (int(logits.argmax()) == token)
            ids.append(token)
        differ += one.strategy == "refresh S=4" and not all(one.likeliest)
    assert differ, "a small cache of 6 of 24 tokens writes something else"


def test_drawn_tokens_depend_on_the_seed_and_equal_predictions_draw_equal_tokens(model, tmp_path):
    whole = RefreshConfig(budget=PROMPT + NEW, stride=4)
    strategies = [build_strategies(["full"], CONFIG)[0], build_strategies(["refresh:4"], whole)[0]]

    def texts(name, decoding):
        records = Continuations(tmp_path / name)
        found = continue_sequences(model, as_rows(), strategies, [decoding], NEW, records, 3, progress=False)
        return [one.tokens for one in found[3:]]

    first = texts("first.jsonl", DRAWN)
    assert first[:3] == first[3:] == texts("second.jsonl", DRAWN)[:3]
    assert first[:3] != texts("third.jsonl", sampled(1.0, 1.0, 4))[:3]


def test_finished_texts_are_not_generated_again(model, tmp_path, monkeypatch):
    path = tmp_path / "texts.jsonl"
    before = run(model, path, decodings=(GREEDILY, DRAWN))
    written = path.read_text()
    monkeypatch.setattr("refreshkv.evaluation.continuations.generation._generate", None)
    assert run(model, path, decodings=(GREEDILY, DRAWN)) == before and path.read_text() == written


def test_the_summary_by_hand():
    def one(strategy, index, tokens, losses, decoding="greedy"):
        return Continuation("", strategy, decoding, index, tokens, losses, [loss < 1 for loss in losses], 2.0)

    text, full, small = summarize(
        [
            one(TEXT, 0, [1, 2, 3, 4], [1.0] * 4),
            one("full", 0, [1, 1, 2, 2], [0.5] * 4),
            one("small", 0, [1, 1, 2, 9], [0.5, 0.5, 0.5, 2.5]),
        ]
    )
    assert text.same is None and text.decoding == "" and text.perplexity == pytest.approx(math.e)
    assert (full.same, full.same_until, full.likeliest, full.standard_error) == (1.0, 4, 1.0, None)
    assert (small.same, small.same_until, small.likeliest, small.repetition) == (0.75, 3, 0.75, 0)
    assert small.same_by_position == [1, 1, 1, 0] and small.perplexity == pytest.approx(math.e)
    assert small.perplexity_by_position[-1] == pytest.approx(math.exp(2.5)) and small.seconds == 2.0


def test_command_line(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    launch = load_script("evaluate").main
    common = ["--model", str(place / "model"), "--data", str(place / "rows"), "--device", "cpu", "--output", "out"]
    common += ["--split", "validation", "--rows", "2", "--batch-size", "2", "--budget", "8"]
    launch([*common, "--generate", "10", "--sample", "--strategies", "full,select:2:4bit"])
    report = json.loads(Path("out/generation.json").read_text())
    assert [(one["strategy"], one["decoding"]) for one in report["results"]] == [
        (TEXT, ""),
        *((name, kind) for kind in ("greedy", "sampled") for name in ("full", "select S=2 4 bits")),
    ]
    assert report["settings"]["generated"] == 10 and report["settings"]["decoding"]["sampled"]["top_k"] == 50
    assert report["results"][1]["same"] == 1 and len(report["results"][1]["likeliest_by_position"]) == 8
    assert Path("out/generation.png").read_bytes().startswith(b"\x89PNG")
    assert "| full | greedy |" in Path("out/generation.md").read_text() and "as full until" in capsys.readouterr().out
    for more, message in [
        (["--generate", "10"], "already holds generation.json: continue that with --resume"),
        (["--generate", "99999"], "--generate must be less than"),
        (["--generate", "0"], "--generate must be"),
        (["--generate", "4", "--seed", "1"], "--seed needs --sample"),
        (["--sample"], "--sample means nothing with --data"),
        (["--generate", "4", "--grid", "budgets"], "--grid has strategies, budgets and settings of its own"),
        (["--generate", "4", "--last-tokens", "9"], "--last-tokens means nothing with --generate"),
        (["--generate", "4", "tasks.vt.length=9"], "tasks.NAME.key=value means nothing"),
    ]:
        with pytest.raises(SettingsError, match=message):
            launch([*common, *more])
