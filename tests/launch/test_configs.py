"""The configurations in configs/: each loads, fits together, and the paper's have the paper's settings."""

import json
from pathlib import Path

import pytest

from refreshkv.config import RefreshConfig
from refreshkv.data.tasks.rows import training_tasks
from refreshkv.settings import load_settings, settings_from_dict
from refreshkv.simulation.draw import draw_simulation
from refreshkv.train.config import RunConfig, SimulationConfig
from refreshkv.train.deepspeed_json import read_deepspeed_json, zero_stage
from refreshkv.train.experiment.config import ExperimentConfig
from refreshkv.train.validation import setting_warnings, validate_settings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
CORPORA = sorted((ROOT / "configs" / "corpora").glob("*.yaml"))
MODELS = {"llama31-8b": ("meta-llama/Llama-3.1-8B", 0.85), "qwen2-7b": ("Qwen/Qwen2-7B", 0.95)}


def test_there_are_some():
    assert {"llama31-8b-8k.yaml", "qwen2-7b-8k.yaml", "quickstart.yaml"} <= {path.name for path in RECIPES}
    known = {"arxiv", "books", "code", "code-and-prose", "english-prose", "python-packages", "python-packages-8k"}
    assert {*known, "tasks"} == {path.stem for path in CORPORA}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_fit_together(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = load_settings(RunConfig, path)
    validate_settings(run)
    assert setting_warnings(run) == []
    is_for_one_gpu = path.stem == "base"
    assert is_for_one_gpu or zero_stage(read_deepspeed_json(run.training.deepspeed)) in (2, 3)
    for step in range(50):
        simulation = draw_simulation(run.simulation, run.refresh, run.data.row_length, run.training.seed, step)
        assert simulation is None or 1 <= simulation.prompt_length < run.data.row_length


def test_the_quickstart_adapts_the_base_model_of_the_repository():
    run = load_settings(RunConfig, ROOT / "configs" / "quickstart.yaml")
    assert run.model.path == run.data.tokenizer == "base/python-4m"
    assert (ROOT / run.model.path / "model.safetensors").stat().st_size < 8e6
    made = load_settings(RunConfig, ROOT / "configs" / "base.yaml")
    saved = json.loads((ROOT / run.model.path / "config.json").read_text())
    assert {key: saved[key] for key in made.model.scratch} == made.model.scratch


@pytest.mark.parametrize("path", CORPORA, ids=lambda path: path.stem)
def test_corpora_load(path):
    run = load_settings(RunConfig, path)
    assert run.data.folder == f"rows/{path.stem}"
    if run.data.tasks:
        training_tasks(run.data.tasks, run.data.row_length)


@pytest.mark.parametrize("name", MODELS)
def test_recipes_of_the_paper(name):
    model, threshold = MODELS[name]
    run = load_settings(RunConfig, ROOT / "configs" / f"{name}-8k.yaml")
    training = run.training
    assert run.model.path == run.data.tokenizer == model
    assert run.refresh == RefreshConfig(budget=2048, stride=10, threshold=threshold)
    assert run.data.row_length == 8192 and run.data.max_train_rows == training.steps * training.global_batch == 120_000
    assert (training.global_batch, training.learning_rate, training.warmup_steps) == (64, 5e-6, 20)
    assert (training.lr_schedule, training.weight_decay, training.loss_on) == ("linear", 0.0, "all")
    simulation = draw_simulation(run.simulation, run.refresh, 8192, 0, 1)
    assert (simulation.prompt_length, simulation.config.stride) == (8192 - 50, 2**31 - 1)


@pytest.mark.parametrize("name", MODELS)
def test_recipes_of_ours_differ_in_the_pattern_and_the_selection_alone(name):
    paper, ours = (load_settings(RunConfig, ROOT / "configs" / f"{name}-8k{kind}.yaml") for kind in ("", "-whole"))
    assert ours.data == paper.data and ours.model == paper.model
    assert {**vars(ours.training), "output": None} == {**vars(paper.training), "output": None}
    assert ours.refresh == RefreshConfig.recommended(budget=1024)
    experiment = load_settings(ExperimentConfig, ROOT / "configs/experiments/smollm2.yaml")
    measured = experiment.run_settings("smollm2", "recommended", 0, "models/smollm2-135m", "runs")
    assert ours.simulation == settings_from_dict(SimulationConfig, measured["simulation"])
    drawn = [draw_simulation(ours.simulation, ours.refresh, 8192, 0, step) for step in range(500)]
    assert 95 < sum(simulation is None for simulation in drawn) < 155 and ours.simulation.plain_share == 0.25
    drawn = [simulation.prompt_length for simulation in drawn if simulation is not None]
    assert 2048 <= min(drawn) < 2300 and max(drawn) > 7900 and 4900 < sum(drawn) / len(drawn) < 5300
