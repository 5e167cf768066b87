"""How the kernels of a selecting step find the threshold: ties, and rows with too many finalists for their list.

`test_step_kernels.py` compares whole steps with the naive form.
"""

from contextlib import nullcontext

import pytest
import torch

from refreshkv import NEVER, RefreshConfig

pytest.importorskip("triton")

import triton
import triton.language as tl

from refreshkv.ops.step import launches
from refreshkv.ops.step.selecting import launches as stages
from refreshkv.ops.step.selecting import shares, threshold
from tests.helpers.interpreter import all_at_once
from tests.helpers.marks import slow_tuples_unless, slow_unless
from tests.ops import test_step_kernels
from tests.ops.test_step_kernels import DEVICE, compare, drawn, prompted_layer

# value of all keys, room for finalists, budget
TIES = [(0.0, 1024, 5), (1.0, 1024, 5), (0.0, 16, 5), (1.0, 16, 5), (0.0, 16, 37), (1.0, 16, 37)]


@pytest.mark.parametrize(("value", "finalists", "budget"), slow_tuples_unless([(1.0, 1024, 5), (1.0, 16, 37)], TIES))
def test_ties_go_to_the_lower_position(value, finalists, budget, monkeypatch):
    """Equal keys all tie; the limit is found among the finalists, or in the whole row if there are too many."""
    monkeypatch.setattr(threshold, "MOST_FINALISTS", finalists)
    key = torch.full((2, 1, 60, 16), value, device=DEVICE)
    query = key.repeat(1, 2, 1, 1)
    config = RefreshConfig(budget=budget, stride=NEVER, select_stride=1, score_bits=4)
    layer = prompted_layer(query, key, key, torch.tensor([0, 9], device=DEVICE), config, 70)
    token = (query[:, :, :1], key[:, :, :1], key[:, :, :1])
    launches.decode_step(*token, layer.state(), config.step_options(), 0.25, layer.selecting_state())
    for row, first in enumerate([0, 9]):
        expected = [*range(first, first + budget - 1), 60]
        assert layer.selected[row, 0].sort().values.tolist() == expected


@triton.jit
def resolve(finalists, numbers, choice, MOST: tl.constexpr):
    count, keep, low, high = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    least, limit = threshold.resolve(finalists, count, keep, low, high, tl.load(numbers + 4), MOST)
    tl.store(choice, least)
    tl.store(choice + 1, limit)


@pytest.mark.parametrize("spread", [1, 2, 3, 5, 40, 2**20, 2**24])
def test_finalists_are_resolved_exactly(spread):
    """Rankings of which few or many differ, against a sort."""
    generator, low, places = torch.Generator().manual_seed(spread), 1000, 500
    for count, keep in ((1, 1), (2, 1), (40, 7), (40, 40), (64, 63)):
        rankings = torch.randint(low, low + spread, (64,), generator=generator)
        positions = torch.randperm(places, generator=generator)[:64]
        numbers = torch.tensor([count, keep, low, low + spread, places], dtype=torch.int32, device=DEVICE)
        finalists, choice = torch.cat([positions, rankings]).int().to(DEVICE), torch.zeros_like(numbers)
        resolve[1,](finalists, numbers, choice, MOST=64)
        least, limit = choice[:2].tolist()
        pairs = list(zip((-rankings[:count]).tolist(), positions[:count].tolist(), strict=True))
        expected = {position for _, position in sorted(pairs)[:keep]}
        assert {p for ranking, p in pairs if -ranking > least or (-ranking == least and p <= limit)} == expected


@pytest.mark.slow
@pytest.mark.parametrize("windows", [{}, {"sink_tokens": 70}])
def test_search_equals_resolving(monkeypatch, windows):
    """With little room for finalists, the whole row is searched."""
    monkeypatch.setattr(threshold, "MOST_FINALISTS", 1)
    monkeypatch.setattr(shares, "RANKED", 64)
    config = RefreshConfig(budget=60, stride=NEVER, select_stride=1, score_bits=4, **windows)
    compare((300, 2, 2, 2, 16, 33, config))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", [{}, {"pool_ahead": True, "pool_kernel": 2}])
def test_several_blocks_and_programs(pooling):
    config = RefreshConfig(budget=300, stride=NEVER, select_stride=1, score_bits=4, **pooling)
    compare((2200, 2, 2, 1, 16, 33, config))


WINDOWS = {
    "as recommended": {"pool_ahead": True, "pool_kernel": 2},
    "a wide window": {"sink_tokens": 3, "recent_window": 5},
    "observers": {"observation_window": 3, "pool_kernel": 1},
    "search": {"sink_tokens": 40},
}


@pytest.mark.parametrize("name", slow_unless(["as recommended"], WINDOWS))
def test_one_launch_does_all_stages(name, monkeypatch):
    """Programs that wait for each other, several to a row, as on a GPU that runs them all at once."""
    monkeypatch.setattr(stages, "run_at_once", lambda *_: True)
    if name == "search":
        monkeypatch.setattr(threshold, "MOST_FINALISTS", 1)
    config = RefreshConfig(budget=30, stride=NEVER, select_stride=2, score_bits=4, **WINDOWS[name])
    with nullcontext() if DEVICE == "cuda" else all_at_once():
        compare((150, 4, 2, 1, 16, 33, config))


@pytest.mark.parametrize("scale", slow_unless([3.0], [1.0, 2.0, 3.0]))
@pytest.mark.parametrize("budget", slow_unless([30], [6, 30, 120]))
def test_thresholds_in_wide_bins(scale, budget, monkeypatch):
    """Logits spread so far that the threshold lies many powers of two below the highest possible one."""
    monkeypatch.setattr(test_step_kernels, "drawn", lambda *shape: scale * drawn(*shape))
    config = RefreshConfig(budget=budget, stride=NEVER, select_stride=1, score_bits=4, pool_kernel=1)
    compare((150, 3, 2, 1, 16, 33, config))
