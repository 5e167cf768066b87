"""Mixtures of experts: active parameters, and the routers' loss in the objective."""

import pytest
import torch

from refreshkv import RefreshConfig, SettingsError, Simulation
from refreshkv.settings import settings_from_dict
from refreshkv.train.batch import make_batch
from refreshkv.train.config import RunConfig
from refreshkv.train.experts import active_parameters, expert_share, multiplied_weights, validate_router_loss
from refreshkv.train.job import resolve
from refreshkv.train.loss import CausalLossModel, LossSums
from refreshkv.train.preflight import report
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
    assert multiplied_weights(model) == linear + routed // 2
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
