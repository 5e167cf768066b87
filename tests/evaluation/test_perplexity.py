"""Evaluation: the losses are transformers' and the decoder's own, and reports say what was measured."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from refreshkv import NEVER, RefreshConfig, Simulation
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.evaluation.perplexity import losses as losses_module
from refreshkv.evaluation.perplexity.evaluation import budget_warnings, evaluate
from refreshkv.evaluation.perplexity.losses import SequenceRecords, sequence_losses
from refreshkv.evaluation.perplexity.report import (
    FILES,
    NAMES,
    build_report,
    check_comparable,
    load_report,
    markdown_table,
    protocol,
    text_table,
    write_report,
)
from refreshkv.evaluation.perplexity.results import Evaluation, Result, gap_closed
from refreshkv.evaluation.reports import open_output
from refreshkv.evaluation.strategies import build_strategies, default_strategies, full_attention, refreshing
from refreshkv.settings import SettingsError
from tests.helpers.models import VOCABULARY, decode_logits, random_ids, tiny_enabled, tiny_model
from tests.helpers.rows import save_rows
from tests.helpers.scripts import load_script

LENGTH, LAST = 60, 40
CONFIG = RefreshConfig(budget=6, stride=10)


def as_rows(ids):
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def made_up(perplexities, names=("full", "refresh S=10", "never refreshed")):
    configs = [None, CONFIG, dataclasses.replace(CONFIG, stride=NEVER)]
    results = [
        Result(name, config, config and 6, [math.log(value)] * 40, 0.1, {} if config is None else {0: 10.0, 1: None})
        for name, config, value in zip(names, configs, perplexities, strict=True)
    ]
    return Evaluation(results, rows=3, row_length=60, last_tokens=40)


# ---- losses ----


def test_full_attention_gives_the_loss_of_transformers():
    model, ids = tiny_model(dtype=torch.float32), random_ids(3, LENGTH)
    with torch.no_grad():
        losses, expected = sequence_losses(model, ids), model(ids, labels=ids).loss
    assert losses.shape == (3, LENGTH - 1) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), expected)


def test_last_losses_and_chunks_are_the_same_losses(monkeypatch):
    model, ids, simulation = tiny_enabled(CONFIG), random_ids(2, LENGTH), Simulation(20, CONFIG)
    with torch.no_grad():
        losses = sequence_losses(model, ids, simulation)
        monkeypatch.setattr(losses_module, "LOGITS_AT_ONCE", 7 * 2 * VOCABULARY)
        torch.testing.assert_close(sequence_losses(model, ids, simulation, last=LAST), losses[:, -LAST:])


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_perplexity_is_that_of_decoding_one_by_one(threshold):
    config = dataclasses.replace(CONFIG, stride=4, threshold=threshold)
    model, ids = tiny_enabled(config), random_ids(3, LENGTH)
    measured = evaluate(model, as_rows(ids), [refreshing("refresh", config)], LAST, batch_size=2, progress=False)
    logits, cache = decode_logits(model, ids, LENGTH - LAST, config)
    losses = F.cross_entropy(logits[:, -LAST - 1 : -1].transpose(1, 2), ids[:, -LAST:], reduction="none")
    (result,) = measured.results
    assert result.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-6)
    assert result.losses == pytest.approx(losses.mean(0).tolist(), rel=1e-6)
    assert result.standard_error == pytest.approx(losses.mean(1).std().item() / math.sqrt(3), rel=1e-5)
    for layer, steps in enumerate(cache.full_steps[:, :, -LAST:].sum((1, 2)).tolist()):
        assert result.effective_strides[layer] == (pytest.approx(3 * LAST / steps) if steps else None)


@pytest.mark.parametrize("name", ["full", "refresh:4", "similarity:4:0.3", "never"])
def test_one_pass_gives_what_decoding_through_the_cache_gives(name):
    """The slow and obvious way, and the way that is taken."""
    model, rows = tiny_enabled(CONFIG), as_rows(random_ids(3, LENGTH))
    strategies = build_strategies([name], CONFIG)
    (fast,) = evaluate(model, rows, strategies, LAST, batch_size=2, progress=False).results
    (slow,) = evaluate(model, rows, strategies, LAST, batch_size=2, progress=False, stepwise=True).results
    assert slow.losses == pytest.approx(fast.losses, rel=1e-5)
    assert slow.standard_error == pytest.approx(fast.standard_error, rel=1e-5)
    assert slow.effective_strides == fast.effective_strides
    assert slow.seconds > 0 and slow.cache_bytes > 0 and slow.peak_memory is None
    assert fast.seconds is fast.cache_bytes is None


def test_perplexity_of_snapkv_is_that_of_never_refreshing():
    model, rows = tiny_enabled(CONFIG), as_rows(random_ids(3, LENGTH))
    never, snapkv = evaluate(
        model, rows, build_strategies(["never", "snapkv"], CONFIG), LAST, batch_size=2, progress=False
    ).results
    assert snapkv.losses == pytest.approx(never.losses, rel=1e-5)
    assert (snapkv.budget, snapkv.config, snapkv.effective_strides) == (6, None, {})
    # K + 1 entries, and a few numbers beside each; what never refreshes can begin to, and holds all
    assert snapkv.cache_bytes < 1.5 * 2 * 2 * 2 * 8 * 8 * 7 < 2 * 2 * 2 * 8 * 8 * LENGTH


def test_perplexity_of_streaming_is_that_of_a_mask():
    """The first four tokens, the last ones and the token itself, as a mask over the plain model's attention."""
    budget, prompt = 9, LENGTH - LAST
    ids = random_ids(2, LENGTH)
    column, row = torch.arange(LENGTH), torch.arange(LENGTH)[:, None]
    seen = (column <= row) & ((row < prompt) | (column < 4) | (column >= row - (budget - 4)))
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    plain = tiny_model(attn_implementation="eager")
    with torch.no_grad():
        logits = plain(ids, attention_mask=mask.expand(2, 1, -1, -1), use_cache=False).logits
    expected = F.cross_entropy(logits[:, -LAST - 1 : -1].transpose(1, 2), ids[:, -LAST:], reduction="none").mean(0)
    strategies = build_strategies(["streaming"], dataclasses.replace(CONFIG, budget=budget))
    (found,) = evaluate(tiny_enabled(CONFIG), as_rows(ids), strategies, LAST, batch_size=2, progress=False).results
    assert found.losses == pytest.approx(expected.tolist(), rel=1e-5)


