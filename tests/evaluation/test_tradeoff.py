"""The sweep of a grid: which strategies it has, what they read, what it recommends, and a run of the command."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from refreshkv import NEVER, RefreshConfig, Simulation
from refreshkv.evaluation.commands import _changed_values
from refreshkv.evaluation.costs import share_computed, share_read, step_rate
from refreshkv.evaluation.perplexity.evaluation import evaluate
from refreshkv.evaluation.perplexity.losses import SequenceRecords
from refreshkv.evaluation.perplexity.report import build_report, markdown_table, protocol
from refreshkv.evaluation.perplexity.results import Evaluation, Result
from refreshkv.evaluation.strategies import build_strategies
from refreshkv.evaluation.sweep.grid import Grid
from refreshkv.evaluation.sweep.tradeoff import Tradeoff, measure_tradeoff
from refreshkv.settings import SettingsError, find_config, load_settings
from tests.evaluation.test_sweep import launch, place  # noqa: F401  # fixtures
from tests.helpers.models import random_ids, tiny_enabled

LENGTH, LAST = 40, 24
CONFIG = RefreshConfig(budget=6, pool_kernel=1)


def as_rows(count, seed=0):
    return Dataset.from_dict({"input_ids": random_ids(count, LENGTH, seed).tolist()}).with_format("torch")


def test_the_table_of_a_perplexity_has_what_strategies_read():
    model, rows = tiny_enabled(CONFIG), as_rows(2)
    strategies = build_strategies(["full", "refresh:4", "select:2:4bit"], CONFIG)
    evaluation = evaluate(model, rows, strategies, LAST, progress=False)
    measured = protocol("abc", "test", 2, LENGTH, LAST, strategies)
    report = build_report(evaluation, measured, "tiny", {}, "evaluate")
    heading, _, full, fixed, selecting = [line.split(" | ") for line in markdown_table(report).splitlines()]
    assert heading[-4:] == ["effective stride", "effective select stride", "bytes read", "greedy agreement |"]
    assert full[-4:] == ["-", "-", "100.0%", "- |"]
    agreements = [f"{result.agreement:.1%} |" for result in evaluation.results[1:]]
    small = 6 / (LENGTH - LAST + (LAST + 1) / 2)
    assert fixed[-4:] == ["4.0", "-", f"{1 / 4 + 3 / 4 * small:.1%}", agreements[0]]
    assert selecting[-4:] == ["-", "2.0", f"{small + 1 / 16:.1%}", agreements[1]]
    alone = evaluate(model, rows, strategies[:2], LAST, progress=False)
    text = markdown_table(build_report(alone, measured, "tiny", {}, "evaluate"))
    assert "| effective stride | bytes read | greedy agreement |" in text


# ---- bytes and operations


@pytest.mark.parametrize(
    ("full", "selecting", "bits", "expected"),
    [
        (1 / 10, 0, 16, 0.2125),
        (0, 1 / 3, 4, 0.125 + 0.125 / 3),
        (0, 1 / 2, 4, 0.1875),
        (0, 1 / 5, 16, 0.225),
        (0, 1 / 2, 8, 0.25),
        (1, 0, 16, 1.0),
        (0, 0, 16, 0.125),
    ],
)
def test_bytes_are_those_of_the_specification(full, selecting, bits, expected):
    assert share_read(8000, 1000, full, selecting, bits) == pytest.approx(expected)


def test_operations_count_scores_as_half():
    assert share_computed(8000, 1000) == pytest.approx(0.125)
    assert share_computed(8000, 1000, selecting=0.5) == pytest.approx(0.125 + 0.25)
    assert share_computed(8000, 1000, selecting=0.5, observation_window=4) == pytest.approx(0.125 + 1.0)
    assert share_computed(8000, 1000, full=0.1) == pytest.approx(0.1 + 0.9 * 0.125)
    assert share_computed(8000, 1000, full=0.1, observation_window=3) == pytest.approx(0.2 + 0.9 * 0.125)
    assert share_read(100, 1000) == share_computed(100, 1000) == 1  # a cache that holds all


def test_rates_are_means_over_layers():
    assert step_rate([2, 4, None]) == pytest.approx((1 / 2 + 1 / 4) / 3)
    assert step_rate([]) == 0


@pytest.mark.parametrize("name", ["select:3:4bit", "select:1:8bit", "similarity:4:0.3"])
def test_steps_and_agreement_of_one_pass_are_those_of_decoding(name):
    model, rows = tiny_enabled(CONFIG), as_rows(2)
    strategies = build_strategies(["full", name], CONFIG)
    full, fast = evaluate(model, rows, strategies, LAST, progress=False).results
    _, slow = evaluate(model, rows, strategies, LAST, batch_size=2, progress=False, stepwise=True).results
    assert (full.agreement, full.share_read, full.share_computed) == (1.0, 1.0, 1.0)
    for field in ("effective_strides", "selecting_strides", "share_read", "share_computed"):
        assert getattr(fast, field) == getattr(slow, field)
    assert fast.agreement == pytest.approx(slow.agreement) and 0 < fast.agreement < 1
    config, context = strategies[1].config, LENGTH - LAST + (LAST + 1) / 2
    if config.select_stride:
        steps = LAST // config.select_stride
        assert fast.selecting_stride == pytest.approx(LAST / steps) and fast.effective_stride is None
        assert fast.share_read == pytest.approx(share_read(context, 6, 0, steps / LAST, config.score_bits))
    else:
        assert fast.selecting_stride is None and fast.selecting_strides == {}
        assert fast.share_read == pytest.approx(share_read(context, 6, 1 / fast.effective_stride))


def test_agreement_is_the_share_of_equal_tokens():
    model, rows = tiny_enabled(CONFIG), as_rows(2)
    result = evaluate(model, rows, build_strategies(["full", "never"], CONFIG), LAST, progress=False).results[1]
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        plain = model(ids).logits.argmax(-1)
        config = dataclasses.replace(CONFIG, stride=NEVER)
        small = model(ids, use_cache=False, simulation=Simulation(LENGTH - LAST, config)).logits.argmax(-1)
    same = (plain == small)[:, LENGTH - LAST - 1 : -1]
    assert result.agreement == pytest.approx(same.double().mean().item()) and same.shape == (2, LAST)
    (alone,) = evaluate(model, rows, build_strategies(["never"], CONFIG), LAST, progress=False).results
    assert alone.agreement is None


def test_records_of_an_earlier_version_have_no_agreement(tmp_path):
    model, rows, path = tiny_enabled(CONFIG), as_rows(2), tmp_path / "rows.jsonl"
    strategies = build_strategies(["full", "select:2:4bit"], CONFIG)
    evaluate(model, rows, strategies, LAST, progress=False, records=SequenceRecords(path))
    resumed = evaluate(model, rows, strategies, LAST, progress=False, records=SequenceRecords(path))
    assert resumed.results[1].selecting_stride == 2 and resumed.results[1].agreement is not None
    assert len(resumed.hardware) == 1
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for record in old:
        for name in ("greedy", "selecting_steps", "hardware", "checksum"):
            del record[name]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    before = evaluate(model, rows, strategies, LAST, progress=False, records=SequenceRecords(path))
    assert before.results[1].losses == resumed.results[1].losses
    assert before.results[1].agreement is None and before.hardware == []
    read = Evaluation.from_dict(json.loads(json.dumps(resumed.to_dict())))
    assert read == resumed


# ---- grids


def test_the_strategies_of_a_grid():
    parts = [
        {"selections": ["paper", "wide"], "strategies": ["refresh:4"], "budgets": [6, 0.5]},
        {"strategies": ["streaming:2"], "budgets": [6]},
        {"selections": ["wide"], "strategies": ["select:2:4bit", "refresh:4"], "budgets": [6]},
    ]
    built = Grid({"paper": {}, "wide": {"pool_kernel": 9}}, parts).build_strategies()
    assert [item.name for item in built] == [
        "full",
        *("paper: refresh S=4, K=6", "paper: refresh S=4, K=0.5"),
        *("wide: refresh S=4, K=6", "wide: refresh S=4, K=0.5"),
        "StreamingLLM with 2 sinks, K=6",
        "wide: select S=2 4 bits, K=6",
    ]
    assert [item.config and item.config.pool_kernel for item in built] == [None, 7, 7, 9, 9, None, 9]
    assert built[-1].config.select_stride == 2 and built[2].config.budget == 0.5


@pytest.mark.parametrize(
    ("selections", "part", "message"),
    [
        ({"a": {"kernel": 3}}, {}, "unknown setting selections.a.kernel"),
        ({"a": "best"}, {}, "selections.a: there is no preset 'best'; known are paper, recommended"),
        ({}, {"selections": ["a"]}, r"parts\[0\].selections: there is no a"),
        ({"a": {}}, {"strategies": ["select:x"]}, "STRIDE must be a whole number"),
        ({"a": {}}, {"budget": 3}, r"unknown setting parts\[0\].budget; did you mean parts\[0\].budgets"),
    ],
)
def test_bad_grids_are_refused_by_name(selections, part, message):
    values = {"selections": ["a"], "strategies": ["refresh:4"], "budgets": [6], **part}
    with pytest.raises(SettingsError, match=message):
        Grid(selections, [values]).build_strategies()


@pytest.mark.parametrize(
    ("name", "budget"), [("selections", 1024), ("recommend", 0.125), ("tasks", 0.125), ("generation", 256)]
)
def test_our_own_grids_have_the_recommended_settings(name, budget):
    built = load_settings(Grid, find_config(name, ("grids",))).build_strategies()
    assert built[0].is_full and RefreshConfig.recommended(budget=budget) in [item.config for item in built]
    assert name not in ("selections", "recommend") or len(built) > 20


def test_the_comparison_of_selections_is_whole():
    """Select strides by bits, observers, pooling ahead, budgets, thresholds and the caches that evict."""
    built = load_settings(Grid, find_config("selections", ("grids",))).build_strategies()
    configs = [item.config for item in built]
    names = {item.name for item in built}

    def ahead(select_stride=2, score_bits=4, **changes):
        own = {"pool_kernel": 10, "observation_window": 4, "recent_window": 192, "budget": 1024, **changes}
        return RefreshConfig.recommended(select_stride=select_stride, score_bits=score_bits, **own)

    for stride in (1, 2, 3, 5, 10):
        assert all(ahead(stride, bits) in configs for bits in (16, 8, 4))
        assert RefreshConfig.recommended(budget=1024, select_stride=stride) in configs
    assert all(ahead(observation_window=observers) in configs for observers in (1, 2, 4, 8, 16))
    for pool in ({}, {"pool_ahead": True, "pool_kernel": 10}):
        assert RefreshConfig(budget=1024, stride=10, **pool) in configs
    thresholds = {config.threshold for config in configs if config} - {None}
    assert len(thresholds) >= 4 and {0.5, 0.85, 0.95} <= thresholds
    for budget in (256, 512, 1024, 2048):
        assert RefreshConfig(budget=budget, stride=10) in configs and ahead(budget=budget) in configs
        assert all(RefreshConfig.recommended(budget=budget, select_stride=stride) in configs for stride in (1, 2))
        evicting = {name for name in names if name.endswith(f", K={budget}") and ":" not in name}
        assert len(evicting) == 4, "StreamingLLM, H2O, SnapKV as in the paper and as its authors have it"


def test_budgets_of_equal_bytes_read_what_the_papers_selection_reads():
    built = [item.config for item in load_settings(Grid, find_config("limits", ("grids",))).build_strategies()]
    equal = [config.budget for config in built if config and (config.select_stride, config.score_bits) == (2, 4)]
    context = 8192 - 512 / 2
    scales = 0.5 * 4 / (2 * 64 * 2)  # a float32 beside a key and a value of 64 numbers of 16 bits
    for number, paper in enumerate((512, 256, 1024)):
        theirs = share_read(context, paper, full=0.1)
        assert theirs - 0.002 < share_read(context, equal[number], selecting=0.5, score_bits=4) <= theirs
        with_scales = share_read(context, equal[number + 3], selecting=0.5, score_bits=4) + scales
        assert theirs - 0.002 < with_scales <= theirs


def test_the_grid_of_small_budgets():
    """The recommended settings by the width that pool_kernel=None stands for; small budgets keep few recent tokens."""
    built = {
        item.name: item.config for item in load_settings(Grid, find_config("budgets", ("grids",))).build_strategies()
    }
    recommended = RefreshConfig.recommended(budget=256)
    own = built["own query: select S=1 4 bits, K=256"]
    assert own.step_options()._replace(selection=own.selection_options()._replace(pool_ahead=True)) == (
        recommended.step_options()
    )
    assert (own.stride, own.score_bits) == (recommended.stride, recommended.score_bits)
    assert built["ahead, 48 recent: select S=2 4 bits, K=256"].recent_window == 48
    assert built["paper: refresh S=10, K=256"] == RefreshConfig(budget=256)


# ---- the recommendation


def made_up(losses):
    """Two texts' evaluation of full attention and of strategies: name -> share of bytes, loss over full on each."""
    full = Result("full", None, None, [1.0], 0.1, {}, share_read=1.0)
    evaluations = {}
    for number, text in enumerate(("code", "prose")):
        results = [full]
        for name, (read, *over) in losses.items():
            config = None if name == "H2O" else RefreshConfig(budget=6, stride=NEVER, select_stride=2)
            loss = 1 + math.log1p(over[number])
            results.append(Result(name, config, 6, [loss], 0.1, {}, share_read=read))
        evaluations[text] = Evaluation(results, 2, LENGTH, LAST)
    return evaluations


