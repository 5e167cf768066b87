"""Rectified full steps: what they leave in the cache, against the dense model and against a prompt that ends there."""

import pytest
import torch
from transformers import DynamicCache

from refreshkv import RefreshCache, RefreshConfig, Simulation, Trace, decode_ahead, enable
from refreshkv.ops import naive
from tests.generation.test_generate import SLIDING
from tests.helpers.models import decode_logits, padded_positions, random_ids, tiny_enabled, tiny_model

PROMPT, STRIDE = 11, 4
CONFIG = RefreshConfig(budget=6, stride=STRIDE, observation_window=2, recent_window=1, rectify=True)


def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return mask


@torch.no_grad()
def test_after_each_full_step_the_cache_is_that_of_full_attention():
    ids = random_ids(2, 20)
    mask = padded(ids)
    plain, model = tiny_model(), tiny_enabled()
    expected = plain(ids, attention_mask=mask, position_ids=padded_positions(mask), past_key_values=DynamicCache())
    for end in range(PROMPT, 21):
        _, cache = decode_logits(model, ids[:, :end], PROMPT, CONFIG, mask[:, :end])
        exact = PROMPT + (end - PROMPT) // STRIDE * STRIDE
        assert cache.exact_length == exact and cache.length == end
        for layer, dense in zip(cache.layers, expected.past_key_values.layers, strict=True):
            for ours, theirs in ((layer.keys, dense.keys), (layer.values, dense.values)):
                torch.testing.assert_close(ours[0, :, :exact], theirs[0, :, :exact], rtol=0, atol=1e-10)
                torch.testing.assert_close(ours[1, :, 4:exact], theirs[1, :, 4:exact], rtol=0, atol=1e-10)
    differs = cache.layers[1].keys[0, :, exact:end] - expected.past_key_values.layers[1].keys[0, :, exact:end]
    assert differs.abs().max() > 1e-3  # the tokens since then were decoded from the small cache


@torch.no_grad()
def test_between_full_steps_it_decodes_as_after_a_prompt_that_ends_at_the_last_one():
    model, ids = tiny_enabled(), random_ids(2, 30, seed=1)
    trace = Trace()
    parallel = model(ids, simulation=Simulation(PROMPT, CONFIG), trace=trace).logits
    dense = model(ids).logits
    for full in range(PROMPT, 30, STRIDE):
        fresh, _ = decode_logits(model, ids[:, : full + STRIDE - 1], full, CONFIG)
        torch.testing.assert_close(parallel[:, full:][:, : STRIDE - 1], fresh[:, full:], rtol=0, atol=1e-10)
        torch.testing.assert_close(parallel[:, full - 1], dense[:, full - 1], rtol=0, atol=1e-10)
    torch.testing.assert_close(model.lm_head(trace.dense_states), dense, rtol=0, atol=1e-10)
    assert (parallel - dense).abs().max() > 1e-3


@pytest.mark.parametrize("loop", [None, decode_ahead])
def test_generate_takes_rectified_steps(loop):
    model, ids = tiny_enabled(), random_ids(2, 12, seed=2)
    mask = padded(ids)
    settings = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = RefreshCache(model.config, 60, CONFIG)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=15, custom_generate=loop, **settings)
    assert cache.length == 26 and cache.exact_length == 24
    whole = torch.cat([mask, mask.new_ones(2, 15)], dim=1)
    simulation = Simulation(12, CONFIG)
    with torch.no_grad():
        logits = model(found, simulation=simulation, attention_mask=whole, position_ids=padded_positions(whole)).logits
    assert torch.equal(logits[:, 11:-1].argmax(-1), found[:, 12:])


def test_a_further_turn_begins_with_the_tokens_since_the_last_full_step():
    model, ids = tiny_enabled(), random_ids(1, 40, seed=3)
    with torch.no_grad():
        _, cache = decode_logits(model, ids[:, :13], PROMPT, CONFIG)
        cache = RefreshCache(model.config, 40, CONFIG)
        for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)):
            model(ids[:, start:end], past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"2 tokens came since the last full step.*rectify\(\)"):
            model(ids[:, 13:20], past_key_values=cache)
        cache.reset()
        for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)):
            model(ids[:, start:end], past_key_values=cache)
        assert cache.rectify() == 2
        found = model(ids[:, 11:20], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids[:, :20]).logits[:, 11:], rtol=0, atol=1e-10)
    assert cache.exact_length == 20 and cache.layers[0].row_state[0, 3] == 20


def test_what_rectified_steps_cannot_do_is_refused():
    model, ids = tiny_enabled(), random_ids(1, 20)
    with torch.no_grad():
        cache = RefreshCache(model.config, 40, CONFIG)
        for start, end in ((0, 11), (11, 12), (12, 13), (13, 14)):
            model(ids[:, start:end], past_key_values=cache)
        with pytest.raises(RuntimeError, match="3 tokens came since the last full step"):
            model(ids[:, 14:15], past_key_values=cache)
        cache = RefreshCache(model.config, 40, CONFIG, offload=True)
        model(ids[:, :11], past_key_values=cache)
        with pytest.raises(NotImplementedError, match="offload=False"):
            cache.rectify()
        sliding = enable(tiny_model(**SLIDING), CONFIG)
        with pytest.raises(ValueError, match="full attention in every layer"):
            sliding(ids, simulation=Simulation(10, CONFIG))
        with pytest.raises(ValueError, match="outside the row"):
            model(ids, simulation=Simulation(21, CONFIG))
        with pytest.raises(ValueError, match="output_hidden_states"):
            model(ids, simulation=Simulation(10, CONFIG), output_hidden_states=True)


def test_gradients_of_a_rectified_pass():
    """Of the readable form by finite differences; of a model, where the budget holds all tokens, by the dense one."""
    config = RefreshConfig(budget=3, stride=3, select_stride=2, rectify=True)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 8 + 5, 2, generator=generator, dtype=torch.float64) for heads in (2, 1, 1)]
    plan = config.plan(inputs[0][:, :, :8], 3)

    def rows(*tensors):
        return naive.rectified_rows(*tensors, plan, config.selection_options(), 0.5)

    assert torch.autograd.gradcheck(rows, [tensor.requires_grad_() for tensor in inputs])
    model, ids = tiny_enabled(), random_ids(1, 14, seed=4)
    gradients = []
    for settings in ({"simulation": Simulation(6, RefreshConfig(budget=50, stride=3, rectify=True))}, {}):
        model.zero_grad()
        model(ids, **settings).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
