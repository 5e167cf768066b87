"""How a simulation, a trace and a cache reach the attention: nested calls, errors, recomputation, missing layers."""

import copy
import threading

import pytest
import torch

import refreshkv
from refreshkv import RefreshCache, RefreshConfig, Simulation, Trace
from refreshkv.cache.keyword import as_keyword
from refreshkv.errors import NotRefreshable
from tests.helpers.models import FAMILIES, random_ids, tiny_enabled, tiny_model

CONFIG = RefreshConfig(budget=6, stride=4)
SIMULATION = Simulation(15, CONFIG)
OTHER = Simulation(22, RefreshConfig(budget=3, stride=7))


def running(model):
    return model.refreshkv_calls.running


def gradients(model, *losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def loss_of(model, ids, simulation):
    return model(ids, labels=ids, simulation=simulation, use_cache=False).loss


@torch.no_grad()
def test_the_older_keyword_means_the_same():
    model, ids = tiny_enabled(), random_ids(2, 30)
    expected = model(ids, simulation=SIMULATION).logits
    assert torch.equal(model(ids, refresh=SIMULATION).logits, expected)
    assert torch.equal(model(ids, refresh=None).logits, model(ids).logits)
    assert not torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="refresh= is the older name of simulation=: pass one of them"):
        model(ids, refresh=SIMULATION, simulation=SIMULATION)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_alone_takes_a_simulation(family):
    model, ids, trace = tiny_enabled(family=family), random_ids(2, 30), Trace()
    found = model.base_model(ids, simulation=SIMULATION, trace=trace).last_hidden_state
    assert torch.equal(found, model(ids, simulation=SIMULATION, output_hidden_states=True).hidden_states[-1])
    assert trace.full_steps.keys() == {0, 1} and not running(model)


@torch.no_grad()
def test_a_pass_without_simulation_within_a_simulated_call():
    """As a distilled loss makes it: the decoder in full, and then as the call around it says."""
    model, ids = tiny_enabled(), random_ids(2, 30)
    expected = model(ids).logits, model(ids, simulation=SIMULATION).logits
    ordinary, found = model.forward, []

    def forward(*args, **kwargs):
        found.append(model.lm_head(model.base_model(*args, simulation=None).last_hidden_state))
        return ordinary(*args, **kwargs)

    model.forward = forward
    found.append(model(ids, simulation=SIMULATION).logits)
    assert all(map(torch.equal, found, expected)) and not running(model)


@torch.no_grad()
@pytest.mark.parametrize("part", ["layer", "attention", "head"])
def test_an_error_leaves_nothing_behind(part):
    model, ids = tiny_enabled(), random_ids(2, 30)
    expected = model(ids).logits
    layer = model.model.layers[1]
    module = {"layer": layer, "attention": layer.self_attn, "head": model.lm_head}[part]

    def fail(*args):
        raise torch.OutOfMemoryError("no memory left")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(ids, simulation=SIMULATION)
    hook.remove()
    assert not running(model) and torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_models_and_threads_do_not_meet():
    """Two models in turn within one call, and one model in two threads at once."""
    model, other, ids = tiny_enabled(), tiny_enabled(seed=1), random_ids(2, 30)
    expected = other(ids).logits, model(ids, simulation=OTHER).logits, model(ids, simulation=SIMULATION).logits
    found = []

    def meanwhile(*args):
        hook.remove()
        found.append(other(ids).logits)
        thread = threading.Thread(target=lambda: found.append(simulated()))
        thread.start()
        thread.join()

    def simulated():
        with torch.no_grad():
            return model(ids, simulation=OTHER).logits

    hook = model.model.layers[1].register_forward_pre_hook(meanwhile)
    found.append(model(ids, simulation=SIMULATION).logits)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_each_recomputation_sees_its_own_simulation(reentrant):
    """Two passes with different simulations, and one without, before the first backward pass."""
    model, ids = tiny_enabled().train(), random_ids(2, 40)
    simulations = (SIMULATION, None, OTHER)
    expected = gradients(model, sum(loss_of(model, ids, simulation) for simulation in simulations))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses = [loss_of(model, ids, simulation) for simulation in simulations]
    with torch.no_grad():
        loss_of(model, ids, Simulation(9, CONFIG))
    found = gradients(model, *losses)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_a_recomputation_that_cannot_be_identified_is_refused(monkeypatch):
    model, ids = tiny_enabled().train(), random_ids(2, 40)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model, ids, SIMULATION)
    model.refreshkv_calls.ended.clear()
    with pytest.raises(RuntimeError, match="its simulation is unknown: turn checkpointing off"):
        loss.backward()


def test_nothing_is_kept_after_a_backward_pass():
    model, ids = tiny_enabled().train(), random_ids(2, 40)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model, ids, SIMULATION)
    assert len(model.refreshkv_calls.ended) == 1
    loss.backward()
    del loss
    assert len(model.refreshkv_calls.ended) == 0


@torch.no_grad()
@pytest.mark.parametrize("way", ["simulation", "cache"])
def test_layers_that_take_no_part_are_refused(way):
    model, ids = tiny_enabled(layers=3), random_ids(2, 30)
    settings = {"simulation": {"simulation": SIMULATION}, "cache": {"past_key_values": RefreshCache(model.config, 40)}}
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(RuntimeError, match=r"layers \[1\] of LlamaForCausalLM took no part in") as caught:
        model(ids, **settings[way])
    assert "\n" not in str(caught.value) and not running(model)


def test_layers_that_run_twice_are_refused_with_a_cache():
    """As in Dory of transformers 5.24: the second run would decode from the keys and values of the first."""
    model, ids = tiny_enabled(layers=3), random_ids(2, 30)
    once = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden_states, **kwargs: once(once(hidden_states, **kwargs), **kwargs)
    with pytest.raises(NotRefreshable, match="^layer 1 runs more than once in each pass of the model") as caught:
        model(ids, **as_keyword(RefreshCache(model.config, 200)))
    assert "\n" not in str(caught.value) and not running(model)
    assert model(ids, use_cache=False).logits.isfinite().all()


def test_a_cache_that_checkpointing_takes_away_is_refused():
    model, ids = tiny_enabled().train(), random_ids(2, 30)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match=r"took no part in decoding from the cache.* call model.eval\(\) first"):
        model(ids, past_key_values=RefreshCache(model.config, 40))


@torch.no_grad()
def test_copies_have_hooks_of_their_own():
    model, ids = tiny_enabled(), random_ids(2, 30)
    duplicate = copy.deepcopy(model)
    assert duplicate.refreshkv_calls is not model.refreshkv_calls
    assert duplicate.model.layers[1].self_attn.refreshkv_calls is duplicate.refreshkv_calls
    refreshkv.enable(duplicate, prompt_attention="sdpa")
    assert torch.equal(duplicate(ids, simulation=SIMULATION).logits, model(ids, simulation=SIMULATION).logits)


@torch.no_grad()
def test_another_attention_is_not_taken_for_a_simulation():
    model, ids = tiny_enabled(), random_ids(2, 30)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] of LlamaForCausalLM took no part in the simulation"):
        model(ids, simulation=SIMULATION)
