"""Evaluation on tasks: what a batch generates, what is counted, how it resumes, and what the command line refuses."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refreshkv import NEVER, RefreshCache, RefreshConfig, enable
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.data.tasks.registry import build_task
from refreshkv.data.tasks.words import coined_words
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.evaluation import strategies as decoding
from refreshkv.evaluation.strategies import build_strategies
from refreshkv.evaluation.tasks.report import build_task_report, task_table
from refreshkv.evaluation.tasks.scores import (
    AnswerGenerator,
    BatchOptions,
    ExampleRecords,
    evaluate_tasks,
    left_padded,
    make_examples,
)
from refreshkv.identity import fingerprint
from refreshkv.settings import SettingsError
from tests.helpers.models import tiny_model
from tests.helpers.scripts import load_script

CONFIG = RefreshConfig(budget=40, stride=4)
LENGTH = 260
SETTINGS = {"chain_of_key": {"keys": 2, "max_new_tokens": 20}, "niah_single_2": {"max_new_tokens": 12}}


@pytest.fixture(scope="module")
def tokenizer():
    generator = random.Random(0)
    return train_tokenizer([" ".join(coined_words(generator, 200)) for _ in range(5)], 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0, "max_position_embeddings": 1024}
    return enable(tiny_model(dtype=torch.float64, **settings), CONFIG)


@pytest.fixture(scope="module")
def tasks():
    return [build_task(name, {"length": 2 * LENGTH, **values}) for name, values in SETTINGS.items()]


def run(model, tokenizer, tasks, path, names=("full", "refresh", "snapkv"), count=3, batch_size=2):
    work = make_examples(model, tokenizer, tasks, count, progress=False)
    strategies = build_strategies(list(names), CONFIG)
    return evaluate_tasks(
        model, tokenizer, work, strategies, ExampleRecords(path), BatchOptions(batch_size), progress=False
    )


def by_name(results):
    return {(result.task, result.decoding): result for result in results}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_generates_what_single_prompts_do(model, tokenizer, tasks, tmp_path):
    """Left padding, and rows that end at different tokens, change nothing."""
    alone = run(model, tokenizer, tasks, tmp_path / "alone.jsonl", batch_size=1)
    batched = run(model, tokenizer, tasks, tmp_path / "batched.jsonl", batch_size=3)
    kept = ("task", "decoding", "index", "prediction", "scores", "prompt_tokens", "new_tokens", "full_steps")
    first, second = (
        [{name: line[name] for name in kept} for line in lines(tmp_path / file)]
        for file in ("alone.jsonl", "batched.jsonl")
    )
    assert first == second
    assert len({line["prompt_tokens"] for line in first if line["task"] == "chain_of_key"}) > 1  # padding was needed
    strides = [[result.effective_strides for result in results] for results in (alone, batched)]
    assert strides[0] == strides[1]


def test_predictions_are_those_of_generate(model, tokenizer, tasks, tmp_path):
    run(model, tokenizer, tasks[:1], tmp_path / "examples.jsonl", ("full", "refresh", "never"), count=1)
    example = next(tasks[0].examples(tokenizer, 1))
    ids = torch.tensor([example.prompt_ids])
    for line in lines(tmp_path / "examples.jsonl"):
        stride = {"full": None, "refresh S=4": 4, "never refreshed": NEVER}[line["decoding"]]
        config = None if stride is None else replace(CONFIG, stride=stride)
        cache = None if config is None else RefreshCache(model.config, ids.shape[1] + 20, config)
        output = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert line["prediction"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert line["new_tokens"] == output.shape[1] - ids.shape[1]
        if cache is not None:
            full = cache.full_steps[:, 0, ids.shape[1] :].sum(-1).tolist()
            assert line["full_steps"] == {str(layer): count for layer, count in enumerate(full)}


def test_effective_strides(model, tokenizer, tasks, tmp_path):
    results = by_name(
        run(model, tokenizer, tasks[:1], tmp_path / "examples.jsonl", ("full", "refresh:3", "never", "h2o"))
    )
    written = [line for line in lines(tmp_path / "examples.jsonl") if line["decoding"] == "refresh S=3"]
    steps = [line["new_tokens"] - 1 for line in written]
    expected = sum(steps) / sum(count // 3 for count in steps)
    assert results["chain_of_key", "refresh S=3"].effective_strides == {0: expected, 1: expected}
    assert results["chain_of_key", "never refreshed"].effective_strides == {0: None, 1: None}
    assert results["chain_of_key", "full"].effective_strides is results["chain_of_key", "H2O"].effective_strides is None
    assert all(result.seconds > 0 and result.peak_memory is None for result in results.values())


def test_scores_are_means_over_examples(model, tokenizer, tasks, tmp_path, monkeypatch):
    scores = iter([1.0, 0.0, 0.5])
    monkeypatch.setattr(type(tasks[0].family), "score", lambda *_: {"score": next(scores), "other": 1.0})
    (result,) = run(model, tokenizer, tasks[:1], tmp_path / "examples.jsonl", ("full",))
    assert result.scores == {"score": 0.5, "other": 1.0} and result.examples == 3
    assert result.standard_error == pytest.approx(0.5 / 3**0.5)


def test_finished_examples_are_not_computed_again(model, tokenizer, tasks, tmp_path, monkeypatch):
    path = tmp_path / "examples.jsonl"
    whole = run(model, tokenizer, tasks, tmp_path / "whole.jsonl")
    generated, real = [], AnswerGenerator.generate

    def interrupted(*arguments):
        if len(generated) == 5:
            raise KeyboardInterrupt
        generated.append(1)
        return real(*arguments)

    monkeypatch.setattr(AnswerGenerator, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, tasks, path)
    done = path.read_text()
    path.write_text(done + '{"key": "cut sho')  # as a killed process leaves it
    generated.clear()
    generated.extend([1] * 6)
    results = run(model, tokenizer, tasks, path)
    assert len(generated) == 6 + 12 - 5 and path.read_text().startswith(done)
    assert [result.scores for result in results] == [result.scores for result in whole]
    again = run(model, tokenizer, tasks, path)
    assert len(generated) == 13 and again == results  # times included: nothing ran


def test_batches_of_several_tasks(model, tokenizer, tasks, tmp_path):
    """They have the answers of batches of one task, each no longer than its task's, and fewer batches."""
    work = make_examples(model, tokenizer, tasks, 3, progress=False)
    strategies = build_strategies(["full", "refresh", "select:2:4bit", "streaming"], CONFIG)

    def answers(name, options):
        evaluate_tasks(model, tokenizer, work, strategies, ExampleRecords(tmp_path / name), options, progress=False)
        kept = ("prediction", "scores", "prompt_tokens", "new_tokens", "full_steps")
        return {(one["task"], one["decoding"], one["index"]): [one[k] for k in kept] for one in lines(tmp_path / name)}

    alone = answers("alone.jsonl", BatchOptions(3))
    mixed = answers("mixed.jsonl", BatchOptions(6, mix_tasks=True))
    assert mixed == alone and len(mixed) == 24
    assert {one[3] for key, one in mixed.items() if key[0].startswith("niah")} == {12}  # its limit, not the chain's 20
    assert len({one["seconds"] for one in lines(tmp_path / "mixed.jsonl")}) == len(strategies)