def test_perplexity_of_h2o():
    """With room for all tokens it is full attention; with less it is not, and holds less."""
    model, rows = tiny_enabled(CONFIG), as_rows(random_ids(2, LENGTH))
    full, roomy, tight = (
        evaluate(model, rows, build_strategies([name], config), LAST, progress=False, stepwise=True).results[0]
        for name, config in (("full", CONFIG), ("h2o", dataclasses.replace(CONFIG, budget=LENGTH)), ("h2o", CONFIG))
    )
    assert roomy.losses == pytest.approx(full.losses, rel=1e-5)
    assert abs(tight.loss - full.loss) > 1e-3 and tight.cache_bytes < full.cache_bytes / 4 < roomy.cache_bytes


def test_finished_rows_are_not_computed_again(tmp_path, monkeypatch):
    model, path, config = tiny_enabled(CONFIG), tmp_path / "rows.jsonl", dataclasses.replace(CONFIG, threshold=0.3)
    rows, strategies = as_rows(random_ids(5, LENGTH)), build_strategies(["full", "similarity:4", "snapkv"], config)

    def run(rows=rows, **options):
        options = {"batch_size": 2, "progress": False, "records": SequenceRecords(path), **options}
        return evaluate(model, rows, strategies, LAST, **options)

    whole, passes, real = run(records=None), [], losses_module.Measurement._batch

    def counted(self, strategy, numbers):
        if len(passes) == 4:
            raise KeyboardInterrupt
        passes.append((strategy.name, numbers))
        return real(self, strategy, numbers)

    monkeypatch.setattr(losses_module.Measurement, "_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert passes[-1] == ("refresh S=4 threshold 0.3", [0, 1])
    path.write_text(path.read_text() + '{"key": "cut sho')  # as a killed process leaves it
    passes.clear()
    monkeypatch.setattr(losses_module.Measurement, "_batch", lambda *a: passes.append(a[1:]) or real(*a))
    resumed = run()
    assert [numbers for _, numbers in passes] == [[2, 3], [4], [0, 1], [2, 3], [4]]
    for result, expected in zip(resumed.results, whole.results, strict=True):
        assert result.losses == pytest.approx(expected.losses, rel=1e-9)
        assert result.effective_strides == expected.effective_strides
        assert result.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
    assert run() == resumed and len(passes) == 5  # times included: nothing ran
    run(rows.select([3]))
    assert len(passes) == 5  # which rows stand beside it changes nothing
    run(stepwise=True)
    assert len(passes) == 5 + 6  # one pass tells no times
    model.lm_head.weight.data *= 2
    run()
    assert len(passes) == 5 + 6 + 9
    path.write_text("a thesis\n")
    with pytest.raises(SettingsError, match="is not from an evaluation of rows"):
        run()


# ---- evaluate ----


def test_strategies_and_effective_strides():
    config = dataclasses.replace(CONFIG, threshold=2.0, recent_window=2)
    strategies = default_strategies(config, [4, 10, 4])
    names = ["full", "refresh S=4", "refresh S=10", "refresh S=10 threshold 2", "never refreshed"]
    assert [strategy.name for strategy in strategies] == names
    assert all(strategy.config.recent_window == 2 for strategy in strategies[1:])

    model = tiny_enabled().train()
    measured = evaluate(model, as_rows(random_ids(3, LENGTH)), strategies, LAST, batch_size=2, progress=False)
    assert model.training
    assert [result.effective_stride for result in measured.results] == [None, 4, 10, 10, None]
    assert measured.results[0].effective_strides == {}
    assert measured.results[-1].effective_strides == {0: None, 1: None}
    assert measured.results[2].losses == measured.results[3].losses  # a threshold that no cosine exceeds
    assert (measured.rows, measured.row_length, measured.last_tokens) == (3, LENGTH, LAST)
    assert measured.results[0].budget is None and measured.results[1].budget == 6


def test_batches_and_processes_share_the_rows(monkeypatch):
    """Two processes, run one after the other, give what one process gives; the odd row is left out."""
    model, ids, strategies = tiny_enabled(), random_ids(5, LENGTH), default_strategies(CONFIG, [4])
    whole = evaluate(model, as_rows(ids[:4]), strategies, LAST, batch_size=3, progress=False)
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sums.append(tensor.clone()))
    evaluate(model, as_rows(ids), strategies, LAST, progress=False, rank=0, world=2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(sums.pop(0)))
    shared = evaluate(model, as_rows(ids), strategies, LAST, progress=False, rank=1, world=2)
    assert shared.rows == whole.rows == 4
    for result, expected in zip(shared.results, whole.results, strict=True):
        assert result.losses == pytest.approx(expected.losses, rel=1e-6)
        assert result.standard_error == pytest.approx(expected.standard_error, rel=1e-6)
        assert result.effective_strides == expected.effective_strides


