"""simulate() on two ranks: the losses of `refreshkv train`, for the same sequences and draws."""

import json

import pytest

from tests.helpers.adapter_runs import finish, make_base
from tests.helpers.jobs import make_rows, read_metrics, run_settings
from tests.helpers.own_trainers import train_on_rank
from tests.helpers.ranks import run_ranks

STEPS = 20


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of two ranks as nested values."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = make_rows(folder)
    base = make_base(rows, folder / "base")
    training = {"steps": STEPS, "save_every": STEPS, "micro_batch": 4}
    settings = run_settings(rows, folder / "run", training=training, simulation={"plain_share": 0.2})
    return {**settings, "model": {"path": str(base)}}


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory):
    """The losses of `refreshkv train`."""
    output = tmp_path_factory.mktemp("ours") / "run"
    finish({**settings, "training": {**settings["training"], "output": str(output)}})
    metrics = read_metrics(output)
    return [metrics[step]["loss"] for step in range(1, STEPS + 1)]


def losses_of(kind, settings, tmp_path):
    results = tmp_path / "losses.json"
    run_ranks(2, tmp_path / "printed.txt", train_on_rank, kind, settings, str(results))
    return json.loads(results.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "trainer fsdp2", "ddp", "fsdp2"])
def test_the_losses_of_our_own_loop(kind, settings, expected, tmp_path):
    assert losses_of(kind, settings, tmp_path) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0]