def test_stopping_early_leaves_what_is_finished(model, tokenizer, tasks, tmp_path):
    work = make_examples(model, tokenizer, tasks, 2, progress=False)
    strategies, path = build_strategies(["full", "snapkv"], CONFIG), tmp_path / "examples.jsonl"
    ticks = iter([0, 1, 2, 9, 9, 9])
    options = BatchOptions(2, stop_after=5, clock=lambda: next(ticks))
    results = evaluate_tasks(model, tokenizer, work, strategies, ExampleRecords(path), options, progress=False)
    assert [(one.task, one.decoding) for one in results] == [("chain_of_key", "full"), ("chain_of_key", "SnapKV")]
    again = evaluate_tasks(
        model, tokenizer, work, strategies, ExampleRecords(path), BatchOptions(stop_after=0), progress=False
    )
    assert again == results and len(lines(path)) == 4  # nothing was computed
    report = build_task_report(results, tasks, strategies, "model", {"examples": 2}, "command")
    table = task_table(report).splitlines()
    assert table[1].split()[2:4] == ["-", "-"] and "- is not finished" in table[-2]
    report = build_task_report([], tasks, strategies, "model", {"examples": 2}, "command")
    assert task_table(report).splitlines()[1].split()[1:5] == ["-"] * 4


def test_what_a_prediction_depends_on_is_computed_anew(model, tokenizer, tasks, tmp_path):
    path = tmp_path / "examples.jsonl"
    run(model, tokenizer, tasks[:1], path, ("refresh",), count=2)
    assert len(lines(path)) == 2
    run(model, tokenizer, [build_task("chain_of_key", {**tasks[0].settings(), "seed": 1})], path, ("refresh",), count=2)
    assert len(lines(path)) == 4
    work = make_examples(model, tokenizer, tasks[:1], 2, progress=False)
    changed = build_strategies(["refresh"], replace(CONFIG, budget=41))
    evaluate_tasks(model, tokenizer, work, changed, ExampleRecords(path), progress=False)
    assert len(lines(path)) == 6
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight *= 2
        try:
            assert fingerprint(model) != before
            run(model, tokenizer, tasks[:1], path, ("refresh",), count=2)
        finally:
            model.lm_head.weight /= 2
    assert fingerprint(model) == before
    assert len(lines(path)) == 8


