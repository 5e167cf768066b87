"""The threshold sweep: what it recommends, worked by hand on made-up losses, and a run of the command."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from refreshkv import NEVER, RefreshConfig, enable
from refreshkv.data.tasks.chain_of_key import ChainOfKey
from refreshkv.data.tasks.words import coined_words
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.evaluation.perplexity.evaluation import evaluate
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.sweep.recommendation import Sweep, sweep_strategies
from refreshkv.settings import SettingsError
from tests.helpers.models import VOCABULARY, random_ids, tiny_model
from tests.helpers.rows import save_rows
from tests.helpers.scripts import load_script

LENGTH = 70


def made_up(*schedules, noise=0.0):
    """An evaluation of two rows. Schedules: stride (None for full attention), threshold, effective stride, loss."""
    results = []
    for stride, threshold, effective, loss in schedules:
        config = stride and RefreshConfig(budget=6, stride=stride, threshold=threshold)
        wide = noise if stride == NEVER else 0.0
        results.append(
            Result(
                name=f"{stride} {threshold}",
                config=config,
                budget=config and 6,
                losses=[loss],
                standard_error=0.1,
                effective_strides={} if config is None else {0: effective, 1: effective},
                row_losses=[loss - wide, loss + wide],
            )
        )
    return Evaluation(results, 2, LENGTH, 20)


FULL, FIXED, NONE = (None, None, None, 1.0), [(10, None, 10.0, 1.1), (20, None, 20.0, 1.2)], (NEVER, None, None, 1.5)


def test_the_highest_stride_that_keeps_enough():
    """Refreshing gains 1.5 - 1.1 = 0.4; at most 1.5 - 0.9 * 0.4 = 1.14 is allowed."""
    similar = [(10, 0.9, 11.0, 1.11), (10, 0.8, 14.0, 1.139), (10, 0.7, 16.0, 1.16), (10, 0.6, 30.0, 1.3)]
    sweep = Sweep(made_up(FULL, *FIXED, *similar, NONE), keep=0.9)
    assert (sweep.least_gap, sweep.largest_gap) == (pytest.approx(0.1), pytest.approx(0.5))
    assert sweep.allowed_gap == pytest.approx(0.14)
    best = sweep.recommend()
    assert (best.point.stride, best.point.threshold) == (10, 0.8)
    assert "stride 10, threshold 0.8: the highest effective stride (14.0) that keeps at least 90%" in best.text
    assert "(it keeps 90%; perplexity +14.91% against full attention)" in best.text and "saves nothing" not in best.text
    assert "the lowest" not in best.text
    assert Sweep(sweep.evaluation, keep=0.8).recommend().point.threshold == 0.7
    assert "of those that were tried it is the lowest" in Sweep(sweep.evaluation, keep=0.4).recommend().text
    points = {point.name: point for point in sweep.points}
    assert points["10 0.8"].kept == pytest.approx((1.5 - 1.139) / 0.4)
    # between 10 and 20, half of the way on a logarithmic scale is 14.14
    assert points["10 0.8"].fixed_gap == pytest.approx(0.1 + 0.1 * math.log(1.4) / math.log(2))
    assert points["10 0.6"].fixed_gap is None and points[f"{NEVER} None"].effective_stride is None
    assert None not in (points["10 None"].kept, points[f"{NEVER} None"].kept)


def test_no_recommendation():
    similar = [(10, 0.8, 14.0, 1.3)]
    sweep = Sweep(made_up(FULL, *FIXED, *similar, NONE), keep=0.9)
    assert sweep.recommend().point is None and "no threshold keeps 90%" in sweep.recommend().text
    noisy = Sweep(made_up(FULL, *FIXED, (10, 0.8, 14.0, 1.1), NONE, noise=0.3), keep=0.9)
    assert noisy.gain == (pytest.approx(0.4), pytest.approx(0.3))
    assert noisy.recommend().point is None and "is within the noise; use more --rows" in noisy.recommend().text
    worse = Sweep(made_up(FULL, *FIXED, *similar, (NEVER, None, None, 1.05)), keep=0.9)
    assert worse.recommend().point is None
    (gained,) = {point.kept for point in worse.points}
    assert gained is None
    useless = Sweep(made_up(FULL, *FIXED, (10, 0.99, 10.0, 1.1), NONE), keep=0.9).recommend()
    assert useless.point.threshold == 0.99 and "it saves nothing over a full step at every 10th" in useless.text


def test_strategies():
    config = RefreshConfig(budget=6, observation_window=3)
    names = [item.name for item in sweep_strategies(config, [5, 10], [0.9, 0.8])]
    assert names == [
        "full",
        *(f"fixed S={stride}" for stride in (5, 10, 15, 20, 25, 30, 50)),
        *(f"S={stride} threshold {threshold}" for stride in (5, 10) for threshold in (0.8, 0.9)),
        "never refreshed",
    ]
    assert all(item.config.observation_window == 3 for item in sweep_strategies(config, [5], [0.8])[1:])
    for arguments, message in [
        (([5, 5], [0.8]), "--strides has a value twice"),
        (([5], [0.8, 0.8]), "--thresholds has a value twice"),
        (([NEVER], [0.8]), "never refreshed; name check strides"),
    ]:
        with pytest.raises(SettingsError, match=message):
            sweep_strategies(config, *arguments)


@pytest.fixture(scope="module")
def launch():
    return load_script("sweep").main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    generator = random.Random(0)
    tokenizer = train_tokenizer([" ".join(coined_words(generator, 200)) for _ in range(5)], 400)
    settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "max_position_embeddings": 1024}
    tiny_model(dtype=torch.float32, **settings).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    splits = {"train": 1, "validation": 4, "test": 0}
    rows = {name: random_ids(count, LENGTH).tolist() for name, count in splits.items()}
    save_rows(root / "rows", rows, VOCABULARY)
    return root


def test_command_line(launch, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--model", str(place / "model"), "--data", str(place / "rows"), "--device", "cpu", "--budget", "8"]
    common += ["--last-tokens", "40", "--batch-size", "4", "--thresholds", "0.2,0.6", "--output", "out"]
    launch([*common, "refresh.stride=4"])
    printed, report = capsys.readouterr().out, json.loads(Path("out/sweep.json").read_text())
    assert printed.splitlines()[-2] == report["recommendation"]["text"]
    assert "![The sweep](sweep.png)" in Path("out/sweep.md").read_text()
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")
    points = {point["name"]: point for point in report["points"]}
    assert list(points) == [
        *(f"fixed S={stride}" for stride in (4, 8, 12, 20)),
        "S=4 threshold 0.2",
        "S=4 threshold 0.6",
        "never refreshed",
    ]
    config = RefreshConfig(budget=8, stride=4)
    rows = Dataset.from_dict({"input_ids": random_ids(4, LENGTH).tolist()}).with_format("torch")
    model = enable(AutoModelForCausalLM.from_pretrained(place / "model"), config)
    strategies = sweep_strategies(config, [4], [0.6])
    full, *others = evaluate(model, rows, strategies, 40, batch_size=4, progress=False).results
    for result in others:
        assert points[result.name]["gap"] == pytest.approx(result.loss - full.loss, abs=1e-6)
        assert points[result.name]["effective_stride"] == result.effective_stride
    assert points["S=4 threshold 0.2"]["effective_stride"] > points["S=4 threshold 0.6"]["effective_stride"]

    before = Path("out/rows.jsonl").read_text()
    with pytest.raises(SettingsError, match="already holds sweep.json: continue that with --resume"):
        launch(common)
    launch([*common, "refresh.stride=4", "--thresholds", "0.6", "--resume"])
    assert Path("out/rows.jsonl").read_text() == before
    for more, message in [
        (["--keep", "0"], "--keep must be more than 0, got 0.0; it is a share"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--resume", "--overwrite"], "choose one"),
        (["--split", "test"], "test split of .* has no rows"),
        (["--examples", "3"], "--examples, --task-length and tasks.NAME.key=value mean nothing without --tasks"),
        (["--thresholds", "0.5,0.5"], "--thresholds has a value twice"),
    ]:
        with pytest.raises(SettingsError, match=message):
            launch([*common, *more])
    capsys.readouterr()
    for more, message in [
        (["--thresholds", "0.5,1.5"], "thresholds are cosines from -1 to 1, separated by commas, got 0.5,1.5"),
        (["--thresholds", "a"], "thresholds are cosines from -1 to 1, separated by commas, got a"),
        (["--strides", "0"], "argument --strides: a whole number >= 1 is wanted, got 0"),
    ]:
        with pytest.raises(SystemExit):
            launch([*common, *more])
        assert message in capsys.readouterr().err


def test_scores_of_tasks_stand_beside(launch, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ChainOfKey, "score", lambda self, prediction, references: {"score": len(prediction) % 7 / 7})
    common = ["--model", str(place / "model"), "--data", str(place / "rows"), "--device", "cpu", "--budget", "8"]
    common += ["--rows", "1", "--last-tokens", "20", "--thresholds", "0.6", "refresh.stride=4", "--output", "out"]
    tasks = ["--tasks", "chain_of_key", "--examples", "2", "--task-length", "700"]
    launch([*common, *tasks, "tasks.chain_of_key.keys=2", "tasks.chain_of_key.max_new_tokens=30"])
    lines = [json.loads(line) for line in Path("out/examples.jsonl").read_text().splitlines()]
    report = json.loads(Path("out/sweep.json").read_text())
    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith("tasks") and len(report["points"]) == 6 and len(lines) == 14
    for point in report["points"]:
        own = [line["scores"]["score"] for line in lines if line["decoding"] == point["name"]]
        assert point["score"] == sum(own) / 2
        (cells,) = [line for line in table if line.startswith(f"{point['name']}  ")]
        assert cells.endswith(f" {100 * point['score']:.1f}")
