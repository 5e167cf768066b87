"""All ways in which layers could miss a simulation or a cache: computed as in an ordinary call, or refused."""

import copy
import threading

import pytest
import torch
from torch import nn

import refreshkv
from refreshkv import RefreshCache, RefreshConfig, Simulation
from refreshkv.baselines.full import FullCache
from tests.helpers.marks import slow_unless
from tests.helpers.models import FAMILIES, decode_logits, random_ids, tiny_enabled, tiny_model

CONFIG = RefreshConfig(budget=6, stride=4)
SIMULATION = Simulation(15, CONFIG)
IDS = random_ids(2, 24)


class Lora(nn.Module):
    """As peft wraps a model: it calls `forward` of what it wraps, past the hooks of that module."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


class Peft(nn.Module):
    """peft's outer module."""

    def __init__(self, model):
        super().__init__()
        self.base_model = Lora(model)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Parallel(nn.Module):
    """As DataParallel calls a model: shallow copies of the modules, with the same hooks."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return replica(self.module)(*args, **kwargs)


def replica(module):
    """What torch.nn.parallel.replicate makes on each GPU."""
    other = module._replicate_for_data_parallel()
    other._modules = {name: replica(child) for name, child in module._modules.items()}
    other._parameters = module._parameters
    return other


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compile_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compile_without_layers(model):
    """As a compiled pass goes on after its layers, but not its hooks, have reached torch's recompile limit."""
    for layer in model.model.layers:
        layer.forward = torch.compiler.disable(layer.forward)
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "forward": lambda model: model.forward,
    "positional": lambda model: lambda ids, **kwargs: model(ids, None, None, **kwargs),
    "peft": Peft,
    "data parallel": Parallel,
    "copied": copy.deepcopy,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "forward = compile": compile_forward,
    "layers compiled": compile_layers,
    "layers not compiled": compile_without_layers,
}


def decoded(model, cache):
    with torch.no_grad():
        parts = [model(IDS[:, a:b], past_key_values=cache).logits for a, b in ((0, 15), (15, 16), (16, 17))]
    return torch.cat(parts, dim=1)


COMPILED = ("compile", "forward = compile", "layers compiled", "layers not compiled")
CASES = [
    *((wrapper, "llama") for wrapper in WRAPPERS),
    *((wrapper, family) for family in FAMILIES if family != "llama" for wrapper in ("forward", "peft")),
]


@pytest.mark.parametrize("case", slow_unless([case for case in CASES if case[0] not in COMPILED], CASES))
@torch.no_grad()
def test_a_wrapped_model_decodes_the_same(case):
    torch._dynamo.reset()
    model = tiny_enabled(CONFIG, family=case[1])
    expected = decoded(model, RefreshCache(model.config, 30))
    found = decoded(WRAPPERS[case[0]](model), RefreshCache(model.config, 30))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", slow_unless([case for case in CASES if case[0] not in COMPILED], CASES))
@torch.no_grad()
def test_a_wrapped_model_simulates_the_same(case):
    torch._dynamo.reset()
    model = tiny_enabled(CONFIG, family=case[1])
    expected = model(IDS, simulation=SIMULATION).logits
    assert not torch.equal(expected, model(IDS).logits)
    found = WRAPPERS[case[0]](model)(IDS, simulation=SIMULATION).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("way", [compile_layers, compile_without_layers])
def test_layers_that_are_compiled_apart_follow_each_call(way):
    """Losses and gradients of a model whose hooks and layers are not both compiled, in calls of several kinds."""
    torch._dynamo.reset()
    other, model = tiny_enabled(CONFIG), tiny_enabled(CONFIG)
    run = way(model)
    for simulation in (SIMULATION, None, Simulation(9, RefreshConfig(budget=3, stride=5)), SIMULATION):
        losses = [of(IDS, labels=IDS, simulation=simulation, use_cache=False).loss for of in (run, other)]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
        for loss in losses:
            loss.backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)
    assert not model.refreshkv_calls.running


def sdpa(model):
    model.set_attn_implementation("sdpa")


def sdpa_in_one_layer(model):
    module = model.model.layers[1].self_attn
    module.config = copy.copy(module.config)
    module.config._attn_implementation = "sdpa"


def skipped_layer(model):
    """As LayerDrop does it."""
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states


def shorter(model):
    """As layers are left out of models that look at their number in each pass; others do not look."""
    model.model.layers = model.model.layers[:1]


def other_attention(model):
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)


def checkpointed(model):
    model.train().gradient_checkpointing_enable({"use_reentrant": False})


def one_layer_checkpointed(model):
    checkpointed(model)
    model.model.layers[0].gradient_checkpointing = False


