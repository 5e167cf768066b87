"""Attention sinks, softcap, recurrent layers, and values of another size: parity with every option, and what is not
followed is refused."""

import pytest
import torch

import refreshkv
from refreshkv import RefreshCache, RefreshConfig, SettingsError, Simulation, ops
from refreshkv.attention.softmax_terms import attention_with_sinks, capped_attention
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.families.tiny import tiny_model as tiny_family
from refreshkv.ops.naive.rows import selections, visible_keys
from refreshkv.ops.state import SoftmaxTerms
from tests.attention.test_parity import (
    CASES,
    CHUNKED,
    EVERY_SELECTING,
    RECTIFIED,
    SELECTING,
    assert_parity,
    with_left_padding,
)
from tests.helpers.exact_linear_attention import use_exact_linear_attention
from tests.helpers.models import CHANGED, decode_chunks, padded_positions, random_ids, tiny_enabled, tiny_model

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


WHOLE = {"layer_types": ["full_attention"] * 3}
"""No sliding windows, which the tests below need."""
WITH_WINDOWS = ["gpt_oss", "gemma2", "mimo_v2_flash"]


@pytest.mark.parametrize("family", WITH_WINDOWS)
@pytest.mark.parametrize("cases", [RECTIFIED[4:6], pytest.param(RECTIFIED, marks=pytest.mark.slow)])
def test_rectified_full_steps(family, cases):
    model, ids = tiny_enabled(family=family, **WHOLE), random_ids(3, 45, seed=5)
    for prompt, config in cases:
        assert_parity(model, ids, prompt, config, with_left_padding(ids, prompt))


@pytest.mark.parametrize("family", WITH_WINDOWS)
@pytest.mark.parametrize("cases", [CHUNKED[2:3], pytest.param(CHUNKED, marks=pytest.mark.slow)])
@torch.no_grad()
def test_prompts_in_chunks(family, cases):
    model, ids = tiny_enabled(family=family, **WHOLE), random_ids(1, 45, seed=5)
    for ends, config in cases:
        found = model(ids, simulation=Simulation(30, config, chunks=ends)).logits
        torch.testing.assert_close(found, decode_chunks(model, ids, ends, config), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", CHANGED)
def test_other_layers_are_neither_rectified_nor_taken_in_chunks(family):
    model, ids = tiny_enabled(family=family), random_ids(1, 40)
    for simulation in (Simulation(30, CONFIG, chunks=(5, 30)), Simulation(30, RefreshConfig(budget=6, rectify=True))):
        with pytest.raises(SettingsError, match="full attention in every layer") as caught:
            model(ids, simulation=simulation)
        assert "\n" not in str(caught.value)


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


@torch.no_grad()
def test_full_attention_through_a_cache_follows_sinks_and_softcap():
    for family in ("gpt_oss", "gemma2", "mimo_v2_flash"):
        model, ids = tiny_enabled(family=family), random_ids(2, 24)
        cache = FullCache(model.config, 24)
        bounds = [0, *range(11, 25)]
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip(bounds, bounds[1:], strict=False)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "mimo_v2_flash"])
@pytest.mark.parametrize("other", ["offloaded", "streaming"])
def test_caches_that_do_not_follow_them_are_refused(family, other):
    model, ids = tiny_enabled(CONFIG, family=family), random_ids(2, 24)
    config = model.config
    cache = RefreshCache(config, 30, offload=True) if other == "offloaded" else StreamingCache(config, 30, 9)
    with (
        torch.no_grad(),
        pytest.raises(SettingsError, match="decode with RefreshCache.*offload=False.*or FullCache") as caught,
    ):
        model(ids, past_key_values=cache)
    assert "\n" not in str(caught.value)


TERMS = [
    SoftmaxTerms(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)),
    SoftmaxTerms(softcap=1.5),
    SoftmaxTerms(torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), 1.5),
]


@pytest.mark.parametrize("terms", TERMS)
def test_ordinary_attention_with_terms_is_the_literal_softmax(terms, monkeypatch):
    """Values and every gradient, in one piece and in chunks of queries."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sinks = None if terms.sinks is None else terms.sinks.clone().requires_grad_()
    visible = (torch.arange(9) <= torch.arange(4, 9)[:, None])[None, None]

    def literal_softmax():
        query, key, value = tensors
        logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
        logits = logits if terms.softcap is None else terms.softcap * torch.tanh(logits / terms.softcap)
        weights = logits.exp() * visible
        denominator = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
        return weights / denominator @ value.repeat_interleave(2, 1)

    def ours():
        if terms.softcap is None:
            return attention_with_sinks(*tensors, visible, 0.3, sinks)
        return capped_attention(*tensors, visible, 0.3, terms._replace(sinks=sinks))

    inputs = tensors if sinks is None else [*tensors, sinks]
    expected = literal_softmax()
    slopes = torch.autograd.grad(expected.square().sum(), inputs)
    for at_once in (1 << 20, 150):
        monkeypatch.setattr("refreshkv.attention.softmax_terms.LOGITS_AT_ONCE", at_once)
        torch.testing.assert_close(ours(), expected, rtol=0, atol=1e-12)
        for found, slope in zip(torch.autograd.grad(ours().square().sum(), inputs), slopes, strict=True):
            torch.testing.assert_close(found, slope, rtol=0, atol=1e-11)


def test_gradients_of_a_simulation_are_those_of_the_literal_softmax_over_what_it_sees():
    """Also the sinks', where a partial step sees its small cache only."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 30, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    sinks, config = TERMS[0].sinks.clone().requires_grad_(), RefreshConfig(budget=5, stride=4, select_stride=3)
    plan, options = config.plan(query, 13), config.selection_options()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)] + [sinks]
    terms = SoftmaxTerms(sinks, 1.5)
    found = torch.autograd.grad(ops.refresh_rows(query, key, value, plan, options, 0.3, terms).square().sum(), leaves)
    chosen = selections(query.detach(), key.detach(), plan, options, 0.3, terms)
    visible = visible_keys(plan, chosen, columns=30).repeat_interleave(2, 1)
    logits = 1.5 * torch.tanh(query[:, :, 13:] @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3 / 1.5)
    weights = logits.exp() * visible
    output = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None]) @ value.repeat_interleave(2, 1)
    for slope, expected in zip(found, torch.autograd.grad(output.square().sum(), leaves), strict=True):
        torch.testing.assert_close(slope, expected, rtol=0, atol=1e-11)


def test_a_compressed_cache_is_refused_in_one_line():
    with pytest.raises(SettingsError, match="compressed vector a token .MLA.*would need a selection") as caught:
        refreshkv.enable(tiny_family("deepseek_v3"), CONFIG)
    assert "\n" not in str(caught.value)
