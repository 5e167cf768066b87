"""Attention sinks, softcap, recurrent layers, and values of another size: parity with every option, and what is not
followed is refused."""


import pytest
import torch

from refreshkv import RefreshConfig, Simulation
from tests.attention.test_parity import CASES, EVERY_SELECTING, SELECTING, assert_parity, with_left_padding
from tests.helpers.exact_linear_attention import use_exact_linear_attention
from tests.helpers.models import CHANGED, padded_positions, random_ids, tiny_enabled, tiny_model

CONFIG = RefreshConfig(budget=6, stride=4)
FEW = [CASES[4], CASES[18], CASES[-1], SELECTING[0], SELECTING[4]]


def enabled(family, monkeypatch, **settings):
    model = tiny_enabled(family=family, **settings)
    if family == "qwen3_next":
        use_exact_linear_attention(monkeypatch, model)
    return model


@pytest.mark.parametrize("family", CHANGED)
@pytest.mark.parametrize("cases", [FEW, pytest.param(CASES + SELECTING + EVERY_SELECTING, marks=pytest.mark.slow)])
def test_parity(family, cases, monkeypatch):
    model, ids = enabled(family, monkeypatch), random_ids(3, 45, seed=5)
    for prompt, config in cases:
        prompt = min(prompt, 38)
        assert_parity(model, ids, prompt, config, with_left_padding(ids, prompt) if config.threshold else None)


@pytest.mark.parametrize("family", CHANGED)
@torch.no_grad()
def test_ordinary_calls_are_the_models_own(family):
    plain, ids = tiny_model(family=family), random_ids(2, 50, seed=7)
    plain.set_attn_implementation("eager")
    model = tiny_enabled(family=family)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    padded = {"attention_mask": mask, "position_ids": padded_positions(mask)}
    atol = 1e-10 if family == "gpt_oss" else 1e-4  # the others' own softmax is in float32
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=atol)
    alone = plain(ids[1:, 6:]).logits  # the eager attention makes nan of padding
    torch.testing.assert_close(model(ids, **padded).logits[1:, 6:], alone, rtol=0, atol=atol)
    whole = Simulation(11, RefreshConfig(budget=50, stride=7))
    torch.testing.assert_close(model(ids, simulation=whole).logits, plain(ids).logits, rtol=0, atol=atol)
