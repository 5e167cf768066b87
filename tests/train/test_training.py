"""Training end to end on CPU ranks: exact resume, the same numbers on any number of ranks, refusals."""

import json
import random
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from refreshkv import NEVER, RefreshConfig, Simulation, Trace
from refreshkv.settings import SettingsError, settings_from_dict
from refreshkv.simulation.draw import draw_simulation, effective_strides
from refreshkv.train.batch import make_batch
from refreshkv.train.config import RunConfig, SimulationConfig
from refreshkv.train.engine import build_engine, init_processes
from refreshkv.train.job import resolve
from refreshkv.train.loss import CausalLossModel
from refreshkv.train.manifest import write_manifest
from refreshkv.train.mock import mock_step
from refreshkv.train.order import RowOrder
from refreshkv.train.resume import needs_conversion
from refreshkv.train.run_folder import State, claim_output, finished_checkpoints, read_run, run_id, validate_output
from refreshkv.train.simulation import heaviest_simulation
from refreshkv.train.step import train_step
from refreshkv.train.validation import setting_warnings, validate_preparation, validate_settings
from tests.helpers.jobs import (
    ROOT,
    ROW_LENGTH,
    VOCABULARY,
    kill_job,
    make_rows,
    read_metrics,
    run_job,
    run_settings,
    start_job,
    write_config,
)
from tests.helpers.marks import slow_tuples_unless, slow_unless
from tests.helpers.models import random_ids, tiny_enabled, tiny_model
from tests.helpers.ranks import Ranks, run_ranks, run_script
from tests.helpers.scripts import load_script

LOSSES = ("loss", "loss full", "loss partial", "grad norm")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


def train_main(arguments):
    """`launch/train.py` in this process."""
    load_script("train").main(arguments)


def losses(output):
    return {step: [values.get(name) for name in LOSSES] for step, values in read_metrics(output).items()}


@pytest.mark.slow
def test_killed_and_resumed_run_repeats_the_uninterrupted_one(rows, tmp_path):
    """SIGKILL of all ranks at a random step, ZeRO 2, fp32, 2 ranks: the same losses, exactly."""
    straight = run_settings(rows, tmp_path / "straight", training={"steps": 9, "save_every": 2})
    code, printed = run_job(straight)
    assert code == 0, printed
    expected = losses(tmp_path / "straight")
    assert list(expected) == list(range(1, 10))

    killed = run_settings(rows, tmp_path / "killed", training={"steps": 9, "save_every": 2})
    stop_after = random.randint(1, 8)
    job = start_job(killed)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while job.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= stop_after:
            break
        time.sleep(0.01)
    kill_job(job)
    before = losses(tmp_path / "killed")
    assert before == {step: expected[step] for step in before}

    code, printed = run_job(killed, "--resume")
    assert code == 0, printed
    assert losses(tmp_path / "killed") == expected, f"killed after step {stop_after}"


def run_forked(settings, *arguments, ranks=2):
    """A job without a launcher: what it printed."""
    log = Path(settings["training"]["output"]).with_suffix(".txt")
    return run_ranks(ranks, log, run_script, ["--config", str(write_config(settings)), *arguments])


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory):
    """Six steps of one process without ZeRO."""
    folder = tmp_path_factory.mktemp("alone")
    run_forked(run_settings(rows, folder / "run", **six_steps(folder, 0)), ranks=1)
    return losses(folder / "run")


def six_steps(folder, stage, **training):
    training = {"steps": 6, "save_every": 3, "deepspeed": zero_json(folder, stage), **training}
    return {"simulation": {"threshold": 0.2}, "training": training}


@pytest.mark.parametrize(
    ("stage", "ranks", "sequence"),
    slow_tuples_unless([(0, 2, 1), (2, 4, 2)], [(0, 2, 1), (1, 2, 2), (2, 4, 2), (3, 4, 4)]),
)
def test_ranks_stages_and_layouts_agree(rows, alone, tmp_path, stage, ranks, sequence):
    """Several processes with or without ZeRO take the steps of one, with activations recomputed; evaluations work."""
    evaluation = {"evaluate_every": 6, "evaluate_rows": 4, "evaluate_tokens": 16}
    sections = six_steps(tmp_path, stage, activation_checkpointing=True, **evaluation)
    run_forked(run_settings(rows, tmp_path / "run", parallel={"sequence": sequence}, **sections), ranks=ranks)
    for step, found in losses(tmp_path / "run").items():
        assert found == pytest.approx(alone[step], abs=2e-5), f"step {step}"
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (evaluated,) = (line for line in lines if "evaluation" in line)
    assert set(evaluated["evaluation"]) == {"full", "refresh"} and 0 < evaluated["acceptance"] < 1


