"""Experiments: what is planned, run, interrupted and continued, and what the tables say."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from refreshkv import RefreshConfig
from refreshkv.data.config import DataConfig
from refreshkv.evaluation.strategies import default_strategies
from refreshkv.options import changed_config
from refreshkv.settings import SettingsError, load_settings, settings_from_dict, settings_to_dict
from refreshkv.train.config import RunConfig
from refreshkv.train.experiment.comparison import gaps_closed
from refreshkv.train.experiment.config import ExperimentConfig, merge
from refreshkv.train.experiment.gains import gain_table
from refreshkv.train.experiment.jobs import Command, Job, plan
from refreshkv.train.experiment.report import perplexity_table, task_table, write_tables
from refreshkv.train.experiment.results import Results
from refreshkv.train.experiment.running import Outcome, RunningJob, _start_ready, run_jobs
from refreshkv.train.experiment.tradeoffs import tradeoff_tables
from tests.helpers.jobs import ROOT, SCRATCH, make_rows
from tests.helpers.scripts import load_script


def settings(tmp_path, **changed):
    rows = {"folder": str(tmp_path / "rows"), "path": "json", "data_files": "t.jsonl", "row_length": 48}
    values = {
        "output": str(tmp_path / "runs"),
        "results": str(tmp_path / "results"),
        "selections": {"paper": {}, "windows": {"observation_window": 4, "recent_window": 2}},
        "settings": {"training": {"deepspeed": str(ROOT / "configs/deepspeed/zero0.json"), "dtype": "fp32"}},
        "arms": {
            "none": {"selections": ["paper", "windows"]},
            "plain": {"selections": ["paper"], "settings": {"simulation": {"pattern": "off"}}},
            "whole": {"selections": ["windows"], "settings": {"simulation": {"pattern": "whole", "stride": [5, 10]}}},
        },
        "studies": {
            "small": {
                "settings": {"data": {**rows, "train_vocabulary": 300}, "refresh": {"budget": 8, "stride": 5}},
                "base": {"model": {"scratch": SCRATCH}, "training": {"steps": 4, "global_batch": 4, "micro_batch": 2}},
                "continued": {"training": {"steps": 2, "global_batch": 4, "micro_batch": 2}},
                "arms": ["none", "plain", "whole"],
                "seeds": [0, 1],
                "perplexity": {"last_tokens": 12, "rows": 4, "strides": [5]},
            }
        },
    }
    return merge(values, changed)


def experiment(tmp_path, **changed):
    return settings_from_dict(ExperimentConfig, settings(tmp_path, **changed))


FAKE = """
import json, os, signal, sys, time
from pathlib import Path
import xxhash, yaml
name, arguments = Path(sys.argv[0]).stem, sys.argv[1:]
def value(flag):
    return arguments[arguments.index(flag) + 1]
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([name, os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("WORLD_SIZE"), arguments]), file=calls)
if name == "prepare":
    made = Path(yaml.safe_load(open(value("--config")))["data"]["folder"], "rows.json")
elif name == "train":
    run = yaml.safe_load(open(value("--config")))["training"]
    Path(run["output"]).mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load(open(value("--config")))
    Path(run["output"], "run.yaml").write_text(yaml.safe_dump(settings))
    if "slow" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        time.sleep(60)
    if "broken" in os.environ and "whole-0" in run["output"]:
        sys.exit(1)
    made = Path(run["output"], "checkpoints", f"step-{run['steps']:07d}")
    if os.environ.get("RANK", "0") != "0":
        sys.exit()
    made.mkdir(parents=True)
    (made / "run.yaml").write_text(yaml.safe_dump(settings))
    state = {"step": run["steps"], "tokens": 1, "world_size": 1, "zero_stage": 0, "rows": "f"}
    (made / "state.json").write_text(json.dumps(state))
    files = {f.name: {"bytes": f.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(f.read_bytes())}
             for f in made.iterdir()}
    (made / "manifest.json").write_text(json.dumps({"files": files}))
elif name == "export":
    made = Path(arguments[1])
    made.mkdir(parents=True)
    (made / "config.json").write_text('{"refreshkv": {}}')
    (made / "model.safetensors").write_text(os.environ.get("WEIGHTS", "") + str(made.parent.name))
