"""LESS: the parallel form equals decoding, and without weight of its own the state leaves StreamingLLM."""

import pytest
import torch

from refreshkv.baselines.less import LessCache, LowRankKernels, held, make_kernels, parallel
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.settings import SettingsError
from tests.baselines.test_baselines import PROMPT, SCALING, STEPS, drawn, run_layer
from tests.helpers.models import random_ids, tiny_enabled, tiny_model


def drawn_kernels(config, seed=0):
    """With a weight for what left that matters."""
    torch.manual_seed(seed)
    kernels = make_kernels(config, rank=3, hidden=5).double()
    for part in kernels.parameters():
        part.data *= 8
    return kernels


def literal(query, key, value, kernels, head, budget, sinks):
    """One query head, token by token: the tokens that are held, and each token that left, one by one."""
    kv_head, outputs = head // 2, []
    for position in range(PROMPT, PROMPT + STEPS):
        total, mass = 0.0, 0.0
        phi = kernels.phi(query[:, :, position : position + 1])[0, head, 0]
        for token in range(position + 1):
            if token < sinks or token >= position - (budget - sinks):
                weight = (query[0, head, position] @ key[0, kv_head, token] * SCALING).exp()
            else:
                weight = phi @ kernels.psi(key[:, :, token : token + 1])[0, kv_head, 0]
            total, mass = total + weight * value[0, kv_head, token], mass + weight
        outputs.append(total / mass)
    return torch.stack(outputs)


@pytest.mark.parametrize(("budget", "sinks"), [(12, 4), (7, 0), (30, 2), (100, 4)])
def test_decoding_equals_the_parallel_and_the_literal_form(budget, sinks):
    query, key, value = drawn(4, 0), drawn(2, 1), drawn(2, 2)
    torch.manual_seed(3)
    kernels = LowRankKernels(4, 2, 16, rank=3, hidden=5).double()
    for part in kernels.parameters():
        part.data *= 8
    cache = LessCache(tiny_model(layers=2).config, 60, [kernels, kernels], budget, sinks)
    found, layer = run_layer(cache, query, key, value)
    whole = parallel(query, key, value, kernels, held(PROMPT + STEPS, PROMPT, budget, sinks), SCALING)
    torch.testing.assert_close(found, whole[:, :, PROMPT:].transpose(1, 2), rtol=0, atol=1e-10)
    some = torch.tensor([PROMPT + STEPS - 1, 1, PROMPT - 1, PROMPT + 3])
    seen = held(PROMPT + STEPS, PROMPT, budget, sinks, some)
    part = parallel(query[:, :, some], key, value, kernels, seen, SCALING, some)
    torch.testing.assert_close(part, whole[:, :, some], rtol=0, atol=1e-10)
    if budget == 12:
        for head in range(4):
            expected = literal(query, key, value, kernels, head, budget, sinks)
            torch.testing.assert_close(found[0, :, head], expected, rtol=0, atol=1e-10)
    assert layer.keys.shape == (1, 2, min(budget, 60) + 1, 16) and layer.low_rank.shape == (1, 2, 3, 16)


def decoded(model, cache, ids, prompt):
    with torch.no_grad():
        parts = [model(ids[:, :prompt], past_key_values=cache).logits]
        parts += [model(ids[:, step : step + 1], past_key_values=cache).logits for step in range(prompt, ids.shape[1])]
    return torch.cat(parts, dim=1)


def test_without_weight_it_is_streaming_llm():
    model, ids = tiny_enabled(), random_ids(2, 50)
    expected = decoded(model, StreamingCache(model.config, 60, 11), ids, 20)
    kernels = drawn_kernels(model.config)
    other = decoded(model, LessCache(model.config, 60, kernels, 11), ids, 20)
    assert not torch.allclose(other, expected, atol=1e-2), "the state decides nothing"
    for kernel in kernels:
        torch.nn.init.zeros_(kernel.key_out)
    found = decoded(model, LessCache(model.config, 60, kernels, 11), ids, 20)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_left_padded_rows_equal_the_same_rows_alone_and_a_reset_leaves_nothing():
    model, ids = tiny_enabled(), random_ids(2, 24, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
    cache = LessCache(model.config, 60, drawn_kernels(model.config), 0.4)
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    cache.reset()
    alone = model.generate(ids[1:, 9:], past_key_values=cache, **settings)
    assert torch.equal(together[1:, 9:], alone)


def test_the_parallel_form_has_gradients_for_both_networks():
    query, key, value = drawn(4, 0), drawn(2, 1), drawn(2, 2)
    kernels = LowRankKernels(4, 2, 16, rank=2, hidden=3).double()
    inputs = (query[:, :, :9], key[:, :, :9], value[:, :, :9])
    seen = held(9, 0, 4, 1)
    parameters = list(kernels.parameters())
    torch.autograd.gradcheck(
        lambda *_: parallel(*inputs, kernels, seen, SCALING)[:, :, ::4], parameters, fast_mode=True
    )  # fmt: skip


def test_kernels_of_another_model_are_refused():
    config = tiny_model().config
    with pytest.raises(SettingsError, match="kernels are for 1 layers, the model has 2"):
        LessCache(config, 60, list(make_kernels(config))[:1], 12)