@pytest.fixture(scope="module")
def two_ranks(rows, tmp_path_factory):
    """Stage -> a run of two ranks that was stopped after step 3 of 6."""
    runs = {}

    def run(stage):
        if stage not in runs:
            folder = tmp_path_factory.mktemp(f"stage{stage}")
            run_forked(run_settings(rows, folder / "run", **six_steps(folder, stage, keep_checkpoints=9)))
            shutil.rmtree(folder / "run" / "checkpoints" / "step-0000006")
            runs[stage] = folder / "run"
        return runs[stage]

    return run


@pytest.mark.parametrize(
    ("before", "now", "ranks", "sequence"),
    slow_tuples_unless(
        [(3, 3, 1, 1), (2, 1, 1, 1)],
        [(3, 3, 1, 1), (2, 1, 1, 1), (3, 3, 4, 2), (3, 3, 4, 1), (1, 2, 4, 4), (0, 0, 4, 2)],
    ),
)
def test_a_run_continues_on_another_layout(rows, alone, two_ranks, tmp_path, before, now, ranks, sequence):
    shutil.copytree(two_ranks(before), tmp_path / "run")
    sections = six_steps(tmp_path, now, micro_batch=1)
    settings = run_settings(rows, tmp_path / "run", parallel={"sequence": sequence}, **sections)
    printed = run_forked(settings, "--resume", ranks=ranks)
    assert "continuing after step 3" in printed
    found = losses(tmp_path / "run")
    assert list(found) == [1, 2, 3, 4, 5, 6]
    for step in (4, 5, 6):
        assert found[step] == pytest.approx(alone[step], abs=1e-4), f"step {step}"
    names = {folder.name for folder in (tmp_path / "run" / "checkpoints").glob("*universal*")}
    assert not names, "what was made to convert is removed"


def test_stages_that_do_not_convert_are_refused():
    for before, now in [(0, 2), (1, 0), (3, 0), (2, 3), (3, 2), (3, 1)]:
        with pytest.raises(SettingsError, match=f"training.deepspeed.*stage {before}, or .*launch/export.py"):
            needs_conversion(State(3, 100, 2, before, "rows"), 2, now)
    assert needs_conversion(State(3, 100, 2, 2, "rows"), 2, 1)
    assert not needs_conversion(State(3, 100, 2, 3, "rows"), 2, 3)
    assert not needs_conversion(State(3, 100, 2, 0, "rows"), 4, 0)
    assert needs_conversion(State(3, 100, 2, 3, "rows"), 4, 3)