elif name == "sweep":
    made = Path(value("--output"), "tradeoff.json")
    made.parent.mkdir(parents=True)
    names = ["own: refresh S=4, K=8", "own: refresh S=4, K=4"]
    points = [{"name": n, "read": 0.2, "losses": {"code": 0.1, "prose": 0.2}} for n in names]
    made.write_text(json.dumps({"date": "d", "hardware": "h", "versions": {}, "points": points,
        "full attention": {"code": 5.0, "prose": 9.0}, "fingerprints": {"code": "f", "prose": "g"},
        "last tokens": int(value("--last-tokens")),
        "settings": {"split": value("--split"), "sequences": int(value("--rows"))}}))
else:
    made = Path(value("--output"), "report.json")
    made.parent.mkdir(parents=True)
    results = [{"name": n, "losses": [1.0] * 12, "perplexity": p, "loss": 1.0, "standard_error": 0.1, "budget": 8,
                "effective_stride": 5.0} for n, p in (("full", 10.0), ("refresh S=5", 12.0))]
    made.write_text(json.dumps({"date": "d", "hardware": "h", "versions": {}, "protocol": {
        "fingerprint": "f", "split": value("--split"), "rows": int(value("--rows")),
        "last tokens": int(value("--last-tokens"))},
                                "evaluation": {"results": results}}))
time.sleep(0.05)
made.parent.mkdir(parents=True, exist_ok=True)
made.exists() or made.touch()
"""


def stand_ins(folder, monkeypatch):
    """Stand-ins for the scripts, which write down how they were called."""
    monkeypatch.setattr("refreshkv.train.experiment.running.POLL", 0.02)
    launch = folder / "launch"
    launch.mkdir(exist_ok=True)
    for name in ("prepare", "train", "export", "evaluate", "sweep"):
        (launch / f"{name}.py").write_text(FAKE)
    monkeypatch.setenv("CALLS", str(folder / "calls.txt"))
    return launch


@pytest.fixture
def launch(tmp_path, monkeypatch):
    return stand_ins(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The folder of an experiment that has run to its end, and what became of its jobs; not to be changed."""
    folder = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as monkeypatch:
        outcome, _ = go(experiment(folder), stand_ins(folder, monkeypatch), folder)
    return folder, outcome


@pytest.fixture
def finished(everything, tmp_path):
    """A copy of that experiment in this test's folder."""
    shutil.copytree(everything[0], tmp_path, dirs_exist_ok=True)
    return experiment(tmp_path)


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "calls.txt").read_text().splitlines()]


def go(config, launch, tmp_path, devices=("0", "1"), seconds=60.0):
    results = Results(config)
    jobs = plan(config, set(results.entries))
    outcome = run_jobs(
        jobs, list(devices), launch, tmp_path / "logs", seconds, lambda p: results.add(p) if p.reports else None
    )
    return outcome, results


def test_the_plan_has_what_is_needed_first(tmp_path):
    config = experiment(tmp_path)
    names = [job.name for job in plan(config, set())]
    rows = f"rows {tmp_path}/rows"
    arms = ["small/none", "small/plain-0", "small/plain-1", "small/whole-0", "small/whole-1"]
    assert names == [rows, "small/base", *arms]
    by_name = {job.name: job for job in plan(config, set())}
    assert by_name["small/base"].needs == [rows] and by_name["small/whole-1"].needs == ["small/base", rows]
    assert [command.script for command in by_name["small/whole-1"].commands] == ["train.py", "export.py", "evaluate.py"]
    known = {name for job in by_name.values() for name in job.names}
    left = known - by_name["small/whole-1"].names
    assert [job.name for job in plan(config, left)] == [rows, "small/base", "small/whole-1"]
    assert plan(config, known) == []


def test_a_study_that_starts_from_anothers_base(tmp_path):
    values = settings(tmp_path)
    second = copy.deepcopy(values["studies"]["small"])
    second |= {"base": {"training": {"steps": 3}}, "start": "small", "arms": ["none"]}
    values["studies"] = {"second": second, "small": values["studies"]["small"]}
    config = settings_from_dict(ExperimentConfig, values)
    jobs = {job.name: job for job in plan(config, set())}
    assert list(jobs).index("small/base") < list(jobs).index("second/base")
    assert "small/base" in jobs["second/base"].needs
    assert jobs["second/base"].commands[0].config[1]["model"] == {"path": f"{tmp_path}/runs/small/base/model"}