def test_a_budget_that_constrains_nothing():
    rows, model = as_rows(random_ids(2, LENGTH)), tiny_enabled()
    measured = evaluate(model, rows, default_strategies(RefreshConfig(budget=58), [10]), LAST, progress=False)
    assert len(measured.warnings) == 1 and "K = 58" in measured.warnings[0]
    for result in measured.results:
        assert measured.gap(result) == pytest.approx(0, abs=1e-4)
    assert not budget_warnings(default_strategies(RefreshConfig(budget=57), [10]), LENGTH, LAST)
    smaller = evaluate(model, rows, default_strategies(RefreshConfig(budget=20), [10]), LAST, progress=False)
    assert not smaller.warnings and abs(smaller.gap(smaller.results[-1])) > 1e-3


def test_what_cannot_be_evaluated_is_refused():
    model, rows, strategies = tiny_enabled(), as_rows(random_ids(2, LENGTH)), default_strategies(CONFIG, [10])
    for last in (0, LENGTH):
        with pytest.raises(SettingsError, match="last tokens must lie between 1 and 59"):
            evaluate(model, rows, strategies, last, progress=False)
    with pytest.raises(SettingsError, match="2 rows to evaluate on 3 processes"):
        evaluate(model, rows, strategies, LAST, progress=False, world=3)
    with pytest.raises(SettingsError, match="batch size"):
        evaluate(model, rows, strategies, LAST, batch_size=0, progress=False)
    with pytest.raises(ValueError, match="refreshkv.enable"):
        evaluate(tiny_model(), rows, strategies, LAST, progress=False)
    model.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(SettingsError, match="full: the loss is not finite"):
        evaluate(model.train(), rows, strategies, LAST, progress=False)
    assert model.training