def test_the_fewest_bytes_within_the_loss_on_every_text():
    losses = {"a": (0.3, 0.0, 0.001), "b": (0.2, 0.004, 0.009), "c": (0.1, 0.001, 0.02), "H2O": (0.05, 0.0, 0.0)}
    tradeoff = Tradeoff(made_up(losses), within=0.01)
    point, text = tradeoff.recommend()
    assert point.name == "b" and point.loss == pytest.approx(0.009) and point.read == pytest.approx(0.2)
    assert text.startswith("recommended: stride never, select_stride 2, score_bits 16, K 6 (b; reads 20.0% of")
    assert text.endswith("code +0.40%, prose +0.90%): the fewest bytes within 1.00% on every text")
    assert Tradeoff(tradeoff.evaluations, within=0.021).recommend()[0].name == "c"
    point, text = Tradeoff(tradeoff.evaluations, within=0.0005).recommend()
    assert point is None and "the nearest, a, loses 0.10%" in text and "--within" in text


def test_equal_bytes_take_the_smaller_loss():
    losses = {"a": (0.2, 0.005, 0.006), "b": (0.2, 0.001, 0.002), "c": (0.2, 0.003, 0.003)}
    assert Tradeoff(made_up(losses), within=0.01).recommend()[0].name == "b"