def test_a_run_of_everything(everything):
    folder, outcome = everything
    config = experiment(folder)
    results = Results(config)
    assert not outcome.failed and not outcome.left and len(outcome.done) == 7
    made = calls(folder)
    assert [name for name, *_ in made[:4]] == ["prepare", "train", "train", "export"]  # the base on both devices
    assert [(seen, world) for name, seen, world, _ in made[1:3]] == [("0,1", "2")] * 2
    arms = [(name, seen, world) for name, seen, world, _ in made[4:]]
    assert {seen for _, seen, _ in arms} == {"0", "1"} and {world for *_, world in arms} == {None}
    assert len(results.entries) == 6
    runs = [yaml.safe_load((folder / f"runs/small/whole-{seed}/run.yaml").read_text()) for seed in (0, 1)]
    assert [run["training"]["seed"] for run in runs] == [0, 1]
    assert runs[0]["refresh"]["observation_window"] == 4 and runs[0]["refresh"]["budget"] == 8
    assert runs[0]["model"] == {"path": str(folder / "runs/small/base/model")}
    assert "perplexity" in write_tables(config, results.entries)
    assert {path.name for path in (folder / "results").glob("[!.]*")} == {
        "results.json",
        "tables.md",
        "small-perplexity.png",
    }


def test_finished_figures_are_enough_to_go_on_elsewhere(finished, tmp_path, launch):
    results = Results(finished)
    del results.entries["small/plain/1/paper/perplexity"]
    (tmp_path / "results/results.json").write_text(json.dumps(results.entries))
    elsewhere = experiment(tmp_path, output=str(tmp_path / "elsewhere"))
    results = Results(elsewhere)
    jobs = plan(elsewhere, set(results.entries))
    assert [job.name for job in jobs] == ["small/base", "small/plain-1"]
    with pytest.raises(SettingsError, match="whose base model is not here: copy it"):
        results.check_bases(jobs)
    shutil.copytree(tmp_path / "runs/small/base/model", tmp_path / "elsewhere/small/base/model")
    outcome, results = go(elsewhere, launch, tmp_path)
    assert outcome.done == ["small/plain-1"] and len(results.entries) == 6
    (tmp_path / "elsewhere/small/base/model/model.safetensors").write_text("another")
    with pytest.raises(SettingsError, match="from another base model"):
        Results(elsewhere)


def test_what_others_add_meanwhile_is_kept(finished, tmp_path):
    results, late = Results(finished), Results(finished)
    late.entries.clear()
    job = next(p for p in plan(finished, set()) if p.name == "small/plain-0")
    late.add(job)
    assert set(Results(finished).entries) == set(results.entries) and len(results.entries) == 6
    results.entries["small/plain/1/paper/perplexity"]["rows"] = "others"
    (tmp_path / "results/results.json").write_text(json.dumps(results.entries))
    with pytest.raises(SettingsError, match="on other rows"):
        late.add(job)


def test_settings_that_change_no_figure_may_change(finished, tmp_path):
    values = settings(tmp_path)
    values["studies"]["small"]["continued"]["training"] |= {"micro_batch": 1, "log_every": 3, "seed": 0}
    values["studies"]["small"]["perplexity"] |= {"batch_size": 2, "split": "test"}
    values["selections"]["unused"] = {}
    values["arms"]["none"]["selections"] = ["paper"]
    assert len(Results(settings_from_dict(ExperimentConfig, values)).entries) == 6


def test_a_base_takes_as_many_devices_as_divide_its_batch():
    command = Command("train.py", [], Path("made"), micro_batches=4)
    assert [len(command.devices(["0"] * n)) for n in (1, 2, 3, 4, 5, 8)] == [1, 2, 2, 4, 4, 4]


def test_rows_are_prepared_with_the_studys_settings_alone(tmp_path):
    """Nothing of the script's default file comes in; a tokenizer that other rows make comes first."""
    config = load_settings(
        ExperimentConfig, ROOT / "configs/experiments/recipes.yaml", [f"output={tmp_path}", f"results={tmp_path}"]
    )
    jobs = {job.name: job for job in plan(config, set()) if job.name.startswith("rows ")}
    assert len(jobs) == 3
    first = "rows rows/python-packages"
    for name, job in jobs.items():
        line = job.commands[0].line(Path("launch"))
        assert line[1:3] == ["launch/prepare.py", "--config"]
        data = load_settings(RunConfig, line[3]).data
        assert (data.train_vocabulary is None) == (name != first)
        assert job.needs == ([] if name == first else [first])


def test_the_similarity_schedule_is_evaluated_by_name(tmp_path):
    """With the threshold of the evaluation, whatever the selection or the run has."""
    values = settings(tmp_path)
    values["studies"]["small"]["perplexity"]["threshold"] = 0.7
    jobs = plan(settings_from_dict(ExperimentConfig, values), set())
    commands = [c for job in jobs for c in job.commands if c.script == "evaluate.py"]
    assert len(commands) == 6
    for command in commands:
        overrides = [argument for argument in command.arguments if argument.startswith("refresh.")]
        config = changed_config(RefreshConfig(), overrides)
        names = [strategy.name for strategy in default_strategies(config, [5])]
        assert "refresh S=5 threshold 0.7" in names and "--threshold" not in command.arguments