@pytest.mark.slow
def test_stage_0_in_bf16_continues_on_another_number_of_ranks(rows, tmp_path):
    sections = six_steps(tmp_path, 0, dtype="bf16", keep_checkpoints=9)
    settings = run_settings(rows, tmp_path / "run", **sections)
    run_forked(settings)
    expected = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000006")
    assert "continuing after step 3" in run_forked(settings, "--resume", ranks=1)
    for step, found in losses(tmp_path / "run").items():
        assert found[0] == pytest.approx(expected[step][0], abs=0.01), f"step {step}"


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"),
    slow_tuples_unless(
        [(0, 1, "bf16"), (3, 2, "fp32")],
        [
            (0, 1, "bf16"),
            (3, 2, "fp32"),
            (0, 2, "fp32"),
            (1, 2, "bf16"),
            (1, 1, "fp32"),
            (2, 2, "bf16"),
            (2, 1, "fp32"),
            (3, 2, "bf16"),
        ],
    ),
)
def test_8bit_moments_resume_exactly(rows, tmp_path, stage, ranks, dtype):
    pytest.importorskip("bitsandbytes")
    sections = six_steps(tmp_path, stage, dtype=dtype, optimizer="adamw-8bit", keep_checkpoints=9)
    settings = run_settings(rows, tmp_path / "run", **sections)
    run_forked(settings, ranks=ranks)
    expected = losses(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000003"
    assert any(tensor.dtype == torch.uint8 for tensor in tensors_of(checkpoint)), "large tensors have 8-bit moments"
    shutil.rmtree(checkpoint.with_name("step-0000006"))
    assert "continuing after step 3" in run_forked(settings, "--resume", ranks=ranks)
    assert losses(tmp_path / "run") == expected


def tensors_of(checkpoint):
    """All tensors in DeepSpeed's files of a checkpoint."""
    left = [torch.load(file, weights_only=False) for file in checkpoint.glob("*.pt")]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            left += value.values() if isinstance(value, dict) else value


@pytest.mark.parametrize(("before", "now"), [(0, 1), (1, 1), (3, 2), (2, 0)])
def test_layouts_that_do_not_convert_change_nothing(rows, tmp_path, monkeypatch, before, now):
    """A checkpoint of two ranks, continued by one."""
    monkeypatch.setattr("refreshkv.train.job.validate_optimizer", lambda training: None)
    output = tmp_path / "run"
    claim_output(output, run_config(training={"optimizer": "adamw-8bit"}, data={"folder": str(rows)}), overwrite=False)
    checkpoint = output / "checkpoints" / "step-0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(vars(State(3, 100, 2, before, "rows", run_id(output)))))
    shutil.copyfile(output / "run.yaml", checkpoint / "run.yaml")
    write_manifest(checkpoint)
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    training = {"optimizer": "adamw-8bit", "deepspeed": zero_json(tmp_path, now)}
    error = refused(run_settings(rows, output, training=training), "--resume")
    assert "training.deepspeed" in error and f"stage {before}" in error
    converts = before == now or {before, now} == {1, 2}
    assert "training.optimizer=adamw-8bit" in error and "2 ranks" in error or not converts
    assert files == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def zero_json(folder, stage):
    path = folder / f"zero{stage}.json"
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": zero if stage == 3 else {"stage": stage}}))
    return str(path)


def test_bf16_similarity_and_evaluation(rows, tmp_path):
    settings = run_settings(
        rows,
        tmp_path / "run",
        simulation={"threshold": 0.2},
        training={"dtype": "bf16", "steps": 4, "evaluate_every": 2, "evaluate_rows": 5, "evaluate_tokens": 16},
    )
    run_forked(settings, ranks=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line["evaluation"] for line in lines if "evaluation" in line]
    assert len(evaluations) == 2 and set(evaluations[0]) == {"full", "refresh"}
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert [folder.name for folder in finished_checkpoints(tmp_path / "run")] == ["step-0000003", "step-0000004"]


def test_the_paper_recipe(rows, tmp_path):
    simulation = {"pattern": "paper", "prompt_length": None, "stride": 10}
    run_forked(run_settings(rows, tmp_path / "run", simulation=simulation, training={"steps": 1}), ranks=1)
    assert "loss partial" in read_metrics(tmp_path / "run")[1]


def test_plain_steps_among_the_others(rows, tmp_path):
    changes = {"simulation": {"plain_share": 0.5}, "distillation": {"weight": 1.0}, "training": {"steps": 6}}
    settings = run_settings(rows, tmp_path / "run", **changes)
    config = settings_from_dict(RunConfig, settings)
    steps = {
        n: draw_simulation(config.simulation, config.refresh, ROW_LENGTH, config.training.seed, n) for n in range(1, 7)
    }
    plain = {number for number, simulation in steps.items() if simulation is None}
    assert 0 < len(plain) < 6
    run_forked(settings, ranks=2)
    metrics = read_metrics(tmp_path / "run")
    for kind in ("loss partial", "divergence"):
        assert {step for step in steps if kind not in metrics[step]} == plain


def test_a_loss_that_is_not_finite_stops_before_the_step(rows, tmp_path):
    training = {"learning_rate": 1000.0, "weight_decay": 1000.0, "save_every": 1, "warmup_steps": 0, "max_grad_norm": 0}
    simulation = {"pattern": "off", "prompt_length": None}
    config = write_config(run_settings(rows, tmp_path / "run", training=training, simulation=simulation))
    job = Ranks(1, tmp_path / "printed.txt", run_script, ["--config", str(config)])
    codes = job.wait()
    errors = [line for line in job.printed.splitlines() if line.startswith("error: ")]
    assert codes != [0] and len(errors) == 1, job.printed
    assert "loss partial" not in read_metrics(tmp_path / "run")[1]
    assert "is not finite" in errors[0] and "step-0000001" in errors[0]
    assert (tmp_path / "run" / "checkpoints" / "step-0000001" / "state.json").exists()


def refused(settings, *arguments):
    """The one-line error of a job that must not start; raised before any process group or file is made."""
    with pytest.raises(SettingsError) as error:
        train_main(["--config", str(write_config(settings)), *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_in_use(rows, tmp_path):
    output = tmp_path / "run"
    settings = run_settings(rows, output, training={"steps": 1})
    run_forked(settings, ranks=1)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    error = refused(settings)
    assert "--resume" in error and "--overwrite" in error
    changed = run_settings(rows, output, training={"steps": 1, "learning_rate": 0.5})
    assert "training.learning_rate" in refused(changed, "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}

    other = tmp_path / "not-a-run"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "not a run's folder" in refused(run_settings(rows, other), "--overwrite")
    assert "holds no run" in refused(run_settings(rows, other), "--resume")
    assert (other / "thesis.txt").read_text() == "mine"
    validate_output(output, settings_from_dict(RunConfig, settings), resume=False, overwrite=True)
    claim_output(output, settings_from_dict(RunConfig, settings), overwrite=True)
    assert sorted(path.name for path in output.iterdir()) == [".training", "run.json", "run.yaml"]


def test_refused_before_anything_is_written(rows, tmp_path):
    output = tmp_path / "run"
    gathered = tmp_path / "zero3.json"
    gathered.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    batched = tmp_path / "batched.json"
    batched.write_text(json.dumps({"train_batch_size": 4}))
    for sections, named in [
        ({"training": {"stepz": 3}}, "training.stepz"),
        ({"training": {"steps": "many"}}, "training.steps"),
        ({"training": {"lr_schedule": "linaer"}}, "training.lr_schedule"),
        ({"training": {"lr_schedule": "linear", "schedule": "linear"}}, "training.schedule"),
        ({"training": {"loss": "liger"}}, "training.loss must be one of chunked, logits"),
        ({"refresh": {"budget": 0}}, "budget"),
        ({"training": {"deepspeed": str(gathered)}}, "stage3_gather_16bit_weights_on_model_save"),
        ({"training": {"deepspeed": str(batched)}}, "train_batch_size"),
        ({"training": {"deepspeed": "nowhere.json"}}, "training.deepspeed"),
        ({"data": {"folder": str(tmp_path / "nowhere")}}, "data.folder"),
        ({"model": {"scratch": {"model_type": "llama", "vocab_size": 50}}}, "tokenizer"),
        ({"model": {"scratch": {"model_type": "llama", "hidden_sise": 50}}}, "model.scratch.hidden_sise"),
        ({"model": {"scratch": None, "path": str(tmp_path / "nowhere")}}, "model.path"),
        ({"training": {"global_batch": 7}}, "training.global_batch"),
    ]:
        assert named in refused(run_settings(rows, output, **sections))
        assert not output.exists(), named


def test_an_error_is_one_line_and_a_failed_exit(rows, tmp_path):
    config = write_config(run_settings(rows, tmp_path / "run", training={"stepz": 3}))
    ranks = Ranks(2, tmp_path / "printed.txt", run_script, ["--config", str(config)])
    assert ranks.wait() == [2, 2], ranks.printed
    errors = [line for line in ranks.printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "training.stepz" in errors[0], ranks.printed


@pytest.mark.slow
def test_an_error_is_one_line_and_a_failed_exit_of_the_launcher(rows, tmp_path):
    code, printed = run_job(run_settings(rows, tmp_path / "run", training={"stepz": 3}))
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(errors) == 1 and "training.stepz" in errors[0], printed


def test_nothing_is_printed_after_the_refusal_of_a_job(rows, tmp_path):
    """Rank 0 looks at the folder while the others wait for it to connect, until the launcher sends them SIGTERM."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    settings = run_settings(rows, tmp_path / "run")
    ranks = Ranks(2, tmp_path / "printed.txt", run_script, ["--config", str(write_config(settings))])
    ranks.processes[0].join(120)
    time.sleep(2)
    ranks.signal(1, signal.SIGTERM)
    assert ranks.wait(10) == [2, -signal.SIGTERM], ranks.printed
    last = ranks.printed.strip().splitlines()[-1]
    assert last.startswith("error: training.output") and "--overwrite" in last, ranks.printed


def test_another_tokenizer_is_refused(rows, tmp_path):
    """Same size, other tokens: training would go on and mean nothing."""
    model = tiny_model(dtype=torch.float32, vocab_size=VOCABULARY)
    model.save_pretrained(tmp_path / "model")
    tokenizer = json.loads((rows / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    shutil.copytree(rows / "tokenizer", tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = run_settings(rows, tmp_path / "run")
    settings["model"] = {"path": str(tmp_path / "model")}
    assert "another tokenizer" in refused(settings)


def run_config(**sections):
    return settings_from_dict(RunConfig, run_settings("rows", "run", **sections))


def test_settings_that_contradict_each_other():
    info = {"data": {"row_length": ROW_LENGTH}}
    for sections, named in [
        ({"refresh": {"stride": 0}}, "stride"),
        ({"refresh": {"budget": -1}}, "budget"),
        ({"simulation": {"stride": []}}, "simulation.stride"),
        ({"simulation": {"stride": [5, 0]}}, "simulation.stride"),
        ({"simulation": {"stride": "ever"}}, "simulation.stride"),
        ({"simulation": {"select_stride": []}}, "simulation.select_stride"),
        ({"simulation": {"select_stride": [2, 0]}}, "simulation.select_stride"),
        ({"simulation": {"select_stride": 1.5}}, "simulation.select_stride"),
        ({"simulation": {"pattern": "paper", "prompt_length": None, "select_stride": 2}}, "simulation.select_stride"),
        ({"simulation": {"budget": []}}, "simulation.budget"),
        ({"simulation": {"budget": [8, 0]}}, "simulation.budget"),
        ({"simulation": {"budget": "150%"}}, "simulation.budget"),
        ({"simulation": {"pattern": "paper", "prompt_length": None, "budget": 8}}, "simulation.budget"),
        ({"simulation": {"prompt_length": [8, ROW_LENGTH]}}, "simulation.prompt_length"),
        ({"simulation": {"prompt_length": 0}}, "simulation.prompt_length"),
        ({"simulation": {"pattern": "off"}}, "simulation.prompt_length"),
        ({"simulation": {"plain_share": 1.0}}, "simulation.plain_share"),
        ({"simulation": {"plain_share": -0.1}}, "simulation.plain_share"),
        ({"simulation": {"pattern": "off", "prompt_length": None, "plain_share": 0.5}}, "simulation.plain_share"),
        ({"simulation": {"pattern": "paper", "prompt_length": None, "stride": ROW_LENGTH}}, "simulation.stride"),
        ({"data": {"row_length": 40}}, "data.row_length"),
        ({"training": {"evaluate_every": 1, "evaluate_tokens": ROW_LENGTH}}, "training.evaluate_tokens"),
        ({"training": {"loss_on": "answers"}}, "training.loss_on"),
        ({"distillation": {"weight": -1.0}}, "distillation.weight"),
        ({"distillation": {"temperature": 0.0}}, "distillation.temperature"),
        (
            {"distillation": {"weight": 1.0}, "simulation": {"pattern": "off", "prompt_length": None}},
            "distillation.weight",
        ),
    ]:
        with pytest.raises(SettingsError, match=named):
            config = run_config(**sections)
            validate_settings(config)
            validate_preparation(config, info)


def test_settings_of_the_release_before(tmp_path):
    """A user's file with an old name gets a warning; a run that was saved with old values loads as it is."""
    with pytest.warns(UserWarning, match="training.schedule is now training.lr_schedule"):
        assert run_config(training={"schedule": "cosine"}).training.lr_schedule == "cosine"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"training": {"schedule": "cosine", "loss": "liger"}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training = read_run(tmp_path).training
    assert (training.lr_schedule, training.loss) == ("cosine", "chunked")


def test_a_budget_beyond_the_context_is_warned_of():
    assert setting_warnings(run_config(refresh={"budget": 8})) == []
    assert "refresh.budget" in setting_warnings(run_config(refresh={"budget": ROW_LENGTH}))[0]


def test_selecting_steps_that_are_not_trained_for_are_warned_of():
    refresh = {"budget": 8, "select_stride": 2}
    (warning,) = setting_warnings(run_config(refresh=refresh))
    assert "simulation.select_stride is null" in warning
    assert setting_warnings(run_config(refresh=refresh, simulation={"select_stride": [2, None]})) == []


def test_simulations_follow_from_seed_and_step():
    settings = SimulationConfig(prompt_length=[8, 30], stride=[2, 5, 10])
    refresh = RefreshConfig(budget=8, stride=3, sink_tokens=1)
    drawn = [draw_simulation(settings, refresh, ROW_LENGTH, 7, step) for step in range(300)]
    assert drawn == [draw_simulation(settings, refresh, ROW_LENGTH, 7, step) for step in range(300)]
    assert {simulation.prompt_length for simulation in drawn} == set(range(8, 31))
    assert {simulation.config.stride for simulation in drawn} == {2, 5, 10}
    assert drawn[0].config == replace(refresh, stride=drawn[0].config.stride)
    assert drawn != [draw_simulation(settings, refresh, ROW_LENGTH, 8, step) for step in range(300)]

    mixed = replace(settings, plain_share=0.3)
    others = [draw_simulation(mixed, refresh, ROW_LENGTH, 7, step) for step in range(300)]
    assert 60 < others.count(None) < 120
    assert all(other in (None, simulation) for other, simulation in zip(others, drawn, strict=True))

    paper = draw_simulation(SimulationConfig(pattern="paper", stride=10), refresh, ROW_LENGTH, 7, 1)
    assert (paper.prompt_length, paper.config.stride) == (ROW_LENGTH - 10, NEVER)
    assert draw_simulation(SimulationConfig(pattern="off"), refresh, ROW_LENGTH, 7, 1) is None


def test_chunks_are_drawn_apart():
    """Everything else stays what it is without; ends are ascending and leave the last chunk the observation window."""
    refresh = RefreshConfig(budget=8, observation_window=3)
    settings = SimulationConfig(prompt_length=[1, 30], stride=[5, 10])
    drawn = [draw_simulation(replace(settings, chunks=[1, 4]), refresh, ROW_LENGTH, 7, step) for step in range(80)]
    for step, simulation in enumerate(drawn):
        assert replace(simulation, chunks=None) == draw_simulation(settings, refresh, ROW_LENGTH, 7, step)
        if simulation.chunks is not None:
            assert simulation.chunks[-1] - simulation.chunks[-2] >= 3
            assert len(simulation.chunks) == min(4, simulation.prompt_length - 2)
    assert 15 < sum(simulation.chunks is None for simulation in drawn) < 65
    assert len({simulation.chunks for simulation in drawn}) > 15


def test_budgets_are_drawn_apart():
    """Everything else stays what it is without; a warning comes only if no budget is small."""
    refresh = RefreshConfig(budget=8, select_stride=2)
    settings = {"prompt_length": [8, 30], "stride": [5, 10], "select_stride": [1, 3]}
    without = settings_from_dict(SimulationConfig, settings)
    drawing = settings_from_dict(SimulationConfig, {**settings, "budget": [4, "25%", 12]})
    drawn = [draw_simulation(drawing, refresh, ROW_LENGTH, 7, step) for step in range(60)]
    for step, simulation in enumerate(drawn):
        plain = draw_simulation(without, refresh, ROW_LENGTH, 7, step)
        assert simulation == replace(plain, config=replace(plain.config, budget=simulation.config.budget))
    assert {simulation.config.budget for simulation in drawn} == {4, 0.25, 12}
    one = settings_from_dict(SimulationConfig, {**settings, "budget": 5})
    assert draw_simulation(one, refresh, ROW_LENGTH, 7, 1).config.budget == 5
    config = run_config(refresh={"budget": 8}, simulation={"budget": [4, 12, "50%"]})
    assert heaviest_simulation(config).config.budget == 12
    assert setting_warnings(run_config(simulation={"budget": [8, 9999]})) == []
    (warning,) = setting_warnings(run_config(simulation={"budget": [8888, 9999]}))
    assert "simulation.budget=[8888, 9999] is never smaller" in warning


def test_select_strides_are_drawn_apart():
    """Prompt lengths and strides stay what they are without; score keys belong to selecting steps alone."""
    refresh = RefreshConfig(budget=8, select_stride=2, score_bits=4, pool_ahead=True)
    settings = {"prompt_length": [8, 30], "stride": [10, "never"], "select_stride": [1, 3, None]}
    settings = settings_from_dict(SimulationConfig, settings)
    drawn = [draw_simulation(settings, refresh, ROW_LENGTH, 7, step) for step in range(90)]
    without = replace(settings, select_stride=None)
    for step, simulation in enumerate(drawn):
        plain, config = draw_simulation(without, refresh, ROW_LENGTH, 7, step), simulation.config
        assert (plain.prompt_length, plain.config.stride) == (simulation.prompt_length, config.stride)
        assert (plain.config.select_stride, plain.config.score_bits) == (None, 16)
        assert config.score_bits == (16 if config.select_stride is None else 4) and config.pool_ahead
    assert len({(s.config.stride, s.config.select_stride) for s in drawn}) == 6
    assert drawn == [draw_simulation(settings, refresh, ROW_LENGTH, 7, step) for step in range(90)]
    paper = draw_simulation(SimulationConfig(pattern="paper", stride=10), refresh, ROW_LENGTH, 7, 1)
    assert (paper.config.select_stride, paper.config.score_bits) == (None, 16), "the recipe knows none"


def test_a_stride_beyond_the_row_leaves_the_drawn_prompts_as_they_are():
    fits, never = (settings_from_dict(SimulationConfig, {"stride": s}) for s in ([5, 10], [5, 10, "never"]))
    assert fits.prompt_range(ROW_LENGTH) == never.prompt_range(ROW_LENGTH)
    alone = settings_from_dict(SimulationConfig, {"stride": "never", "select_stride": 2})
    assert alone.prompt_range(ROW_LENGTH) == (ROW_LENGTH // 4, ROW_LENGTH - 1)


@pytest.mark.parametrize("schedule", [{"stride": 10}, {"stride": 4, "threshold": 0.1}, {"stride": NEVER}])
def test_effective_strides_are_those_of_the_steps_taken(schedule):
    simulation, trace = Simulation(9, RefreshConfig(budget=6, select_stride=4, **schedule)), Trace()
    tiny_enabled(dtype=torch.float32)(random_ids(2, 50), simulation=simulation, trace=trace, use_cache=False)
    wanted = {}
    for name, layers in (("effective stride", trace.full_steps), ("effective select stride", trace.selecting_steps)):
        steps = sum(float(flags[:, 9:].sum()) for flags in layers.values()) / (2 * len(layers))
        wanted |= {name: 41 / steps} if steps else {}
    assert len(wanted) == (1 if schedule["stride"] == NEVER else 2)
    assert effective_strides(simulation, 50, trace) == pytest.approx(wanted)
    if "threshold" not in schedule:
        assert effective_strides(simulation, 50) == pytest.approx(wanted)
    assert effective_strides(None, 50) == {}


def test_every_row_once_an_epoch_whatever_the_layout():
    order = RowOrder(rows=50, global_batch=8, seed=3)
    seen = [row for step in range(25) for row in order.step(step)]
    for epoch in range(4):
        assert sorted(seen[epoch * 50 : (epoch + 1) * 50]) == list(range(50))
    assert seen[:50] != seen[50:100]
    for step in (0, 6, 24):
        parts = [row for rank in range(2) for batch in order.micro_batches(step, rank, 2, 2) for row in batch]
        assert sorted(parts) == sorted(order.step(step))


@pytest.mark.parametrize("name", slow_unless(["zero3-offload"], ["zero2-offload", "zero3-offload"]))
def test_offload_takes_the_same_steps(rows, alone, tmp_path, name):
    sections = six_steps(tmp_path, 2, steps=2, activation_checkpointing=True, activation_offload=True)
    sections["training"]["deepspeed"] = str(ROOT / "configs" / "deepspeed" / f"{name}.json")
    run_forked(run_settings(rows, tmp_path / "run", **sections))
    for step, found in losses(tmp_path / "run").items():
        assert found[:3] == pytest.approx(alone[step][:3], abs=2e-5), f"step {step}"


def test_libraries_that_are_missing_are_named(rows, tmp_path, monkeypatch):
    for module, setting, value in [
        ("bitsandbytes", "optimizer", "adamw-8bit"),
        ("liger_kernel", "kernels", "liger"),
    ]:
        monkeypatch.setitem(sys.modules, module, None)
        for part in ("optim", "optim.adamw"):
            monkeypatch.setitem(sys.modules, f"{module}.{part}", None)
        monkeypatch.setitem(sys.modules, f"{module}.transformers", None)
        error = refused(run_settings(rows, tmp_path / "run", training={setting: value}))
        assert f"training.{setting}" in error and "pip install 'refreshkv[" in error
        assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_is_needed_and_writes_nothing(rows, tmp_path, capsys):
    settings = run_settings(rows, tmp_path / "run", parallel={"sequence": 2})
    train_main(["--config", str(write_config(settings)), "--dry-run", "--ranks", "4", "--gpu-memory", "80"])
    printed = capsys.readouterr().out
    assert "4 GPUs, 2 per row" in printed and "fits        yes: 80.0 GB" in printed
    assert not (tmp_path / "run").exists()
    assert "parallel.sequence=3" in refused(run_settings(rows, tmp_path / "run", parallel={"sequence": 3}))


def mock_and_step(settings, folder):
    """Runs on a rank: what a mock step leaves, and whether the next step is the same without one."""
    config = settings_from_dict(RunConfig, settings)
    rank, world = init_processes()
    after = []
    for with_mock in (False, True):
        torch.manual_seed(0)
        model = tiny_enabled(dtype=torch.float32)
        engine = build_engine(CausalLossModel(model, "chunked"), resolve(config, world, dry=True))
        batch = make_batch({"input_ids": random_ids(2, ROW_LENGTH)}, "all", engine.device)
        if with_mock:
            before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
            loss = mock_step(engine, batch, config)
            assert 3 < loss < 8 and torch.equal(torch.get_rng_state(), state)
            assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
        values = train_step(engine, [batch] * config.training.global_batch, Simulation(9, config.refresh))
        after.append((values, [p.clone() for p in model.parameters()]))
    (values, weights), (with_mock, same) = after
    assert values == with_mock and all(torch.equal(one, other) for one, other in zip(weights, same, strict=True))
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(SettingsError, match="mock step"):
        mock_step(engine, batch, config)


@pytest.mark.parametrize("stage", slow_unless([2], [0, 1, 2]))
def test_a_mock_step_changes_nothing(rows, tmp_path, stage):
    training = {"deepspeed": zero_json(tmp_path, stage), "global_batch": 4, "micro_batch": 2}
    settings = run_settings(rows, tmp_path / "run", training=training)
    run_ranks(1, tmp_path / "printed.txt", mock_and_step, settings, str(tmp_path))


@pytest.fixture(scope="module")
def existing(rows, tmp_path_factory):
    """A model's folder, and the losses of two steps of one process from it."""
    folder = tmp_path_factory.mktemp("existing")
    tiny_model(dtype=torch.float32, vocab_size=VOCABULARY).save_pretrained(folder / "model")
    settings = run_settings(rows, folder / "alone", **six_steps(folder, 0, steps=2))
    settings["model"] = {"path": str(folder / "model")}
    run_forked(settings, ranks=1)
    return folder / "model", losses(folder / "alone")


@pytest.mark.parametrize("sequence", slow_unless([2], [1, 2]))
def test_an_existing_model_is_divided_while_it_is_loaded(rows, existing, tmp_path, sequence):
    """At stage 3 no rank holds it whole, and it is the same model."""
    model, expected = existing
    settings = run_settings(rows, tmp_path / "run", parallel={"sequence": sequence}, **six_steps(tmp_path, 3, steps=2))
    settings["model"] = {"path": str(model)}
    run_ranks(2, tmp_path / "printed.txt", count_and_train, str(write_config(settings)))
    assert losses(tmp_path / "run").keys() == expected.keys()
    for step, found in losses(tmp_path / "run").items():
        assert found == pytest.approx(expected[step], abs=2e-5), f"step {step}"


def count_and_train(config):
    from refreshkv.train import loop

    build = loop.build_model

    def counted(*arguments):
        model = build(*arguments)
        held = sum(parameter.numel() for parameter in model.parameters())
        assert held == 0 and all(hasattr(parameter, "ds_tensor") for parameter in model.parameters())
        return model

    loop.build_model = counted
    train_main(["--config", config])
