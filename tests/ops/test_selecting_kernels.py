"""How the kernels of a selecting step find the threshold: ties, and rows with too many candidates for their list.

`test_step_kernels.py` compares whole steps with the naive form.
"""

import pytest
import torch

from refreshkv import NEVER, RefreshConfig

pytest.importorskip("triton")

import triton
import triton.language as tl

from refreshkv.ops.step import launches
from refreshkv.ops.step.selecting import shares, threshold
from tests.helpers.marks import slow_tuples_unless
from tests.ops.test_step_kernels import DEVICE, compare, prompted_layer

# value of all keys, room for candidates, budget
TIES = [(0.0, 1024, 5), (1.0, 1024, 5), (0.0, 16, 5), (1.0, 16, 5), (0.0, 16, 37), (1.0, 16, 37)]


@pytest.mark.parametrize(("value", "candidates", "budget"), slow_tuples_unless([(1.0, 1024, 5), (1.0, 16, 37)], TIES))
def test_ties_go_to_the_lower_position(value, candidates, budget, monkeypatch):
    """Equal keys all tie; the limit is found among the candidates, or in the whole row if there are too many."""
    monkeypatch.setattr(threshold, "FEWEST_CANDIDATES", candidates)
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
def resolve(candidates, numbers, choice, CANDIDATES: tl.constexpr):
    count, keep, low, high = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    least, limit = threshold._resolve(candidates, count, keep, low, high, tl.load(numbers + 4), CANDIDATES)
    tl.store(choice, least)
    tl.store(choice + 1, limit)


@pytest.mark.parametrize("spread", [1, 2, 3, 5, 40, 2**20, 2**24])
def test_candidates_are_resolved_exactly(spread):
    """Rankings of which few or many differ, against a sort."""
    generator, low, places = torch.Generator().manual_seed(spread), 1000, 500
    for count, keep in ((1, 1), (2, 1), (40, 7), (40, 40), (64, 63)):
        rankings = torch.randint(low, low + spread, (64,), generator=generator)
        positions = torch.randperm(places, generator=generator)[:64]
        numbers = torch.tensor([count, keep, low, low + spread, places], dtype=torch.int32, device=DEVICE)
        candidates, choice = torch.cat([positions, rankings]).int().to(DEVICE), torch.zeros_like(numbers)
        resolve[1,](candidates, numbers, choice, CANDIDATES=64)
        least, limit = choice[:2].tolist()
        pairs = list(zip((-rankings[:count]).tolist(), positions[:count].tolist(), strict=True))
        expected = {position for _, position in sorted(pairs)[:keep]}
        assert {p for ranking, p in pairs if -ranking > least or (-ranking == least and p <= limit)} == expected


@pytest.mark.slow
@pytest.mark.parametrize("windows", [{}, {"sink_tokens": 70}])
def test_search_equals_resolving(monkeypatch, windows):
    """With little room for candidates, the whole row is searched."""
    monkeypatch.setattr(threshold, "FEWEST_CANDIDATES", 16)
    monkeypatch.setattr(threshold, "MOST_CANDIDATES", 16)
    monkeypatch.setattr(shares, "RANKED", 64)
    monkeypatch.setattr(shares, "COLLECTED", 64)
    config = RefreshConfig(budget=60, stride=NEVER, select_stride=1, score_bits=4, **windows)
    compare((300, 2, 2, 2, 16, 33, config))


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "long_row"), [({}, 65536), ({"pool_ahead": True, "pool_kernel": 2}, 1000)])
def test_several_blocks_and_programs(pooling, long_row, monkeypatch):
    monkeypatch.setattr(shares, "LONG_ROW", long_row)
    config = RefreshConfig(budget=300, stride=NEVER, select_stride=1, score_bits=4, **pooling)
    compare((2200, 2, 2, 1, 16, 33, config))