def test_sigterm_ends_the_runs_too(tmp_path, launch, monkeypatch):
    """Nothing goes on alone, and two do not work in one output."""
    shutil.copy(ROOT / "launch" / "experiment.py", launch)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path)))
    command = [sys.executable, str(launch / "experiment.py"), "--config", str(path)]
    environment = {**os.environ, "slow": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run_file = tmp_path / "runs/small/base/run/run.yaml"
    end = time.monotonic() + 60
    while not run_file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(SettingsError, match="another experiment is running"):
        load_script("experiment").main(["--config", str(path)])
    first.terminate()
    assert first.wait(30) == 130
    trainers = subprocess.run(["pgrep", "-f", f"{launch}/train.py"], capture_output=True, text=True).stdout
    assert not trainers.strip()


def test_rows_are_prepared_beside_what_needs_devices(tmp_path):
    """But not where there are none, and every process wants the same cores."""
    jobs = [Job("base", [], devices="all"), Job("arm", []), Job("rows", [], devices="none"), Job("more", [])]
    for devices, busy, started in [
        (["0", "1"], 0, ["base", "rows"]),
        (["0", "1"], 1, ["rows"]),  # the base waits for all, and the arms behind it
        ([""], 0, ["base"]),
        (["", ""], 1, []),
    ]:
        running = [RunningJob(Job("before", []), [slot], [devices[slot]], tmp_path, tmp_path) for slot in range(busy)]
        left = _start_ready(jobs, running, Outcome(), devices, tmp_path, tmp_path)
        names = [active.job.name for active in running[busy:]]
        assert names == started and [job.name for job in left] == [p.name for p in jobs if p.name not in names]


def test_only_takes_patterns_that_match(tmp_path):
    chosen, jobs = load_script("experiment").chosen, plan(experiment(tmp_path), set())
    everything = [job.name for job in jobs]
    assert [job.name for job in chosen(jobs, None)] == everything
    assert [job.name for job in chosen(jobs, ["small/plain-*"])] == [
        name for name in everything if name.startswith(("rows", "small/base", "small/plain"))
    ]
    ordered = [job.name for job in chosen(jobs, ["small/plain-1", "small/none", "*"])]
    needed = [name for name in everything if name.startswith("rows") or name == "small/base"]
    assert ordered[: len(needed) + 2] == [*needed, "small/plain-1", "small/none"]
    assert sorted(ordered) == sorted(everything)
    with pytest.raises(SettingsError, match="--only other/[*]: no job that is left to do has this name"):
        chosen(jobs, ["small/*", "other/*"])
    with pytest.raises(SettingsError, match="--only results=elsewhere: .*; key=value goes before --only"):
        chosen(jobs, ["small/*", "results=elsewhere"])


def test_time_is_up_and_the_rest_is_continued(tmp_path, launch, monkeypatch):
    config = experiment(tmp_path)
    monkeypatch.setenv("slow", "1")
    began = time.monotonic()
    outcome, _ = go(config, launch, tmp_path, seconds=3.0)
    assert time.monotonic() - began < 20 and not outcome.failed
    assert "small/base" in outcome.left and len(outcome.left) == 6
    monkeypatch.delenv("slow")
    outcome, results = go(config, launch, tmp_path)
    assert not outcome.left and len(results.entries) == 6
    trained = [arguments for name, _, _, arguments in calls(tmp_path) if name == "train"]
    assert "--resume" not in trained[0] and "--resume" in trained[2]


def test_a_failed_job_costs_only_what_needs_it(tmp_path, launch, monkeypatch):
    monkeypatch.setenv("broken", "1")
    config = experiment(tmp_path)
    outcome, results = go(config, launch, tmp_path, devices=("", ""))
    assert list(outcome.failed) == ["small/whole-0"] and outcome.left == [] and len(results.entries) == 5
    assert "train.py" in outcome.failed["small/whole-0"].read_text()


def test_figures_of_other_settings_are_refused(finished, tmp_path):
    values = settings(tmp_path)
    values["studies"]["small"]["continued"]["training"]["steps"] = 3
    with pytest.raises(SettingsError, match="small/plain/0/paper/perplexity with other settings"):
        Results(settings_from_dict(ExperimentConfig, values))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("perplexity", r"report\.json measured something else than .* \(last tokens: 12 there, 13 here\)"),
        ("run", r"step-0000002 was made with other settings than .* \(training.learning_rate: .* there, 0.5 here\)"),
        ("rows", r"rows\.json was made with other settings than .* \(max_documents: 7 there, None here\)"),
    ],
)
def test_finished_work_of_other_settings_is_not_used_again(finished, tmp_path, what, message):
    """Its figures were not in results.json yet, or are gone."""
    shutil.rmtree(tmp_path / "results")
    values = settings(tmp_path)
    study = values["studies"]["small"]
    if what == "perplexity":
        study["perplexity"]["last_tokens"] = 13
    elif what == "run":
        study["continued"]["training"]["learning_rate"] = 0.5
    else:
        data = {**settings_to_dict(settings_from_dict(DataConfig, finished.data("small"))), "max_documents": 7}
        (tmp_path / "rows/rows.json").write_text(json.dumps({"data": data}))
    config = settings_from_dict(ExperimentConfig, values)
    with pytest.raises(SettingsError, match=message):
        plan(config, set())
        results = Results(config)
        for job in plan(finished, set()):
            if job.reports:
                results.add(job)
    assert not (tmp_path / "results/results.json").exists()


