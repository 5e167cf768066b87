"""Suites: the files in configs/suites, what a run measures, how it is laid out, resumed and made smaller."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from refreshkv import RefreshConfig, enable
from refreshkv.data.tasks.registry import build_tasks
from refreshkv.data.tasks.words import coined_words
from refreshkv.data.tokenizer import train_tokenizer
from refreshkv.evaluation.perplexity import losses
from refreshkv.evaluation.perplexity.evaluation import evaluate
from refreshkv.evaluation.strategies import LATER_SETTINGS, build_strategies
from refreshkv.evaluation.suites.changes import Changes, change
from refreshkv.evaluation.suites.config import Suite, load_suite, named_models
from refreshkv.settings import SettingsError, settings_from_dict
from tests.evaluation.paper_tables import CHAIN_MODELS, CHAIN_OF_KEY, TABLES, numbers
from tests.helpers.longproc import write_longproc
from tests.helpers.models import tiny_model
from tests.helpers.rows import save_rows
from tests.helpers.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"paper-table-{number}" for number in (1, 2, 3, 4, 5, 8, 9, 10, 13, 14)] + ["paper-figure-3", "paper-figure-4"]
LENGTH, LAST = 60, 30

SMALL = {
    "title": "A table",
    "about": "What it shows.",
    "reading": "All of it.",
    "refresh": {"budget": 8, "threshold": 0.3},
    "corpora": {"text": {"data": "rows", "prepare": "make them", "row_length": 512, "rows": 4, "last_tokens": LAST}},
    "benchmarks": {
        "chain": {
            "tasks": ["chain_of_key"],
            "length": 700,
            "examples": 2,
            "settings": {"chain_of_key": {"keys": 2, "max_new_tokens": 30}},
            "refresh": {"budget": 0.25},
        }
    },
    "rows": {
        "Vanilla": {"strategy": "full"},
        "SnapKV": {"strategy": "snapkv"},
        "QC=5": {"strategy": "similarity:5"},
        "without": {"strategy": None, "why": "nobody can"},
    },
    "columns": {
        "PPL": {"of": "text", "value": "perplexity"},
        "stride": {"of": "text", "value": "effective stride"},
        "keys": {"of": "chain", "value": "score"},
    },
    "paper": {
        "source": "a book",
        "numbers": {"Model-8B": {"Vanilla": {"PPL": 2.5}, "QC=5": {"PPL": None, "stride": 12}, "without": {"PPL": 3}}},
    },
}


@pytest.fixture(scope="module")
def longproc(tmp_path_factory):
    return write_longproc(tmp_path_factory.mktemp("longproc"))


def small(**changes):
    return settings_from_dict(Suite, json.loads(json.dumps({**SMALL, **changes})), "")


# ---- configs/suites ----


def test_all_tables_are_there():
    assert {path.stem for path in (ROOT / "configs" / "suites").glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_suites_load_and_can_be_run(name, longproc):
    suite, path = load_suite(name)
    assert path.read_text().startswith("# "), "a comment says what is certain"
    for of in [*suite.corpora, *suite.benchmarks]:
        strategies = [item for model in suite.models or [""] for item in suite.strategies(of, model)]
        assert {item.name for item in strategies} == {label for label, row in suite.rows.items() if row.strategy}
    for item in suite.benchmarks.values():
        files = {"gov_report", "qmsum", "novel_summary"} & set(item.tasks)
        settings = dict(item.settings)
        settings |= {task: {**settings.get(task, {}), "data_files": "x"} for task in files}
        settings |= {task: {**own, "data": str(longproc)} for task, own in settings.items() if "data" in own}
        assert all(task.family.length == item.length for task in build_tasks(item.tasks, settings, length=item.length))
    for corpus in suite.corpora.values():
        config = corpus.prepare.split("--config ")[1].split()[0]
        prepared = yaml.safe_load((ROOT / config).read_text())["data"]
        overrides = dict(part.removeprefix("data.").split("=") for part in corpus.prepare.split() if "=" in part)
        assert corpus.data == overrides.get("folder", prepared["folder"])
        assert corpus.row_length == int(overrides.get("row_length", prepared["row_length"]))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_papers(name):
    expected = numbers(TABLES[name])
    if name == "paper-table-2":
        expected |= numbers(CHAIN_OF_KEY, CHAIN_MODELS)
    assert load_suite(name)[0].paper.numbers == expected


def test_pages_and_answers_of_longproc_fit():
    """By SmolLM2's tokenizer some of LongProc's prompts of HTML to TSV have 83145 tokens (level 0.5K) and more than
    84000 (8K), and its longest answers 955, 4174 and 10206."""
    longest = {"0.5k": 955, "2k": 4174, "8k": 10206}
    for name in ("paper-table-2", "paper-table-3", "paper-table-4", "paper-table-10", "paper-figure-4"):
        found = [item for item in load_suite(name)[0].benchmarks.values() if item.tasks == ["html_to_tsv"]]
        assert found
        for item in found:
            settings = item.settings["html_to_tsv"]
            assert longest[settings["level"]] <= settings["max_new_tokens"] <= item.length - 90_000


def test_settings_of_the_paper():
    """The settings that its numbers were measured with."""
    suite, _ = load_suite("paper-table-1")
    settings = {item.name: item.settings for item in suite.strategies("arxiv", "any")}
    assert settings["Vanilla"] == {} and settings["H2O"]["budget"] == 2048
    assert settings["StreamingLLM"] == {"cache": "StreamingCache", "budget": 2048, "sink_tokens": 4}
    measured = RefreshConfig(budget=2048, stride=5, threshold=0.85).to_dict()
    assert settings["RefreshKV QC=5"] == {name: measured[name] for name in measured if name not in LATER_SETTINGS}
    assert RefreshConfig.from_dict(settings["RefreshKV QC=5"]).to_dict() == measured
    corpus = suite.corpora["arxiv"]
    assert (corpus.rows, corpus.row_length, corpus.last_tokens) == (100, 16384, 256)
    budgets = load_suite("paper-table-5")[0].corpora
    assert {name: item.refresh["budget"] for name, item in budgets.items()} == {"arxiv-8k": 1024, "arxiv-16k": 2048}
    (novels,) = {item.settings["budget"] for item in load_suite("paper-table-2")[0].strategies("novels", "")[1:]}
    assert novels == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rowz": {}}, "unknown setting rowz; did you mean rows"),
        ({"rows": {}}, "must not be empty"),
        ({"paper": {"source": "x", "numbers": {"M": 3}}}, "paper.numbers.M must be a section with a line for each row"),
        (
            {"paper": {"source": "x", "numbers": {"M": {"Vanilla": 3}}}},
            "paper.numbers.M.Vanilla must be a section with a number for each column, got 3",
        ),
        ({"columns": {"PPL": {"of": "books", "value": "perplexity"}}}, "no corpus or benchmark books"),
        ({"columns": {"PPL": {"of": "text", "value": "score"}}}, "columns.PPL.value: text has no score"),
        ({"columns": {"PPL": {"of": "chain", "value": "perplexity"}}}, "chain has no perplexity"),
        ({"columns": {"PPL": {"of": ["text", "chain"], "value": "effective stride"}}}, "only scores have a mean"),
        ({"columns": {"PPL": {"of": "text", "value": "loss"}}}, "columns.PPL.value must be one of perplexity"),
        ({"models": {"a": "x"}}, "either all rows or all columns must say which model"),
        ({"rows": {"a": {"strategy": "full", "model": "b"}}}, "rows.a.model: b is not among the models"),
        ({"paper": {"source": "x", "numbers": {"M": {"QC": {"PPL": 1}}}}}, "paper.numbers.M: there is no row QC"),
        ({"paper": {"source": "x", "numbers": {"M": {"QC=5": {"P": 1}}}}}, "M.QC=5: there is no column P"),
        ({"paper": {"source": "x", "numbers": {"M": {"QC=5": {"PPL": "2,3"}}}}}, "must be a number or null"),
        ({"benchmarks": {"text": {"tasks": ["vt"], "length": 9}}}, "text is among the corpora and the benchmarks"),
    ],
)
def test_suites_that_cannot_be(changes, message):
    with pytest.raises(SettingsError, match=message):
        small(**changes)


# ---- changes ----


def test_changes_are_said():
    changes = Changes(
        rows=2,
        last_tokens=LAST,
        examples=2,
        task_length=300,
        corpora={"text": "other"},
        refresh={"budget": 5, "stride": 10},
        tasks={"chain_of_key": {"keys": 3}},
    )
    suite, said = change(small(), changes)
    assert said == [
        "text: rows 2 instead of 4",
        "text: data other instead of rows",
        "chain: length 300 instead of 700",
        "chain: budget 5 instead of 0.25",
        "chain: tasks.chain_of_key.keys=3",
        "budget 5 instead of 8",
    ]
    assert suite.benchmarks["chain"].settings["chain_of_key"] == {"keys": 3, "max_new_tokens": 30}
    for of in ("text", "chain"):
        assert suite.strategies(of, "")[1].settings["budget"] == 5
    assert change(small(), Changes())[1] == []
    suite, said = change(small(), Changes(without=["chain"]))
    assert said == ["chain is left out"] and list(suite.columns) == ["PPL", "stride"] and not suite.benchmarks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ["books"]}, "--without: the suite measures no books; it has text, chain"),
        ({"without": ["text", "chain"]}, "--without leaves nothing to measure"),
        ({"corpora": {"chain": "x"}}, "--corpus: the suite measures no chain; it has text"),
        ({"without": ["text"], "corpora": {"text": "x"}}, "--corpus: the suite measures no text; it has none"),
        ({"without": ["text"], "last_tokens": 3}, "--last-tokens means nothing here: the suite measures no corpora"),
        ({"without": ["chain"], "task_length": 3}, "--task-length means nothing here"),
        ({"tasks": {"vt": {"hops": 2}}}, "tasks.vt has settings but is not among the suite's tasks"),
    ],
)
def test_changes_that_would_do_nothing(changes, message):
    with pytest.raises(SettingsError, match=message):
        change(small(), Changes(**changes))


def test_models_by_name(tmp_path):
    own = tmp_path / "a=b"
    own.mkdir()
    assert named_models(small(), ["runs/base", "x=org/model", str(own)]) == {
        "base": "runs/base",
        "x": "org/model",
        "a=b": str(own),
    }
    with pytest.raises(SettingsError, match="base comes twice; write NAME=y/base"):
        named_models(small(), ["x/base", "y/base"])
    table, _ = load_suite("paper-table-5")
    with pytest.raises(SettingsError, match="give --model before=... .the untouched model. --model after=..."):
        named_models(table, ["before=x"])


# ---- runs ----


@pytest.fixture(scope="module")
def launch():
    return load_script("evaluate").main


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 300, (4, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def place(tmp_path_factory, ids):
    """Two models with a tokenizer, and prepared rows."""
    root = tmp_path_factory.mktemp("suite")
    generator = random.Random(0)
    tokenizer = train_tokenizer([" ".join(coined_words(generator, 200)) for _ in range(5)], 400)
    for name, seed in (("one", 0), ("two", 1)):
        settings = {"vocab_size": len(tokenizer), "eos_token_id": 0, "max_position_embeddings": 1024, "seed": seed}
        tiny_model(dtype=torch.float32, **settings).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = {"train": ids[:1], "validation": ids[:0], "test": ids}
    save_rows(root / "rows", {split: own.tolist() for split, own in rows.items()}, len(tokenizer))
    return root


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return str(path)


def test_a_table_beside_the_papers(launch, place, ids, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--suite", written(tmp_path), "--corpus", f"text={place / 'rows'}", "--device", "cpu", "--output", "out"]
    launch(["--model", str(place / "one"), *common, "--batch-size", "2"])
    printed, report = capsys.readouterr().out, json.loads(Path("out/suite.json").read_text())
    header, *lines = report["tables"]["one"]
    assert header == ["", "PPL", "paper", "stride", "paper", "keys", "paper"]
    cells = {line[0]: line[1:] for line in lines}
    config = RefreshConfig(budget=8, threshold=0.3, stride=5)
    model = enable(tiny_model(dtype=torch.float32, vocab_size=400, seed=0), config)
    model.load_state_dict(type(model).from_pretrained(place / "one").state_dict())
    strategies = build_strategies(["full", "snapkv", "similarity"], config)
    expected = evaluate(model, Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"), strategies, LAST)
    for name, paper, result in zip(("Vanilla", "SnapKV", "QC=5"), ("2.5", "-", "n/a"), expected.results, strict=True):
        assert float(cells[name][0].replace(",", "")) == pytest.approx(result.perplexity, rel=1e-5)
        assert cells[name][1] == paper
    assert cells["QC=5"][2:4] == [f"{expected.results[2].effective_stride:.1f}", "12"]
    assert cells["Vanilla"][2:4] == ["-", "-"] and cells["without"] == ["-", "3", "-", "-", "-", "-"]
    costs = {tuple(line[:2]): line[2:] for line in report["costs"]["one"]}
    assert costs["", "on"] == ["seconds", "peak GiB", "cache MiB"] and len(costs) == 7
    assert float(costs["SnapKV", "chain"][0]) >= 0 and float(costs["SnapKV", "chain"][2]) > 0
    assert "time of one row or example, and memory: one" in printed
    figures = report["results"]["one"]["figures"]
    assert figures["SnapKV"]["chain"]["score"] == float(cells["SnapKV"][4])
    assert report["results"]["one"]["benchmarks"]["chain"][0]["examples"] == 2
    markdown = Path("out/suite.md").read_text()
    for text in (
        "not as in the paper: text: rows of 60 tokens instead of 512",
        f"not as in the paper: text: data {place / 'rows'} instead of rows",
        "without: nobody can",
        f"n/a: not available offline; who has the paper writes it under numbers in {tmp_path / 'small.yaml'}",
    ):
        assert text in printed and f"- {text}" in markdown
    assert "| QC=5 | " in markdown and "**What is certain.** All of it." in markdown
    assert "## time of one row or example, and memory: one" in markdown
    assert "## effective stride of each layer: one\n\n| layer | QC=5, text |" in markdown
    assert not Path("out/suite.png").exists()

    with pytest.raises(SettingsError, match="already holds suite.json: continue that with --resume"):
        launch(["--model", str(place / "one"), *common])
    monkeypatch.setattr(losses, "sequence_losses", None)  # neither rows nor examples are computed again
    monkeypatch.setattr("refreshkv.evaluation.tasks.scores.AnswerGenerator.generate", None)
    launch(["--model", str(place / "one"), *common, "--resume"])
    assert json.loads(Path("out/suite.json").read_text())["tables"] == report["tables"]


def test_means_of_benchmarks_and_columns_of_the_paper_alone(launch, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = SMALL["benchmarks"]["chain"]
    other = {"chain_of_key": {**chain["settings"]["chain_of_key"], "seed": 7}}
    columns = {name: {"of": of, "value": "score"} for name, of in (("one", "chain"), ("both", ["chain", "more"]))}
    columns["theirs"] = {"of": None, "value": "score"}
    changes = {"corpora": {}, "rows": {"Vanilla": {"strategy": "full"}}, "columns": columns}
    changes["paper"] = {"source": "x", "numbers": {"M": {"Vanilla": {"theirs": 7}}}}
    suite = written(
        tmp_path, benchmarks={"chain": chain, "more": {**chain, "examples": 1, "settings": other}}, **changes
    )
    scores = iter([{"score": 0.25}, {"score": 0.25}, {"score": 0.75}])
    monkeypatch.setattr("refreshkv.data.tasks.chain_of_key.ChainOfKey.score", lambda *_: next(scores))
    launch(["--model", str(place / "one"), "--suite", suite, "--device", "cpu", "--output", "out"])
    _, vanilla = json.loads(Path("out/suite.json").read_text())["tables"]["one"]
    assert vanilla == ["Vanilla", "25.0", "-", "50.0", "-", "-", "7"]


def test_scored_tokens_at_the_end_of_a_longer_decoded_stretch(launch, place, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = {**SMALL["corpora"]["text"], "data": str(place / "rows"), "last_tokens": 7, "decoded_tokens": LAST}
    suite = written(
        tmp_path,
        corpora={"text": corpus},
        benchmarks={},
        rows={"S=10": {"strategy": "refresh:10"}},
        columns={"PPL": {"of": "text", "value": "perplexity"}},
        paper={"source": "x", "numbers": {"M": {"S=10": {"PPL": 1}}}},
    )
    launch(["--model", str(place / "one"), "--suite", suite, "--device", "cpu", "--output", "out"])
    found = json.loads(Path("out/suite.json").read_text())["results"]["one"]["figures"]["S=10"]["text"]
    config = RefreshConfig(budget=8, stride=10)
    model = enable(type(tiny_model()).from_pretrained(place / "one"), config)
    rows = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    (expected,) = evaluate(model, rows, build_strategies(["refresh:10"], config), LAST).results
    assert found["perplexity"] == pytest.approx(math.exp(sum(expected.losses[-7:]) / 7), rel=1e-5)
    with pytest.raises(SettingsError, match="decoded_tokens=30 must be at least the 40 scored tokens"):
        launch(["--model", str(place / "one"), "--suite", suite, "--last-tokens", "40", "--output", "other"])


def test_columns_of_substitutes_are_named_so(launch, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    html = {"tasks": ["html_to_tsv"], "length": 700, "examples": 1, "settings": {"html_to_tsv": {"rows": 1}}}
    html["settings"]["html_to_tsv"]["max_new_tokens"] = 120
    columns = {name: {"of": of, "value": "score"} for name, of in (("F1", "html"), ("keys", "chain"))}
    benchmarks = {"html": html, "chain": SMALL["benchmarks"]["chain"]}
    numbers = {"M": {"Vanilla": {"F1": 90, "keys": 1}}}
    changes = {"corpora": {}, "columns": columns, "paper": {"source": "x", "numbers": numbers}}
    suite = written(tmp_path, benchmarks=benchmarks, **changes)
    launch(["--model", str(place / "one"), "--suite", suite, "--device", "cpu", "--output", "out"])
    header, vanilla, *_ = json.loads(Path("out/suite.json").read_text())["tables"]["one"]
    assert header == ["", "F1-substitute", "paper", "keys", "paper"] and vanilla[2::2] == ["90", "1"]


def test_a_comparison_of_models(launch, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers = {"M": {"Vanilla": {"before": 2.7, "after": None}}, "N": {"Vanilla": {"before": 1}}}
    suite = written(
        tmp_path,
        models={"before": "x", "after": "y"},
        benchmarks={},
        rows={"Vanilla": {"strategy": "full"}, "S=4": {"strategy": "refresh:4"}},
        columns={name: {"of": "text", "value": "perplexity", "model": name} for name in ("before", "after")},
        paper={"source": "x", "numbers": numbers},
        layout="ratios",
    )
    models = ["--model", f"before={place / 'one'}", "--model", f"after={place / 'two'}"]
    launch([*models, "--suite", suite, "--corpus", f"text={place / 'rows'}", "--rows", "2", "--output", "out"])
    report = json.loads(Path("out/suite.json").read_text())
    (table,) = report["tables"].values()
    assert table[0] == ["", "before", "paper, M", "paper, N", "after", "paper, M", "paper, N"]
    assert table[1][2:4] == ["2.7", "1"] and table[1][5:] == ["n/a", "-"]
    for model, cell in (("before", 1), ("after", 4)):
        perplexities = [item["perplexity"] for item in report["results"][model]["corpora"]["text"]["results"]]
        assert [line[cell] for line in table[1:]] == [f"{value:,.3f}" for value in perplexities]
    assert table[1][1] != table[1][4] and Path("out/suite.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_layers_for_each_model(launch, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    columns = {"stride": {"of": "text", "value": "effective stride"}, "MiB": {"of": "text", "value": "cache MiB"}}
    paper = {"source": "x", "numbers": {"M": {}}}
    suite = written(tmp_path, benchmarks={}, columns=columns, layout="strides", paper=paper)
    models = ["--model", str(place / "one"), "--model", f"other={place / 'two'}"]
    common = [*models, "--suite", suite, "--corpus", f"text={place / 'rows'}", "--rows", "1", "--last-tokens", "12"]
    launch([*common, "--budget", "50", "--output", "out"])  # decoded, for the table shows the caches' memory
    report = json.loads(Path("out/suite.json").read_text())
    assert list(report["tables"]) == ["one", "other"]
    for model in ("one", "other"):
        strides = report["results"][model]["effective strides"]["QC=5"]["text"]
        assert list(strides) == ["0", "1"] and "Vanilla" not in report["results"][model]["effective strides"]
        held = {line[0]: line[3] for line in report["tables"][model][1:]}
        assert float(held["SnapKV"]) > 0 and held["without"] == "-"
    printed = capsys.readouterr().out
    assert "M: none of the paper's numbers is available offline" in printed and "holds all of a row" not in printed
    assert Path("out/suite.png").read_bytes().startswith(b"\x89PNG")
    launch([*common, "--budget", "58", "--resume", "--output", "out"])
    assert "warning: text: the small cache (K = 58) holds all of a row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--suite", "paper-table-7"],
            "there is no file paper-table-7, and no config of that name; known are paper-figure-3",
        ),
        (["--strides", "5"], "--strides means nothing with --suite"),
        (["--strategies", "full"], "--strategies means nothing with --suite"),
        (["--corpus", "text"], "--corpus is written NAME=FOLDER, got text"),
        (["--corpus", "text=nowhere"], "there are no rows in nowhere; make them with `make them`, name others with"),
        (["--rows", "5"], "--rows must lie between 1 and 4"),
        (["refresh.strid=5"], "unknown setting refresh.strid"),
        (["tasks.chain_of_key=3"], r"tasks.chain_of_key must be a section with settings, \{\} for none, got 3"),
        (["tasks.vt.hops=3"], "tasks.vt has settings but is not among the suite's tasks: chain_of_key"),
        (["tasks.chain_of_key.key=2"], "unknown setting key; did you mean keys.; or leave it out with --without chain"),
        (["--task-length", "5"], "leaves no prompt: raise length; or leave it out with --without chain"),
        (["--resume", "--overwrite"], "choose one"),
    ],
)
def test_command_line_refuses(launch, place, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    common = ["--model", str(place / "one"), "--output", "out"]
    if "--suite" not in more:
        common += ["--suite", written(tmp_path)]
    if "--corpus" not in more:
        common += ["--corpus", f"text={place / 'rows'}"]
    with pytest.raises(SettingsError, match=message):
        launch([*common, *more])
    assert not Path("out").exists()
