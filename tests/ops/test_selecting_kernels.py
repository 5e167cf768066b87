"""How the kernels of a selecting step find the threshold: ties, and rows with too many candidates for their list.

`test_step_kernels.py` compares whole steps with the naive form.
"""

import pytest
import torch

from refreshkv import NEVER, RefreshConfig

pytest.importorskip("triton")

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


@pytest.mark.slow
@pytest.mark.parametrize("windows", [{}, {"sink_tokens": 70}])
def test_search_equals_resolving(monkeypatch, windows):
    """With little room for candidates, the whole row is searched."""
    monkeypatch.setattr(threshold, "FEWEST_CANDIDATES", 16)
    monkeypatch.setattr(threshold, "MOST_CANDIDATES", 16)
    monkeypatch.setattr(shares, "RANKED", 64)
    config = RefreshConfig(budget=60, stride=NEVER, select_stride=1, score_bits=4, **windows)
    compare((300, 2, 2, 2, 16, 33, config))


@pytest.mark.slow
def test_several_blocks_and_programs():
    config = RefreshConfig(budget=300, stride=NEVER, select_stride=1, score_bits=4)
    compare((2200, 2, 2, 1, 16, 33, config))