def test_rows_of_an_earlier_release_lack_settings_that_have_their_defaults(finished, tmp_path):
    data = settings_to_dict(settings_from_dict(DataConfig, finished.data("small")))
    del data["trust_remote_code"], data["fim"]
    (tmp_path / "rows/rows.json").write_text(json.dumps({"data": data}))
    plan(finished, set())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"a": 1}', '{"a": {}}', '{"a": {"kind": "perplexity", "study": 1}}', "\xff"]
)
def test_a_broken_file_of_figures_is_one_line(finished, tmp_path, content):
    file = tmp_path / "results/results.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(SettingsError, match=r"^results: .*results\.json holds no figures of an experiment") as error:
        Results(finished)
    assert "\n" not in str(error.value) and file.read_text(encoding="latin-1") == content


def test_a_base_with_another_configuration_is_refused(finished, tmp_path):
    """The same weights, another config.json: its figures are another model's."""
    assert Results(finished).entries
    (tmp_path / "runs/small/base/model/config.json").write_text('{"rms_norm_eps": 0.1}')
    with pytest.raises(SettingsError, match="from another base model"):
        Results(finished)


def entry(perplexities):
    return {"results": {name: {"perplexity": value} for name, value in perplexities.items()}}


def test_shares_of_the_gap_by_hand(tmp_path):
    values = settings(tmp_path, arms={"wider": {"selections": ["windows"]}})
    values["studies"]["small"]["arms"].insert(1, "wider")
    config = settings_from_dict(ExperimentConfig, values)
    entries = {
        "small/none/paper/perplexity": entry({"full": 10.0, "refresh S=5": 12.0}),
        "small/none/windows/perplexity": entry({"full": 10.0, "refresh S=5": 11.5}),
        "small/wider/windows/perplexity": entry({"full": 10.0, "refresh S=5": 11.5}),
        "small/plain/0/paper/perplexity": entry({"full": 8.0, "refresh S=5": 10.0}),
        "small/whole/0/windows/perplexity": entry({"full": 8.1, "refresh S=5": 9.1}),
        "small/whole/1/windows/perplexity": entry({"full": 8.3, "refresh S=5": 8.9}),
    }
    assert gaps_closed(config, "small", "none", "windows", entries, "refresh S=5") == [0.25]
    assert gaps_closed(config, "small", "plain", "paper", entries, "refresh S=5") == [0.0]
    assert gaps_closed(config, "small", "whole", "windows", entries, "refresh S=5") == pytest.approx([0.5, 0.7])
    lines = {line[0]: line for line in perplexity_table(config, "small", entries)}
    assert lines["wider"] == ["wider", "windows", "1", "10.000", "", "11.500", "25.0"]
    assert lines["whole"] == ["whole", "windows", "2", "8.200", "+2.50 %", "9.000 ± 0.141", "60.0 ± 14.1"]


GRID = """
selections: {own: {pool_kernel: 3}}
parts: [{selections: [own], strategies: ["refresh:4"], budgets: [8, 4]}]
"""
NAMES = ["own: refresh S=4, K=8", "own: refresh S=4, K=4"]


