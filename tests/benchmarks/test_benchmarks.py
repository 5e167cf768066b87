"""The benchmark of decoding: its caches are filled as a prompt would fill them, and it runs to the table."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from refreshkv import SettingsError
from tests.helpers.jobs import VOCABULARY, make_rows
from tests.helpers.models import tiny_enabled, tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = "--layers 2 --hidden 128 --intermediate 256 --heads 4 --kv-heads 2 --vocabulary 512".split()

SELECTION = {"budget": 0.25, "stride": 3, "observation_window": 2, "pool_kernel": 7, "recommended": False}
"""Arguments of benchmarks/decode.py."""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import decode

    yield decode
    for name in ("decode", "kernel_times"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    "strategy",
    [
        "full",
        "refresh",
        "similarity",
        "select:2:4bit",
        "offloaded",
        "offloaded-select:2:8bit",
        "streaming",
        "h2o",
        "snapkv",
        "static",
        "dynamic",
    ],
)
@pytest.mark.parametrize("context", [96, 40])
def test_a_filled_cache_decodes(script, strategy, context):
    model = tiny_enabled()
    args = argparse.Namespace(**SELECTION)
    model.set_attn_implementation("refreshkv" if script.is_ours(strategy) else "sdpa")
    cache = script.make_cache(model, strategy, context + 9, context // 4, args)
    length = script.fill(cache, model, 2, context, context // 4)
    assert length == (context // 4 if strategy in ("streaming", "h2o", "snapkv") else context)
    assert int(cache.get_seq_length()) == length
    with torch.no_grad():
        for step in range(4):
            ids = torch.full((2, 1), step)
            model(ids, past_key_values=cache, position_ids=torch.full((2, 1), length + step))
    assert int(cache.get_seq_length()) == length + 4


@torch.no_grad()
def test_the_softmax_is_timed_with_terms(script):
    """Each of them changes the logits of prompt and step, and is gone afterwards."""
    model, ids = tiny_enabled(), torch.arange(3, 15).unsqueeze(0)
    assert script.timed_terms(argparse.Namespace(terms=True)) == ("", "+sinks", "+softcap")
    logits = []
    for terms in ("", "+sinks", "+softcap", ""):
        script.SOFTCAP = 1.0
        with script.added_terms(model, terms):
            cache = script.FullCache(model.config, 20)
            model(ids, past_key_values=cache)
            logits.append(model(ids[:, :1], past_key_values=cache).logits)
    plain, sinks, softcap, again = logits
    assert torch.equal(plain, again)
    assert all((found - plain).abs().max() > 1e-3 for found in (sinks, softcap))


@torch.no_grad()
def test_queries_are_made_alike(script):
    model = tiny_enabled()
    project = model.model.layers[0].self_attn.q_proj
    hidden = torch.randn(1, 50, project.in_features, dtype=project.weight.dtype)
    plain, likeness = project(hidden), []
    for share in (0.0, 0.9, 1.0):
        with script.alike_queries(model, share):
            query = project(hidden)
        assert 0.5 < query.std() / plain.std() < 2
        mean = query.mean(dim=1)
        likeness.append((mean.square().sum() / query.square().sum(dim=-1).mean()).item())
    assert likeness[0] < 0.1 < 0.8 < likeness[1] < 0.99 < likeness[2]
    assert torch.equal(project(hidden), plain)


@pytest.mark.parametrize("strategy", ["static", "snapkv", "offloaded-select:2:4bit"])
def test_strategies_without_terms_are_not_timed_with_them(script, strategy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode.py", "--terms", "--strategies", f"full,select:2:4bit,{strategy}"])
    with pytest.raises(SystemExit):
        script.read_arguments()
    assert f"--terms: {strategy} takes no sinks" in capsys.readouterr().err


def test_lossless_decoding_is_timed_at_the_acceptance_that_is_asked_for(script):
    model, args = tiny_enabled(), argparse.Namespace(**SELECTION)
    cache = script.make_cache(model, "lossless:2:4bit", 300, 24, args)
    length = script.fill(cache, model, 2, 96, 24)
    ids, seconds, counts = script.run_lossless(model, cache, 2, length, 60, 0.8)
    assert seconds > 0 and counts.tokens == 60
    assert abs(counts.acceptance - 0.8) < 0.15 and 2 < counts.tokens_per_round < 6
    with (times := script.RoundTimes()).taken():
        script.run_lossless(model, cache, 2, length, 20, 0.8, ids)
    assert set(times.medians()) == {f"{part}, ms" for part in ("draft", "block", "accept", "queue_step", "round")}


def test_kernels_are_recorded_after_the_timed_steps(script, monkeypatch):
    calls, mark = [], torch.ones(())

    class Event:
        def __init__(self, enable_timing):
            calls.append("mark")

        def record(self):
            self.number = calls.count("mark")

        def elapsed_time(self, later):
            return later.number - self.number

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        script,
        "KernelTimes",
        lambda: SimpleNamespace(start=lambda: calls.append("start"), stop=lambda: calls.append("stop")),
    )
    clock = script.Clock(steps=3, recorded=2)
    for _ in range(clock.marks):
        clock(mark, mark)
    assert calls == ["mark"] * 4 + ["start"] + ["mark"] * 2 + ["stop"]
    assert clock.times() == [1, 1]
    assert script.Clock(steps=3).marks == 3


def test_times_of_kernels(script, monkeypatch):
    """Runs that overlap leave no pause; the kernels beyond the longest are one line."""
    kernel_times = sys.modules["kernel_times"]
    runs = [("copy", 10.0, 14.0), ("sum", 0.0, 4.0), ("sum", 13.0, 20.0), ("mean", 11.0, 12.0)]

    def table():
        return [line.split() for line in kernel_times.kernel_table(runs, 2).splitlines()[1:]]

    longest = ["sum", "1.0", "5.5"]
    assert table()[:3] == [longest, ["copy", "0.5", "2.0"], ["mean", "0.5", "0.5"]]
    monkeypatch.setattr(kernel_times, "MOST_KERNELS", 1)
    short, longer = ["short", "pauses"], ["longer", "pauses"]
    assert table() == [longest, ["others", "1.0", "2.5"], [*short, "0.5", "3.0"], [*longer, "0.0", "0.0"]]
    runs.append(("late", 60.0, 61.0))
    assert table()[2:] == [[*short, "0.5", "3.0"], [*longer, "0.5", "20.0"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("strategies", "options"),
    [
        ("full,refresh,lossless:2:4bit,offloaded,snapkv,static,dynamic", []),
        ("full,refresh,similarity,select:2:4bit,lossless:2:4bit,h2o", ["--loop", "graph"]),
        ("full,refresh,select:2:4bit", ["--terms"]),
        ("full,select:2:4bit", ["--kernels"]),
    ],
)
def test_it_runs_to_the_table(tmp_path, strategies, options):
    command = [sys.executable, str(BENCHMARKS / "decode.py"), *SHAPE, "--cases", "512:2", "--cycles", "1", *options]
    command += ["--strategies", strategies, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "decode.json").read_text())
    terms = ("", "+sinks", "+softcap") if "--terms" in options else ("",)
    assert [result["strategy"] for result in results] == [s + t for s in strategies.split(",") for t in terms]
    assert all(result["ms"] > 0 for result in results) and (tmp_path / "decode.png").exists()


def test_the_acceptance_of_a_model_on_its_texts(tmp_path, monkeypatch, capsys):
    rows = make_rows(tmp_path)
    tiny_model(vocab_size=VOCABULARY).save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import acceptance

    options = "--split validation --rows 3 --batch-size 2 --prompt 30 --new 12 --budget 28 --dtype float32".split()
    folders = ["--model", str(tmp_path / "model"), "--data", str(rows), "--output", str(tmp_path)]
    for drawn in ([], ["--sample"]):
        monkeypatch.setattr(sys, "argv", ["acceptance.py", *options, *folders, *drawn])
        acceptance.main()
        result = json.loads((tmp_path / "acceptance.json").read_text())["results"][0]
        assert result["tokens"] == 24 and 0 < result["accepted"] <= result["judged"] <= result["steps"] * 3
        assert f"{result['acceptance']:.1%}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["acceptance.py", *options, *folders, "--prompt", "9999"])
    with pytest.raises(SettingsError, match="--prompt=9999: the sequences of .* ask for fewer"):
        acceptance.main()


def test_more_streams_are_timed_beside_the_first(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import streams

    lines = streams.table([(2, 1.4, 1.41), (7, 1.7, 1.71)], kernels=300).splitlines()
    assert lines[1].split() == ["2", "1.400", "1.410", "0.00"] and lines[2].split() == ["7", "1.700", "1.710", "1.00"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_are_used_one_after_another():
    command = [sys.executable, str(BENCHMARKS / "streams.py"), "--streams", "3", "--kernels", "30"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in printed[-3:]] == ["2", "3", "4"]


def compared_choices(name, tmp_path, monkeypatch):
    """A benchmark that compares choices on a model, and what it measured: a tiny model, two short sequences."""
    rows = make_rows(tmp_path)
    tiny_model(vocab_size=VOCABULARY).save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    options = "--split validation --rows 2 --tokens 12 --budget 8".split()
    folders = ["--model", str(tmp_path / "model"), "--data", str(rows), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, *folders])
    benchmark = importlib.import_module(name)
    benchmark.main()
    return benchmark, json.loads((tmp_path / f"{name}.json").read_text())["results"][0]


def test_how_far_thresholds_move(tmp_path, monkeypatch, capsys):
    """Wider brackets hold more; where all keys are equal, any holds all."""
    thresholds, result = compared_choices("thresholds", tmp_path, monkeypatch)
    for kind in ("found", "positions"):
        shares = [result[f"{kind} {width:g}"] for width in thresholds.WIDTHS]
        assert shares == sorted(shares) and 0 < shares[0] and shares[-1] <= 1
    assert f"{result['found 0.5']:.1%}" in capsys.readouterr().out
    same = thresholds.compare_thresholds(torch.randn(1, 4, 12, 8), torch.ones(1, 2, 40, 8), 0.3, apart=2, budget=8)
    assert same.tolist() == [1.0] * 8


def test_what_rounding_changes(tmp_path, monkeypatch, capsys):
    """It changes few choices; coarser numbers would change more."""
    rounding, result = compared_choices("rounding", tmp_path, monkeypatch)
    assert set(result) == {"data", *rounding.COLUMNS} and f"{result['4 bits']:.3%}" in capsys.readouterr().out
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 700, 32, generator=generator) for heads in (6, 2))
    queries, logits, bits = rounding.differing(query[:, :, -40:], key, 0.4, budget=90).tolist()
    assert queries <= logits < 0.005 < bits < 0.5
    query = torch.tensor([3.0, -1.0, 2**-13 + 2**-15]).bfloat16().float()
    assert rounding.rounded_queries(query).tolist() == [3.0, -1.0, 2**-13]


def test_requests_of_clients_are_timed_and_compared(tmp_path, monkeypatch, capsys):
    """Ours come first, and the file holds each line as soon as it is measured."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve

    saved, save, models, make = [], serve.save, [], serve.random_llama
    monkeypatch.setattr(serve, "random_llama", lambda *arguments: models.append(make(*arguments)) or models[-1])

    def noted(folder, name, results):
        save(folder, name, results)
        saved.append([(load["generate"], load["clients"]) for load in json.loads((folder / name).read_text())])
        by_ours = models[0].config._attn_implementation == "refreshkv"
        assert by_ours == (results[-1]["generate"] == "refreshkv"), "each decodes with its own attention"

    monkeypatch.setattr(serve, "save", noted)
    options = "--longest 60 --new 4 --requests 2 --concurrency 1,2 --dtype float32 --device cpu --compare --recommended"
    monkeypatch.setattr(sys, "argv", ["serve.py", *SHAPE, *options.split(), "--output", str(tmp_path)])
    serve.main()
    order = [("refreshkv", 1), ("refreshkv", 2), ("own", 1), ("own", 2)]
    assert saved == [order[: number + 1] for number in range(4)]
    assert all(load["equal"] == 2 for load in json.loads((tmp_path / "serve.json").read_text()))
    assert capsys.readouterr().out.count("2 of 2") == 4
    monkeypatch.setattr(sys, "argv", ["serve.py", "--compare", "--concurrency", "4"])
    with pytest.raises(SystemExit):
        serve.main()