def test_the_error_is_that_of_the_differences():
    full = Result("full", None, None, [2.0], 0.1, {}, row_losses=[1.0, 2.0, 3.0], share_read=1.0)
    small = Result("H2O", None, 6, [2.1], 0.1, {}, row_losses=[1.1, 2.3, 2.9], share_read=0.1)
    (point,) = Tradeoff({"code": Evaluation([full, small], 3, LENGTH, LAST)}, within=0.1).points
    spread = (sum((x - 0.1) ** 2 for x in (0.1, 0.3, -0.1)) / 2) ** 0.5
    assert point.errors == {"code": pytest.approx(math.exp(0.1) * spread / 3**0.5)}


def test_a_stopped_sweep_has_what_is_finished(tmp_path):
    model, texts = tiny_enabled(CONFIG), {"a": as_rows(2), "b": as_rows(2, seed=1)}
    strategies = build_strategies(["full", "refresh:4", "select:2:4bit", "never"], CONFIG)
    records = SequenceRecords(tmp_path / "rows.jsonl")
    ticks = iter([0.0, 1.0, 2.0, 11.0, 12.0])  # the beginning, then once for each strategy
    first = measure_tradeoff(model, texts, strategies, LAST, 0.01, records, stop_after=10, clock=lambda: next(ticks))
    assert [point.name for point in first.points] == ["refresh S=4"]
    assert first.left_out == ["select S=2 4 bits", "never refreshed"]
    for rows in texts.values():
        evaluate(model, rows, [strategies[3]], LAST, progress=False, records=records)
    written = (tmp_path / "rows.jsonl").read_text()
    again = measure_tradeoff(model, texts, strategies, LAST, 0.01, records, stop_after=0)
    assert [point.name for point in again.points] == ["refresh S=4", "never refreshed"]
    assert again.left_out == ["select S=2 4 bits"] and (tmp_path / "rows.jsonl").read_text() == written
    whole = measure_tradeoff(model, texts, strategies, LAST, 0.01, records)
    assert [point.name for point in whole.points] == [item.name for item in strategies[1:]] and not whole.left_out


