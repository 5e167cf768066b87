"""Mixtures of experts: active parameters, and the routers' loss in the objective."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from refreshkv import RefreshConfig, SettingsError, Simulation
from refreshkv.settings import settings_from_dict
from refreshkv.train.batch import make_batch
from refreshkv.train.config import RunConfig
from refreshkv.train.experts import active_parameters, expert_share, multiplied_weights, validate_router_loss
from refreshkv.train.flops import model_work
from refreshkv.train.job import resolve
from refreshkv.train.loss import CausalLossModel, LossSums
from refreshkv.train.memory import _activations
from refreshkv.train.preflight import report
from refreshkv.train.shape import model_shape
from tests.helpers.models import random_ids, tiny_enabled

SIMULATION = Simulation(9, RefreshConfig(budget=6, stride=4))


def experts_model(**settings):
    return tiny_enabled(family="gpt_oss", dtype=torch.float32, **settings)


def test_a_token_passes_through_its_own_experts_only():
    model = experts_model()
    experts = [module.experts for module in (layer.mlp for layer in model.model.layers)]
    routed = sum(parameter.numel() for module in experts for parameter in module.parameters() if parameter.dim() == 3)
    assert expert_share(model.config) == 0.5
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    routers = sum(layer.mlp.router.weight.numel() for layer in model.model.layers)
    assert multiplied_weights(model) == linear + routers + routed // 2
    whole = sum(parameter.numel() for module in experts for parameter in module.parameters())
    assert abs(active_parameters(model) - (model.num_parameters() - whole / 2)) <= 1


@pytest.mark.parametrize("simulation", [None, SIMULATION])
def test_the_routers_loss_is_in_the_objective(simulation):
    ids, gradients = random_ids(2, 24), []
    for weight in (0.0, 0.5):
        model = experts_model(output_router_logits=True, router_aux_loss_coef=weight).train()
        own = model(ids, labels=ids, simulation=simulation, use_cache=False).loss
        loss_model = CausalLossModel(model, "logits").train()
        batch = make_batch({"input_ids": ids}, "all", torch.device("cpu"))
        sums = LossSums(*loss_model(**batch.model_arguments(simulation, False)))
        torch.testing.assert_close(sums.objective / sums.tokens, own, rtol=1e-4, atol=1e-5)
        model.zero_grad()
        (sums.objective / sums.tokens).backward()
        gradients.append(model.model.layers[0].mlp.router.weight.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_a_routers_loss_that_cannot_be_computed_is_refused():
    model = tiny_enabled()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    with pytest.raises(SettingsError, match="no loss of its routers: set output_router_logits to false"):
        validate_router_loss(model)


def test_the_preflight_names_active_parameters():
    scratch = {
        "model_type": "qwen3_moe", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }  # fmt: skip
    job = resolve(settings_from_dict(RunConfig, {"model": {"scratch": scratch}}), 1, dry=True)
    routed = 2 * 8 * 3 * 16 * 32
    assert job.shape.active == job.shape.parameters - routed * 3 // 4 and job.shape.mlp == 32
    line = next(line for line in report(job, None, 1e12).splitlines() if line.startswith("model"))
    assert f"{job.shape.active:,} active a token, no load-balancing loss" in line


A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False,
}  # fmt: skip
"""The shape of Qwen3-30B-A3B, whose card names 30.5 billion parameters, 3.3 of them activated."""


def test_the_forecast_of_a_large_mixture_counts_as_its_card_does():
    shape = model_shape(AutoConfig.for_model(**A3B))
    assert f"{shape.parameters / 1e9:.1f}" == "30.5" and 3.3e9 < shape.active < 3.4e9


def kept_by_autograd(layers, **settings):
    """Bytes that a forward pass of 512 tokens keeps for the backward pass, without weights."""
    config = AutoConfig.for_model(**{**settings, "num_hidden_layers": layers})
    config._attn_implementation = "sdpa"
    if "num_experts" in settings:
        config._experts_implementation = "grouped_mm"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    weights, kept = {part.untyped_storage().data_ptr() for part in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.arange(512)[None], use_cache=False)
    return sum(size for place, (_, size) in kept.items() if place not in weights)


def test_the_forecast_of_what_experts_keep_is_what_autograd_keeps():
    """An eighth as wide: bytes that a layer's experts keep beyond an MLP of the same size, in bfloat16."""
    narrow = {"vocab_size": 512, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    dense = {**narrow, "model_type": "qwen3", "intermediate_size": 768, "head_dim": 32}
    mixture = {**A3B, **narrow, "num_experts": 32, "moe_intermediate_size": 96, "head_dim": 32}
    kept = [kept_by_autograd(2, **own) - kept_by_autograd(1, **own) for own in (dense, mixture)]
    training = {"dtype": "bf16", "micro_batch": 1, "activation_checkpointing": False}
    forecast = []
    for own in (dense, {name: value for name, value in mixture.items() if name != "head_dim"}):
        values = {"model": {"scratch": {**own, "num_hidden_layers": 1}}, "data": {"row_length": 512}}
        values |= {"simulation": {"pattern": "off"}, "training": training}
        forecast.append(_activations(resolve(settings_from_dict(RunConfig, values), 1, dry=True))[0])
    assert kept[1] - kept[0] == pytest.approx(forecast[1] - forecast[0], rel=0.1) and forecast[1] > 1.5 * forecast[0]


def test_the_forecast_of_a_small_mixture_is_what_torch_counts():
    """The same shape, a sixteenth as wide: operations of a forward pass, whose attention here computes all pairs."""
    small = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 3, "head_dim": 8, "num_experts": 32}
    config = AutoConfig.for_model(**{**A3B, **small, "moe_intermediate_size": 48})
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model, ids = AutoModelForCausalLM.from_config(config).eval(), random_ids(1, 64) % 512
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(ids, use_cache=False)
    work, length = model_work(model), ids.shape[1]
    pairs = 4 * length**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert counted.get_total_flops() == pytest.approx(2 * work.weights * length + pairs, rel=0.001)