def test_a_file_of_something_else(tmp_path):
    file = tmp_path / "examples.jsonl"
    for text in (b"a thesis\nwith an end", b"[1]\n", b'{"key": 1}\n', b"\xff\n"):
        file.write_bytes(text)
        with pytest.raises(SettingsError, match="is not from an evaluation of tasks"):
            ExampleRecords(file)
        assert file.read_bytes() == text


def test_left_padding():
    ids, mask = left_padded([[5, 6], [7, 8, 9, 4]], padding=1)
    assert ids.tolist() == [[1, 1, 5, 6], [7, 8, 9, 4]] and mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_strategies_that_select():
    config = RefreshConfig(budget=7, stride=4, threshold=0.5, select_stride=3, score_bits=8, pool_ahead=True)
    made = build_strategies(["select:2:4bit", "select:2", "select", "refresh:10", "never"], config)
    steps = {item.name: (item.config.stride, item.config.select_stride, item.config.score_bits) for item in made}
    assert steps == {
        "select S=2 4 bits": (NEVER, 2, 4),
        "select S=2": (NEVER, 2, 16),
        "select S=3 8 bits": (NEVER, 3, 8),
        "refresh S=10": (10, None, 16),
        "never refreshed": (NEVER, None, 16),
    }
    assert all(item.config.pool_ahead and item.config.threshold is None for item in made)
    own = decoding.default_strategies(config, [10])[-2]
    assert own.name == "select S=3 8 bits refresh S=4 threshold 0.5" and own.config == config


def test_strategies_by_name(monkeypatch):
    config = RefreshConfig(budget=7, stride=4, threshold=0.5, sink_tokens=2)
    made = build_strategies(["full", "never", "refresh", "refresh:9", "similarity", "similarity:5:0.9"], config)
    assert {item.name: (item.settings.get("stride"), item.settings.get("threshold")) for item in made} == {
        "full": (None, None),
        "never refreshed": (NEVER, None),
        "refresh S=4": (4, None),
        "refresh S=9": (9, None),
        "refresh S=4 threshold 0.5": (4, 0.5),
        "refresh S=5 threshold 0.9": (5, 0.9),
    }
    assert all(item.settings["sink_tokens"] == 2 for item in made[1:])
    assert [item.is_full for item in made] == [True] + [False] * 5 and all(item.is_parallel for item in made)
    assert not any("score_bits" in item.settings for item in made), "earlier reports would not compare"
    model_config = tiny_model().config
    assert isinstance(made[0].build_cache(model_config, 9), FullCache)
    cache = made[3].build_cache(model_config, 9)
    assert isinstance(cache, RefreshCache) and cache.config.stride == 9 and cache.get_max_length() == 9
    for name, message in [
        (
            "h3o",
            "there is no 'h3o'; known are full, refresh, similarity, never, select, streaming, cascading, h2o, snapkv",
        ),
        ("h2o:4", "h2o:4: too many arguments; it is written h2o"),
        ("streaming:-1", "sink tokens must be at least 0"),
        ("snapkv:64:4", "pool_kernel must be odd"),
        ("snapkv:64:5:mean", "pooling must be max or average, got mean"),
        ("refresh:x", "refresh:x: STRIDE must be a whole number, got 'x'"),
        ("similarity:5:x", "similarity:5:x: THRESHOLD must be a number, got 'x'"),
        ("refresh:0", "refresh:0: stride must be"),
        ("full:3", "full:3: too many arguments; it is written full"),
        ("similarity", "no threshold is set"),
        ("select", "no select_stride is set; write select:STRIDE:BITS"),
        ("select:2:5bit", "BITS must be one of 16bit, 8bit, 4bit, got '5bit'"),
        ("select:0", "select_stride must be"),
    ]:
        with pytest.raises(SettingsError, match=message):
            build_strategies([name], RefreshConfig())
    with pytest.raises(SettingsError, match="names refresh S=4 twice"):
        build_strategies(["refresh", "refresh:4"], config)
    added = decoding.refreshing("another", config)
    monkeypatch.setitem(decoding.STRATEGIES, "another", lambda config, arguments: added)
    assert build_strategies(["another"], config) == [added]