def with_grid(tmp_path, **changed):
    """Settings of an experiment that measures a grid on two texts, and nothing else."""
    (tmp_path / "grid.yaml").write_text(GRID)
    values = settings(tmp_path)
    texts = [str(tmp_path / "code"), str(tmp_path / "prose")]
    grid = {"grid": str(tmp_path / "grid.yaml"), "data": texts, "rows": 4, "last_tokens": 12, **changed}
    values["studies"]["small"] |= {"perplexity": None, "tradeoff": grid}
    return values


def measured(full, over):
    """results.json's entry of a grid: full attention on each text, and the loss of each strategy on each."""
    texts = ("code", "prose")
    points = [
        {"name": name, "read": 0.2, "losses": dict(zip(texts, own, strict=True))}
        for name, own in zip(NAMES, over, strict=True)
    ]
    return {"results": {"full attention": dict(zip(texts, full, strict=True)), "points": points}}


def test_a_grid_on_several_texts(tmp_path, launch):
    """It is measured once for each model, whatever selections the arm has, and its report is checked."""
    values = with_grid(tmp_path)
    config = settings_from_dict(ExperimentConfig, values)
    (none,) = [job for job in plan(config, set()) if job.name == "small/none"]
    assert [command.script for command in none.commands] == ["sweep.py"] and none.names == {"small/none/paper/tradeoff"}
    line = " ".join(none.commands[0].arguments)
    assert f"--data {tmp_path}/code --data {tmp_path}/prose --rows 4 --split test --last-tokens 12" in line
    outcome, results = go(config, launch, tmp_path)
    assert not outcome.failed and len(results.entries) == 5
    assert results.entries["small/none/paper/tradeoff"]["rows"] == "f g"
    assert "## small: prose" in write_tables(config, results.entries)
    assert (tmp_path / "results/small-tradeoff.png").stat().st_size > 1000
    assert len(Results(config).entries) == 5 and plan(config, set(results.entries)) == []
    with pytest.raises(SettingsError, match="small/none/paper/tradeoff with other settings"):
        Results(settings_from_dict(ExperimentConfig, with_grid(tmp_path, last_tokens=11)))
    (tmp_path / "grid.yaml").write_text(GRID.replace("8, 4", "8, 5"))
    with pytest.raises(SettingsError, match="small/none/paper/tradeoff with other settings"):
        Results(settings_from_dict(ExperimentConfig, values))
    for change, message in [({"grid": "nothing"}, "tradeoff.grid"), ({"data": []}, "tradeoff.data")]:
        with pytest.raises(SettingsError, match=message):
            settings_from_dict(ExperimentConfig, with_grid(tmp_path, **change))


def test_gaps_beside_plain_training_by_hand(tmp_path):
    config = settings_from_dict(ExperimentConfig, with_grid(tmp_path))
    entries = {
        "small/none/paper/tradeoff": measured((10.0, 20.0), ((0.2, 0.1), (0.4, 0.2))),
        "small/plain/0/paper/tradeoff": measured((8.0, 16.0), ((0.125, 0.1), (0.25, 0.2))),
        "small/whole/0/windows/tradeoff": measured((8.0, 16.0), ((0.05, 0.01), (0.1, 0.02))),
        "small/whole/1/windows/tradeoff": measured((8.2, 16.0), ((0.0, 0.03), (0.1, 0.02))),
    }
    tables = tradeoff_tables(config, "small", entries)
    assert list(tables) == ["code", "prose"] and tables["code"][0] == ["arm", "seeds", "full", "against plain", *NAMES]
    lines = {line[0]: line for line in tables["code"]}
    assert lines["none"] == ["none", "1", "10.000", "", "+20.00 % (200%, 100%)", "+40.00 % (200%, 100%)"]
    assert lines["plain"][4] == "+12.50 % (100%, 50%)"
    # gaps of 0.4 and 0, beside 1 of plain training and 2 of the untrained model
    assert lines["whole"][1:5] == ["2", "8.100", "+1.25 %", "+2.50 ± 3.54 % (20%, 10%)"]
    assert tradeoff_tables(config, "small", {}) == {}


def test_scores_of_tasks_by_hand(tmp_path):
    values = settings(tmp_path)
    values["studies"]["small"]["tasks"] = {"names": ["chain_of_key"], "length": 400, "strategies": ["full", "h2o"]}
    config = settings_from_dict(ExperimentConfig, values)

    def scores(full, h2o):
        pairs = (("full", full), ("H2O", h2o))
        return {"results": [{"task": "chain", "decoding": name, "scores": {"score": s}} for name, s in pairs]}

    entries = {f"small/whole/{seed}/windows/tasks": scores(0.9 + seed / 10, 0.3) for seed in (0, 1)}
    assert task_table(config, "small", entries)[1:] == [
        ["whole", "windows", "full", "2", "95.0 ± 7.1"],
        ["whole", "windows", "H2O", "2", "30.0 ± 0.0"],
    ]
    write_tables(config, entries)
    assert (tmp_path / "results/small-tasks.png").stat().st_size > 1000