# ---- the command


def test_a_preset_changes_all_settings_of_a_suite():
    options = argparse.Namespace(budget="0.5", threshold=None, overrides=["refresh=recommended", "tasks.vt.x=1"])
    assert _changed_values(options) == RefreshConfig.recommended(budget=0.5).to_dict()
    options.overrides = ["refresh.select_stride=3"]
    assert _changed_values(options) == {"budget": 0.5, "select_stride": 3}


GRID = """
selections: {own: {pool_kernel: 3}, best: {preset: recommended, recent_window: 2}}
parts:
  - {selections: [own, best], strategies: ["refresh:4", "select:2:4bit"], budgets: [8]}
  - {strategies: [streaming], budgets: [8]}
"""


def test_command_line(launch, place, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)
    Path("other").symlink_to(place / "rows")
    common = ["--model", str(place / "model"), "--data", str(place / "rows"), "--device", "cpu", "--output", "out"]
    common += ["--last-tokens", "30", "--rows", "2", "--batch-size", "2"]
    grid = ["--grid", "grid.yaml", "--data", "other"]
    launch([*common, *grid, "--within", "9"])
    printed, report = capsys.readouterr().out, json.loads(Path("out/tradeoff.json").read_text())
    assert printed.splitlines()[-2] == report["recommendation"]["text"] and "recommended: stride" in printed
    assert [point["name"] for point in report["points"]] == [
        "own: refresh S=4, K=8",
        "own: select S=2 4 bits, K=8",
        "best: refresh S=4, K=8",
        "best: select S=2 4 bits, K=8",
        "StreamingLLM, K=8",
    ]
    assert list(report["points"][0]["losses"]) == ["rows", "other"] == list(report["fingerprints"])
    assert len(set(report["fingerprints"].values())) == 1, "of the sequences, which are the same"
    chosen = RefreshConfig.from_dict(report["recommendation"]["refresh"])
    assert chosen.budget == 8 and min(p["read"] for p in report["points"] if p["config"]) < 0.25
    assert Path("out/tradeoff.png").read_bytes().startswith(b"\x89PNG")
    text = Path("out/tradeoff.md").read_text()
    assert "| own: select S=2 4 bits, K=8 |" in text and "![Loss against bytes read](tradeoff.png)" in text

    before = Path("out/rows.jsonl").read_text()
    launch([*common, *grid, "--within", "8", "--resume", "--stop-after", "0"])
    assert Path("out/rows.jsonl").read_text() == before
    again = json.loads(Path("out/tradeoff.json").read_text())
    assert (again["within"], again["points"], again["left out"]) == (8, report["points"], [])
    for more, message in [
        (grid, "already holds tradeoff.json: continue that with --resume"),
        ([*grid, "--thresholds", "0.5"], "--thresholds means nothing with --grid"),
        ([*grid, "--budget", "8"], "--budget means nothing with --grid"),
        ([*grid, "refresh.stride=4"], "refresh.key=value means nothing with --grid"),
        (["--within", "0"], "--within means nothing without --grid"),
        (["--data", "other"], "--data: only --grid takes several folders"),
        ([*grid, "--within", "-1"], "--within must be .*; it is a share of full attention's perplexity"),
        ([*grid, "--data", str(tmp_path / "other")], "--data names two folders alike"),
        (["--grid", "nothing"], "there is no file nothing, and no config of that name"),
    ]:
        with pytest.raises(SettingsError, match=message):
            launch([*common, *more])