def test_caches_that_evict_by_name():
    """The papers' settings by default, others after colons; they hold K entries and no more."""
    config = RefreshConfig(budget=7, observation_window=16, recent_window=5)
    made = build_strategies(["streaming", "streaming:1", "h2o", "snapkv", "snapkv:64:5:average"], config)
    assert {item.name: {k: v for k, v in item.settings.items() if k != "cache"} for item in made} == {
        "StreamingLLM": {"budget": 7, "sink_tokens": 4},
        "StreamingLLM with 1 sinks": {"budget": 7, "sink_tokens": 1},
        "H2O": {"budget": 7},
        "SnapKV": {
            "budget": 7,
            "observation_window": 1,
            "kernel": 7,
            "pooling": "max",
        },  # not the model's own selection
        "SnapKV window 64 kernel 5 average": {
            "budget": 7,
            "observation_window": 64,
            "kernel": 5,
            "pooling": "average",
        },
    }
    assert not any(item.is_full or item.is_parallel for item in made)
    kinds = [StreamingCache, StreamingCache, H2OCache, SnapKVCache, SnapKVCache]
    assert [type(item.build_cache(tiny_model().config, 50)) for item in made] == kinds
    with pytest.raises(SettingsError, match="budget=4 leaves no room beside 4 sink tokens"):
        build_strategies(["streaming"], replace(config, budget=4))


def test_memory_of_each_cache(model, tokenizer, tasks, tmp_path):
    """Full attention holds all tokens, RefreshKV more than that, and caches that evict their budget alone."""
    names = ("full", "refresh", "streaming", "h2o", "snapkv")
    run(model, tokenizer, tasks[:1], tmp_path / "examples.jsonl", names, count=1)
    held = {line["decoding"]: line for line in lines(tmp_path / "examples.jsonl")}
    entry = 2 * 2 * 2 * 8 * 8  # layers, keys and values, heads, their size, bytes
    full = held["full"]
    room = -(-(full["prompt_tokens"] + 20) // 128) * 128
    assert full["cache_bytes"] == entry * room + 2 * (4 + 1) * 8  # a layer's `rows` and length
    assert held["refresh S=4"]["cache_bytes"] > entry * (full["prompt_tokens"] + 20)
    for name in ("StreamingLLM", "H2O", "SnapKV"):
        assert entry * 41 <= held[name]["cache_bytes"] < 1.4 * entry * 41  # and a few numbers of each entry


# ---- launch/evaluate.py


@pytest.fixture(scope="module")
def launch():
    return load_script("evaluate").main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("model")
    plain = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=1024)
    plain.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def arguments(folder, *more):
    own = [f"tasks.{name}.{key}={value}" for name, values in SETTINGS.items() for key, value in values.items()]
    common = ["--model", folder, "--tasks", ",".join(SETTINGS), "--task-length", str(2 * LENGTH), "--device", "cpu"]
    return [*common, "--examples", "2", "--budget", "40", *more, *own]