def test_tasks_under_a_grid(tmp_path):
    """Each arm has one evaluation, whatever selections it has; figures of another grid are refused."""
    (tmp_path / "grid.yaml").write_text(GRID)
    values = settings(tmp_path)
    tasks = {"names": ["vt", "fwe"], "length": 400, "grid": str(tmp_path / "grid.yaml"), "compile": False}
    values["studies"]["small"] |= {"perplexity": None, "tasks": {**tasks, "mix_tasks": True}}
    config = settings_from_dict(ExperimentConfig, values)
    (none,) = [job for job in plan(config, set()) if job.name == "small/none"]
    assert none.names == {"small/none/paper/tasks"}
    line = " ".join(none.commands[0].arguments)
    assert f"--mix-tasks --no-compile --grid {tmp_path}/grid.yaml" in line and "refresh." not in line
    found = {"task": ["vt", "fwe"], "score": [0.5, 0.25]}
    pairs = [(task, name) for task in found["task"] for name in ("full", *NAMES)]
    entry = {"study": "small", "arm": "none", "seed": None, "selection": "paper", "kind": "tasks", "base model": None}
    entry["results"] = [{"task": t, "decoding": n, "scores": {"score": {"vt": 0.5, "fwe": 0.25}[t]}} for t, n in pairs]
    assert task_table(config, "small", {"small/none/paper/tasks": entry})[1] == [
        *("none", "paper", "full", "1", "50.0", "25.0", "37.5")
    ]
    results = Results(config)
    entry["settings"] = results._settings(entry)
    (tmp_path / "results").mkdir(exist_ok=True)
    (tmp_path / "results/results.json").write_text(json.dumps({"small/none/paper/tasks": entry}))
    assert Results(config).entries
    (tmp_path / "grid.yaml").write_text(GRID.replace("8, 4", "8, 5"))
    with pytest.raises(SettingsError, match="small/none/paper/tasks with other settings"):
        Results(settings_from_dict(ExperimentConfig, values))
    values["studies"]["small"]["tasks"] = {**tasks, "strategies": ["full"]}
    with pytest.raises(SettingsError, match="either strategies or a grid"):
        settings_from_dict(ExperimentConfig, values)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("studies", "small", "arms"), ["plain"], "must have none"),
        (("studies", "small", "arms"), ["none", "wole"], "no 'wole'"),
        (("arms", "none", "selections"), ["windos"], "no 'windos'"),
        (("arms", "none", "selections"), [], "arms.none.selections"),
        (("studies", "small", "perplexity"), None, "evaluates nothing"),
        (("studies", "small", "start"), "large", "no 'large'"),
        (("studies", "small", "seeds"), [], "studies.small.seeds"),
        (("studies", "small", "perplexity", "last_tokens"), 48, "last tokens must lie"),
        (("studies", "small", "perplexity", "split"), "tests", "split"),
        (("studies", "small", "tasks"), {"names": ["chain"], "length": 40, "strategies": ["full"]}, "chain"),
        (("studies", "small", "tasks"), {"names": ["vt"], "length": 40, "strategies": ["fll"]}, "fll"),
        (("studies", "small", "base", "data"), {"row_length": 4}, "base.data"),
        (("studies", "small", "settings", "data", "folder"), None, "data.folder"),
        (("studies", "small", "start"), "small", "comes back to small"),
        (("studies", "small", "continued", "training", "step"), 3, "training.step"),
        (("arms", "whole", "settings", "simulation", "stride"), 0, "simulation.stride"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, place, value, message):
    values = settings(tmp_path)
    *sections, key = place
    section = values
    for name in sections:
        section = section[name]
    section[key] = value
    with pytest.raises(SettingsError, match=message):
        settings_from_dict(ExperimentConfig, values)


def draw_one_of_each_kind():
    """In place of `drawn`: draws the first figure of each kind, for each takes a second."""
    kinds = set()

    def drawn(name, draw):
        kind = name.rpartition("-")[2]
        is_first = kind not in kinds
        kinds.add(kind)
        return draw() if is_first else b""

    return drawn


