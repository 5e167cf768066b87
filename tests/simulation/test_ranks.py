"""simulate() on two ranks: the losses of `refreshkv train`, for the same sequences and draws."""

import json
import math

import pytest

from tests.helpers.adapter_runs import finish, make_base
from tests.helpers.jobs import make_rows, read_metrics, run_settings
from tests.helpers.own_trainers import train_on_rank
from tests.helpers.ranks import run_ranks

STEPS = 20
ZERO = [f"{loop} zero{stage}" for loop in ("trainer", "accelerate") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of two ranks as nested values."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = make_rows(folder)
    base = make_base(rows, folder / "base")
    training = {"steps": STEPS, "save_every": STEPS, "micro_batch": 4}
    settings = run_settings(rows, folder / "run", training=training, simulation={"plain_share": 0.2})
    return {**settings, "model": {"path": str(base)}}


def metrics_of(settings, folder):
    """The values that `refreshkv train` logs, step by step."""
    finish({**settings, "training": {**settings["training"], "output": str(folder / "run")}})
    metrics = read_metrics(folder / "run")
    return [metrics[step] for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory):
    return metrics_of(settings, tmp_path_factory.mktemp("ours"))


def steps_of(kind, settings, tmp_path):
    results = tmp_path / "steps.json"
    run_ranks(2, tmp_path / "printed.txt", train_on_rank, kind, settings, str(results))
    return json.loads(results.read_text())


def _is_absent(values, name):
    value = values.get(name)
    return value is None or math.isnan(value)


def has_equal_figures(steps, expected, names=("loss full", "loss partial")):
    """Whether the figures that a trainer logged are those of all ranks; steps without a kind log none."""
    return all(
        _is_absent(ours, name) if name not in step else step[name] == pytest.approx(ours[name], abs=1e-5)
        for step, ours in zip(steps, expected, strict=True)
        for name in names
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "trainer fsdp2", "ddp", "fsdp2", *ZERO])
def test_the_losses_of_our_own_loop(kind, settings, expected, tmp_path):
    steps = steps_of(kind, settings, tmp_path)
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], abs=1e-5)
    assert expected[-1]["loss"] < expected[0]["loss"]
    if kind.startswith("trainer"):
        assert has_equal_figures(steps, expected) and "loss partial" in steps[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "trainer fsdp2", "trainer zero2"])
def test_accumulation(kind, settings, expected, tmp_path):
    """Two micro-batches a step on each of two ranks."""
    accumulated = {**settings, "training": {**settings["training"], "micro_batch": 2}}
    steps = steps_of(kind, accumulated, tmp_path)
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], abs=1e-5)
    assert has_equal_figures(steps, expected) and "loss partial" in steps[0]


@pytest.fixture(scope="module")
def distilled(settings, tmp_path_factory):
    settings = {**settings, "distillation": {"weight": 0.5, "temperature": 2.0}}
    return settings, metrics_of(settings, tmp_path_factory.mktemp("distilled"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "trainer fsdp2", "trainer zero3"])
def test_distillation(kind, distilled, tmp_path):
    settings, expected = distilled
    steps = steps_of(kind, settings, tmp_path)
    assert has_equal_figures(steps, expected, ("loss full", "loss partial", "divergence"))
    assert sum("divergence" in step for step in steps) > STEPS // 2