WAYS = (sdpa, sdpa_in_one_layer, skipped_layer, shorter, other_attention, checkpointed, one_layer_checkpointed)


@pytest.mark.parametrize("use", ["simulation", "RefreshCache", "FullCache"])
@pytest.mark.parametrize("lose", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", ["llama", "stablelm", "olmo3"])
def test_a_lost_layer_is_refused(lose, use, family):
    if family not in FAMILIES:
        pytest.skip("this release of transformers does not have it")
    if use == "simulation" and lose in (checkpointed, one_layer_checkpointed):
        return  # which works: see test_model_call.py
    model = tiny_enabled(CONFIG, family=family)
    uses = {
        "simulation": {"simulation": SIMULATION},
        "RefreshCache": {"past_key_values": RefreshCache(tiny_model(family=family).config, 30, CONFIG)},
        "FullCache": {"past_key_values": FullCache(tiny_model(family=family).config, 30)},
    }
    lose(model)
    with pytest.raises(RuntimeError, match="took no part in") as caught:
        model(IDS, **uses[use])
    assert "\n" not in str(caught.value) and not model.refreshkv_calls.running


@pytest.mark.slow
def test_a_lost_layer_in_a_compiled_model_is_refused():
    model = tiny_enabled(CONFIG)
    compile_forward(model)
    with torch.no_grad():
        model(IDS, simulation=SIMULATION)
        sdpa(model)
        with pytest.raises(RuntimeError, match="took no part in|another attention was set"):
            model(IDS, simulation=SIMULATION)


@torch.no_grad()
def test_calls_in_two_threads_that_overlap():
    """Each begins before the other ends, and ends in the order in which they began."""
    model = tiny_enabled(CONFIG)
    simulations = [SIMULATION, Simulation(9, RefreshConfig(budget=3, stride=2))]
    expected, found = [model(IDS, simulation=simulation).logits for simulation in simulations], [None, None]
    plain = model(IDS).logits
    both, first_ended = threading.Barrier(2), threading.Event()

    def meet(*args):
        both.wait(20)
        if threading.current_thread().name == "1":
            first_ended.wait(20)

    def run(number):
        with torch.no_grad():
            found[number] = model(IDS, simulation=simulations[number]).logits
        first_ended.set()

    hook = model.model.layers[1].register_forward_pre_hook(meet)
    threads = [threading.Thread(target=run, args=(number,), name=str(number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert all(map(torch.equal, found, expected)) and not model.refreshkv_calls.running
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_share_one_config_keep_their_own_settings(family):
    config = tiny_model(family=family).config
    first, second, third = (FAMILIES[family][1](config).double().eval() for _ in range(3))
    refreshkv.enable(first, CONFIG)
    refreshkv.enable(second, RefreshConfig(budget=3, stride=2))
    assert third.config is config and config._attn_implementation != "refreshkv" and not hasattr(config, "refreshkv")
    for model, expected in ((first, CONFIG), (second, RefreshConfig(budget=3, stride=2))):
        cache = RefreshCache(model.config, 30)
        assert cache.config == expected
        assert torch.equal(decoded(model, cache), decode_logits(model, IDS[:, :17], 15, expected)[0])
    second.set_attn_implementation("sdpa")
    with torch.no_grad():
        first(IDS, simulation=SIMULATION)
        third(IDS)


def test_a_model_with_an_enabled_models_config_says_so():
    other = FAMILIES["llama"][1](tiny_enabled(CONFIG).config).double().eval()
    with pytest.raises(RuntimeError, match="refreshkv.enable\\(model\\) has not seen its model") as caught:
        other(IDS)
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        refreshkv.enable(other, CONFIG)(IDS, simulation=SIMULATION)


def test_attention_in_both_directions_is_refused():
    model = tiny_enabled(CONFIG)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="is causal: config.is_causal=False is not supported"):
        model(IDS)
    model.config.is_causal, model.model.layers[1].self_attn.is_causal = True, False
    with pytest.raises(ValueError, match="is causal: is_causal=False is not supported"):
        model(IDS)


def test_a_backward_pass_within_another_call_keeps_its_own_simulation():
    model, ids = tiny_enabled(CONFIG).train(), random_ids(2, 24)

    def gradient(within):
        model.zero_grad()
        loss = model(ids, labels=ids, simulation=SIMULATION, use_cache=False).loss
        if within:
            hook = model.lm_head.register_forward_pre_hook(lambda *args: loss.backward())
            with torch.no_grad(), torch.enable_grad():
                model(ids, simulation=Simulation(5, CONFIG), use_cache=False)
            hook.remove()
        else:
            loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient(within=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(within=True), expected, rtol=0, atol=1e-12)