@pytest.mark.parametrize(
    ("name", "planned", "known", "left"),
    [
        (
            "recipes",
            {"30m-4k/base", "30m-4k/distilled-2", "120m-8k/whole-0", "tasks-2k/distilled-answers-0"},
            "30m-4k/none/paper/perplexity",
            ["30m-8k/base", "30m-8k/distilled-1", "30m-8k/distilled-2"],
        ),
        ("plain-share", {"small/mixed25-2"}, "small/none/paper/perplexity", []),
        (
            "smollm2",
            {"smollm2/none", "smollm2/plain-0", "every-second/every-second-lora-0"},
            "smollm2/recommended/2/own/tradeoff",
            [],
        ),
        ("smollm2-tasks", {"tasks-8k/base", "tasks-4k/recommended-0"}, "tasks-8k/recommended/0/own/tasks", []),
    ],
)
def test_the_figures_of_the_repository(tmp_path, monkeypatch, name, planned, known, left):
    """They are of the settings that stand there, and whole but for what docs/results.md says is missing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("refreshkv.train.experiment.report.drawn", draw_one_of_each_kind())
    published = ROOT / "docs/results" / name
    shutil.copy(published / "results.json", tmp_path)
    # an output of its own: whoever has run the experiment here has other base models
    overrides = [f"results={tmp_path}", f"output={tmp_path}"]
    config = load_settings(ExperimentConfig, ROOT / f"configs/experiments/{name}.yaml", overrides)
    assert planned <= {job.name for job in plan(config, set())}
    entries = Results(config).entries
    assert known in entries
    remaining = [job.name for job in plan(config, set(entries))]
    assert [job for job in remaining if not job.startswith("rows")] == left
    assert remaining == [] or left  # rows are made for what is left alone
    for name, study in config.studies.items():  # more seeds than a run by the file alone has
        own = [entry["seed"] for entry in entries.values() if entry["study"] == name and entry["seed"] is not None]
        study.seeds = sorted({*own, *study.seeds})
    assert write_tables(config, entries) == (published / "tables.md").read_text()


@pytest.mark.slow
def test_the_scripts_themselves(tmp_path):
    """Everything with launch/'s own scripts, stopped once by --minutes."""
    values = settings(tmp_path)
    rows = make_rows(tmp_path)
    values["studies"]["small"]["settings"]["data"] |= {"folder": str(rows)}
    values["studies"]["small"] |= {"seeds": [0]}
    values["studies"]["small"]["perplexity"] |= {"split": "train", "threshold": 0.5}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, str(ROOT / "launch/experiment.py"), "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run([*command, "--minutes", "0.3"], capture_output=True, text=True, env=environment)
    assert first.returncode == 0 and "left for the next time" in first.stdout, first.stdout + first.stderr
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "| whole | windows | 1 |" in second.stdout and "| refresh S=5 threshold 0.5 |" in second.stdout
    assert len(json.loads(Path(values["results"], "results.json").read_text())) == 4


def test_an_arm_beside_another_has_its_share_of_the_gain(tmp_path):
    """Gain: the untrained model's perplexity under a strategy, less the arm's; 4 of 5, and a dash beside no gain."""
    arms = {"none": {"selections": ["paper"]}, "full": {"selections": ["paper"], "settings": {}}}
    arms["lora"] = {"selections": ["paper"], "settings": {"simulation": {"pattern": "off"}}, "beside": "full"}
    study = {"arms": ["none", "full", "lora"], "seeds": [0], "perplexity": None}
    study["tradeoff"] = {"grid": "budgets", "data": ["rows"], "last_tokens": 12}
    changed = {"arms": {"plain": {"selections": ["paper"], "settings": {}}, **arms}, "studies": {"small": study}}
    config = experiment(tmp_path, **changed)

    def entry(full, loss):
        points = [
            {"name": "a", "losses": {"rows": loss}, "read": 0.2},
            {"name": "b", "losses": {"rows": 0.0}, "read": 0.2},
        ]
        return {"results": {"full attention": {"rows": full}, "points": points}}

    entries = {"small/none/paper/tradeoff": entry(5.0, 1.0), "small/full/0/paper/tradeoff": entry(5.0, 0.0)}
    assert len(gain_table(config, "small", entries)) == 1
    entries["small/lora/0/paper/tradeoff"] = entry(4.0, 0.5)
    _, first, second = gain_table(config, "small", entries)
    assert first == ["lora", "full", "rows", "a", "10.000", "6.000", "5.000", "80.0 %"] and second[-1] == "-"
    study["arms"] = ["none", "lora"]
    with pytest.raises(SettingsError, match="arms.lora.beside=full needs that arm and a tradeoff"):
        experiment(tmp_path, **changed)