def test_gap_closed():
    before, after = made_up([4, 6, 4]), made_up([3, 4.5, 5])
    assert gap_closed(before, after) == {"refresh S=10": pytest.approx(0.25), "never refreshed": None}
    other = made_up([3, 4, 5], ("full", "refresh S=10", "another"))
    assert gap_closed(before, other) == {"refresh S=10": pytest.approx(0.5)}
    with pytest.raises(ValueError, match="nothing to compare"):
        gap_closed(before, Evaluation(after.results[1:], 3, 60, 40))


# ---- reports ----


def made_up_report(perplexities, before=None):
    evaluation = made_up(perplexities)
    strategies = [
        refreshing(result.name, result.config) if result.config else full_attention() for result in evaluation.results
    ]
    measured = protocol("abc", "test", 3, 60, 40, strategies)
    return build_report(evaluation, measured, "org/model", {"dtype": "float32"}, "the command", before)


@pytest.mark.parametrize("name", ["report.json", "rows.jsonl"])
@pytest.mark.parametrize("content", [b"{}\n", b"3\n", b"not JSON\n", b"\xff\n", b"[" * 100_000 + b"\n"], ids=range(5))
def test_another_ones_files_are_not_replaced(tmp_path, name, content):
    """Whatever is in them, numbers and brackets 100,000 deep too."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=f"{name}, which no evaluation has written: move it away") as raised:
        open_output(tmp_path, FILES, overwrite=True)
    assert "\n" not in str(raised.value) and (tmp_path / name).read_bytes() == content


def test_report_files_and_tables(tmp_path):
    before, (own, notes) = made_up_report([4, 6, 8]), (tmp_path / "own", tmp_path / "own" / "notes.txt")
    open_output(own, FILES, overwrite=False)
    notes.write_text("mine")
    write_report(own, before)
    assert sorted(path.name for path in own.iterdir()) == ["notes.txt", *NAMES]
    assert (own / "report.png").read_bytes().startswith(b"\x89PNG")
    assert load_report(own) == json.loads(json.dumps(before))
    assert Evaluation.from_dict(load_report(own)["evaluation"]) == made_up([4, 6, 8])
    with pytest.raises(SettingsError, match="--overwrite"):
        open_output(own, FILES, overwrite=False)

    after = made_up_report([3, 4, 6], load_report(own))
    write_report(open_output(own, FILES, overwrite=True), after)
    assert notes.read_text() == "mine"
    table = markdown_table(load_report(own))
    assert table in (own / "report.md").read_text()
    assert "| refresh S=10 | 6 | 10 | 6.000 | 4.000 | 1.500 | 1.333 | 2.000 | 1.000 | 50.0% | 20.0 |" in table
    lines = [line.split() for line in text_table(after).splitlines()]
    assert lines[1] == ["strategy", "K", "stride", *["before", "after"] * 3, "closed", "stride"]
    figures = ["6", "never", "8.000", "6.000", "2.000", "2.000", "4.000", "3.000", "25.0%", "20.0"]
    assert lines[4] == ["never", "refreshed", *figures]


def test_without_matplotlib_the_report_has_no_figure(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("refreshkv.evaluation.perplexity.figure")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert write_report(tmp_path, made_up_report([4, 6, 8])) == ["report.json", "report.md"]
    assert "report.png" not in (tmp_path / "report.md").read_text() and not (tmp_path / "report.png").exists()
    assert "report.png is left out" in capsys.readouterr().out


def test_reports_of_something_else_are_not_compared(tmp_path):
    report = made_up_report([4, 6, 8])
    measured = report["protocol"]
    check_comparable(report, measured, "old")
    other = {**measured["strategies"], "refresh S=10": {**CONFIG.to_dict(), "budget": 7}}
    for change, message in [
        ({"fingerprint": "xyz"}, "fingerprint abc there, xyz here"),
        ({"split": "train"}, "split test there, train here"),
        ({"last tokens": 30}, "last tokens 40 there, 30 here"),
        ({"strategies": {"full": None}}, "strategies full, refresh S=10, never .* there, full here"),
        ({"strategies": other}, "refresh S=10 with budget 6 there, 7 here"),
    ]:
        with pytest.raises(SettingsError, match=f"--compare old measured something else: {message}"):
            check_comparable(report, {**measured, **change}, "old")
    with pytest.raises(SettingsError, match="no report.json"):
        load_report(tmp_path)
    for text in ("{", "[]", "{}", json.dumps({**report, "layout": 0})):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(SettingsError, match="is not a report"):
            load_report(tmp_path)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("protocol",), [None, 3, [], "x"]),
        (("protocol", "strategies"), [None, 3, ["full"], {"full": 3}]),
        (("model",), [None, 3]),
        (("settings",), [None, []]),
        (("evaluation",), [None, 3, [], {}]),
        (("evaluation", "rows"), [None, "4", 1.5]),
        (("evaluation", "warnings"), [None, 3]),
        (("evaluation", "results"), [None, 3, {}, [3], [None], []]),
        (("evaluation", "results", 0), [None, 3, {}, "x"]),
        (("evaluation", "results", 0, "losses"), [None, 3, [], ["one"], [None], {"a": 1}]),
        (("evaluation", "results", 0, "budget"), ["6", []]),
        (("evaluation", "results", 1, "effective_strides"), [None, 3, {"x": 1}, {"0": "x"}]),
        (("evaluation", "results", 1, "config"), [3, "x", {"stride": -1}, {"strid": 1}]),
    ],
)
def test_values_of_another_kind_are_not_compared(tmp_path, path, values):
    """`--compare` with a report.json that something else wrote, or that was changed: one line."""
    report = made_up_report([4, 6, 8])
    for value in values:
        changed = json.loads(json.dumps(report))
        target = changed
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        (tmp_path / "report.json").write_text(json.dumps(changed))
        with pytest.raises(SettingsError, match=r"report\.json is not a report of launch/evaluate\.py \(.*\)") as error:
            load_report(tmp_path)
        assert "\n" not in str(error.value)


# ---- launch/evaluate.py ----


@pytest.fixture(scope="module")
def launch():
    return load_script("evaluate").main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain model, one with a configuration of its own in a folder below, and prepared rows."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_model(dtype=torch.float32).save_pretrained(root / "plain")
    tiny_enabled(RefreshConfig(budget=9, threshold=0.5), seed=1).float().save_pretrained(root / "adapted" / "model")
    splits = {"train": 2, "validation": 0, "test": 5}
    rows = {split: random_ids(count, LENGTH).tolist() for split, count in splits.items()}
    save_rows(root / "rows", rows, VOCABULARY)
    return root


def test_command_line(launch, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(folders / "rows"), "--last-tokens", "40", "--strides", "4,10", "--device", "cpu"]
    launch(["--model", str(folders / "plain"), *common, "--budget", "9", "--threshold", "0.5"])
    before = load_report("reports/plain")
    assert "refresh S=10 threshold 0.5" in capsys.readouterr().out
    assert before["protocol"]["rows"] == 5 and before["settings"]["refresh"]["budget"] == 9

    launch(["--model", str(folders / "adapted"), *common, "--compare", "reports/plain", "--batch-size", "2"])
    after = load_report("reports/adapted")
    assert after["before"]["model"] == str(folders / "plain")
    assert set(after["gap_closed"]) == {"refresh S=4", "refresh S=10", "refresh S=10 threshold 0.5", "never refreshed"}
    assert text_table(after) in capsys.readouterr().out

    launch(["--model", str(folders / "plain"), *common, "--output", "few", "--rows", "2", "refresh.sink_tokens=3"])
    assert load_report("few")["protocol"]["rows"] == 2
    assert load_report("few")["settings"]["refresh"]["sink_tokens"] == 3
    launch(["--model", str(folders / "plain"), *common, "--output", "wide", "--rows", "1", "--budget", "58"])
    captured = capsys.readouterr()
    assert "never constrains anything" in captured.err and "never constrains anything" in captured.out


def test_command_line_with_caches_that_evict(launch, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--model", str(folders / "plain"), "--data", str(folders / "rows"), "--last-tokens", "40"]
    common += ["--device", "cpu", "--budget", "9", "--rows", "2", "--output", "out"]
    launch([*common, "--strategies", "full,refresh:4,snapkv"])
    first = Path("out/rows.jsonl").read_text()
    assert "decoding seconds" in Path("out/report.md").read_text()
    with pytest.raises(SettingsError, match="already holds report.json: continue that with --resume"):
        launch(common)
    launch([*common, "--strategies", "full,refresh:4,snapkv,streaming,h2o", "--resume"])
    assert Path("out/rows.jsonl").read_text().startswith(first)
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == 10
    report = load_report("out")
    assert report["protocol"]["strategies"]["H2O"] == {"cache": "H2OCache", "budget": 9}
    assert [result["seconds"] is None for result in report["evaluation"]["results"]] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert "StreamingLLM" in capsys.readouterr().out
    launch([*common, "--strategies", "full,refresh:4", "--decode", "--overwrite"])
    decoded = load_report("out")["evaluation"]["results"]
    assert all(result["seconds"] > 0 and result["cache_bytes"] > 0 for result in decoded)
    for result, parallel in zip(decoded, report["evaluation"]["results"], strict=False):
        assert result["losses"] == pytest.approx(parallel["losses"], rel=1e-5)
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "no/such/place"], "--model: no model could be loaded from no/such/place"),
        (["--model", "a", "--model", "b"], "only a suite takes several; --data takes one"),
        (["--data", "missing"], "holds no prepared rows"),
        (["--strategies", "snapkv,refresh:4"], "with --data full must be among them"),
        (["--strategies", "full", "--strides", "4"], "--strides means nothing with --strategies: write refresh:STRIDE"),
        (["--resume", "--overwrite"], "choose one"),
        (["--split", "validation"], "validation split of .* has no rows"),
        (["--rows", "6"], "--rows must lie between 1 and 5, got 6"),
        (["--last-tokens", "60"], "last tokens must lie between 1 and 59"),
        (["--budget", "lots"], "refresh.budget must be"),
        (["--budget", "0"], "budget must be"),
        (["refresh.strid=5"], "unknown setting refresh.strid; did you mean refresh.stride"),
        (["training.steps=5"], "unknown setting training"),
        (["--compare", "missing"], "missing holds no report.json"),
        (["--compare", "x", "--output", "x"], "are the same folder"),
        (["--output", "taken"], "--output taken already holds report.md"),
        (["--output", "taken/report.md"], "--output taken/report.md cannot be written to"),
        (["refresh.stride=0", "--split", "test", "refresh.sink_tokens=1"], "stride must be"),
    ],
)
def test_command_line_refuses(launch, folders, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "report.md").write_text("mine")
    common = ["--data", str(folders / "rows"), "--last-tokens", "40"]
    if "--model" not in arguments:
        common += ["--model", str(folders / "plain")]
    with pytest.raises(SettingsError, match=message):
        launch([*common, *arguments])
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "report.md"]
    assert (tmp_path / "taken" / "report.md").read_text() == "mine"


def test_command_line_refuses_models_that_do_not_fit(launch, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(folders / "rows"), "--last-tokens", "40"]
    tiny_model(vocab_size=40).save_pretrained("small")
    with pytest.raises(SettingsError, match="tokenizer of 61 tokens but the model has 40"):
        launch(["--model", "small", *common])
    tiny_model(layers=1).save_pretrained("cut")
    settings = json.loads(Path("cut/config.json").read_text())
    Path("cut/config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2}))
    with pytest.raises(SettingsError, match="--model: cut lacks 9 weights"):
        launch(["--model", "cut", *common])

    shutil.copytree(folders / "plain", "other")
    shutil.copytree(folders / "rows", "rows")
    train_tokenizer(["a text with few words"] * 3, 270).save_pretrained("other")
    train_tokenizer(["quite another, other than it"] * 3, 270).save_pretrained("rows/tokenizer")
    with pytest.raises(SettingsError, match="made with another tokenizer than that of other"):
        launch(["--model", "other", "--data", "rows", "--last-tokens", "40"])
