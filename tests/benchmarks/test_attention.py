"""The benchmark of training attention calls the attention as a model does."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from refreshkv import RefreshConfig, Simulation

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention

    yield attention
    sys.modules.pop("attention")


@pytest.mark.parametrize("budget", [60, 8])
def test_a_layers_attention_is_full_if_the_small_cache_holds_all(script, budget):
    query, key, value = (torch.randn(1, heads, 60, 16) for heads in (4, 2, 2))
    simulation = Simulation(40, RefreshConfig(budget=budget, stride=5))
    found = script.layer_attention(query, key, value, simulation).transpose(1, 2)
    full = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found[:, :, :40], full[:, :, :40])
    assert torch.allclose(found[:, :, 40:], full[:, :, 40:], atol=1e-5) == (budget == 60)
