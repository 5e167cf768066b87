"""simulate() under torch.compile: each step's own draw is followed, whatever is compiled."""

import shutil

import pytest
import torch

from refreshkv import RefreshConfig, SimulationConfig, enable, simulate
from refreshkv.simulation.draw import draw_simulation
from tests.helpers.models import random_ids, tiny_model

REFRESH = RefreshConfig(budget=6, stride=3)
SETTINGS = SimulationConfig(stride=[2, 3, 5], plain_share=0.3)
LENGTH, SEED = 40, 5

WAYS = {
    "whole": lambda model: torch.compile(model, backend="aot_eager"),
    "in place": lambda model: model.compile(backend="aot_eager"),
    "forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="aot_eager")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "steps"), [("whole", 12), ("in place", 3), ("forward", 3)])  # torch keeps 8 versions
def test_losses_and_gradients(way, steps):
    torch._dynamo.reset()
    model, other = tiny_model().train(), enable(tiny_model(), REFRESH).train()
    with simulate(model, SETTINGS, SEED, REFRESH) as simulation:
        compiled = WAYS[way](model)
        run = model if compiled is None else compiled
        drawn = set()
        for step in range(1, steps + 1):
            ids = random_ids(2, LENGTH, step)
            expected_draw = draw_simulation(SETTINGS, REFRESH, LENGTH, SEED, step)
            expected = other(input_ids=ids, labels=ids, simulation=expected_draw, use_cache=False).loss
            loss = run(input_ids=ids, labels=ids).loss
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
            loss.backward()
            expected.backward()
            drawn.add(expected_draw)
            assert simulation.report()["plain share"] == (expected_draw is None)
            simulation.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-9)
    assert len(drawn) > 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor(tmp_path, monkeypatch):
    """The default backend, which compiles C++ on CPUs: two draws, from an empty cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    settings, kind = SimulationConfig(stride=3, prompt_length=[10, 30]), {"dtype": torch.float32, "layers": 1}
    model, other = tiny_model(**kind).train(), enable(tiny_model(**kind), REFRESH).train()
    with simulate(model, settings, SEED, REFRESH) as simulation:
        run, drawn = torch.compile(model), set()
        for step in range(1, 3):
            ids, draw = random_ids(2, LENGTH, step), draw_simulation(settings, REFRESH, LENGTH, SEED, step)
            loss, expected = run(input_ids=ids, labels=ids).loss, other(input_ids=ids, labels=ids, simulation=draw).loss
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
            loss.backward()
            expected.backward()
            drawn.add(draw)
            simulation.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5)
    assert len(drawn) == 2 and any(tmp_path.rglob("*.cpp"))