def test_command_line(launch, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    launch(arguments(folder, "--output", "out", "--threshold", "0.5", "refresh.stride=4"))
    table = capsys.readouterr().out
    report = json.loads(Path("out/tasks.json").read_text())
    assert list(report["tasks"]) == ["chain_of_key", "niah_single_2-substitute"]
    names = ["full", "refresh S=4", "refresh S=4 threshold 0.5", "SnapKV"]
    assert list(report["strategies"]) == names and len(report["results"]) == 8
    assert all(any(line.startswith(name) for line in table.splitlines()) for name in names)
    assert "niah_single_2-substitute: generated sentences for essays" in table
    markdown = Path("out/tasks.md").read_text()
    assert "| strategy | chain_of_key | niah_single_2-substitute | mean | seconds |" in markdown
    assert "| chain_of_key, refresh S=4 | " in markdown and "layer 1" in markdown

    with pytest.raises(SettingsError, match="--resume, replace it with --overwrite"):
        launch(arguments(folder, "--output", "out"))
    before = Path("out/examples.jsonl").read_text()
    launch(arguments(folder, "--output", "out", "--resume", "--strategies", "full,refresh:4"))
    assert Path("out/examples.jsonl").read_text() == before
    assert list(json.loads(Path("out/tasks.json").read_text())["strategies"]) == ["full", "refresh S=4"]
    Path("out/notes.txt").write_text("mine")
    launch(arguments(folder, "--output", "out", "--overwrite", "--strategies", "full"))
    assert len(Path("out/examples.jsonl").read_text().splitlines()) == 4
    assert Path("out/notes.txt").read_text() == "mine"


def test_a_grid_of_strategies(launch, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    part = '{selections: [mine], strategies: ["refresh:4"], budgets: [0.25]}'
    Path("grid.yaml").write_text(f"selections: {{mine: {{pool_kernel: 3}}}}\nparts: [{part}]")
    own = [text for text in arguments(folder, "--examples", "1") if text not in ("--budget", "40")]
    launch([*own, "--output", "out", "--grid", "grid.yaml", "--mix-tasks", "--no-compile", "--batch-size", "2"])
    report = json.loads(Path("out/tasks.json").read_text())
    assert list(report["strategies"]) == ["full", "mine: refresh S=4, K=0.25"] and len(report["results"]) == 4
    assert report["strategies"]["mine: refresh S=4, K=0.25"]["pool_kernel"] == 3
    assert report["settings"]["compiled"].startswith("no") and "several tasks" in report["settings"]["batches"]
    capsys.readouterr()
    launch([*own, "--output", "out", "--grid", "grid.yaml", "--resume", "--stop-after", "0"])
    assert "not finished" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--grid", "tasks"], "--grid has strategies, budgets"),
        (["--stop-after", "-1"], "--stop-after must be at least 0"),
        (["--rows", "5"], "--rows means nothing with --tasks"),
        (["--compare", "x"], "--compare means nothing with --tasks"),
        (["--strides", "5"], "--strides means nothing with --tasks"),
        (["--resume", "--overwrite"], "choose one"),
        (["--task-length", "5"], "leaves no prompt"),
        (["--task-length", "5000"], "max_position_embeddings=1024: lower it"),
        (["--examples", "0"], "--examples must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--strategies", "h3o"], "--strategies: there is no 'h3o'"),
        (["--tasks", "chain_of_key,niah_single_2,vtt"], "there is no task vtt; did you mean vt"),
        (["tasks.vt.hops=2"], "tasks.vt has settings but is not among the tasks"),
        (["tasks.chain_of_key.key=2"], "tasks.chain_of_key: unknown setting key; did you mean keys"),
        (["refresh.strid=5"], "unknown setting refresh.strid"),
    ],
)
def test_command_line_refuses(launch, folder, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message):
        launch(arguments(folder, *more))
    assert not list(tmp_path.rglob("*.json*"))


def test_options_of_tasks_need_tasks(launch, folder, capsys):
    for more, message in [
        (["--examples", "5"], "--examples means nothing with --data"),
        (["--without", "x"], "--without means nothing with --data"),
        (["tasks.vt.hops=2"], "tasks.NAME.key=value means nothing with --data"),
    ]:
        with pytest.raises(SettingsError, match=message):
            launch(["--model", folder, "--data", "rows", *more])
    with pytest.raises(SystemExit):
        launch(["--model", folder])
    assert "one of the arguments --data --tasks --suite is required" in capsys.readouterr().err
