"""Liger's kernels in a model's layers: refused where they cannot run, and asked for what ours leaves to them."""

import sys
from types import SimpleNamespace

import pytest
import torch

from refreshkv import RefreshConfig, Simulation
from refreshkv.settings import SettingsError
from refreshkv.train.config import TrainingConfig
from refreshkv.train.kernels import use_liger, validate_kernels
from tests.helpers.models import random_ids, tiny_enabled, tiny_model

LIGER = TrainingConfig(kernels="liger")


@pytest.fixture
def asked(monkeypatch):
    """Calls of a stand-in for the library."""
    calls = []

    def apply(model, **flags):
        calls.append((model, flags))

    stand_in = SimpleNamespace(_apply_liger_kernel_to_instance=apply, MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    package = SimpleNamespace(monkey_patch=stand_in)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=package))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def test_the_loss_and_the_attention_are_left_alone(asked):
    model = tiny_enabled()
    validate_kernels(LIGER, model.config)
    use_liger(model)
    [(patched, flags)] = asked
    assert patched is model
    assert flags == {
        "rope": True,
        "rms_norm": True,
        "swiglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False), "GPUs only"),
        (
            lambda patch: patch.setitem(sys.modules, "liger_kernel.transformers", None),
            r"pip install 'refreshkv\[gpu\]'",
        ),
    ],
)
def test_where_they_cannot_run(asked, monkeypatch, change, reason):
    change(monkeypatch)
    config = tiny_model().config
    with pytest.raises(SettingsError, match=f"training.kernels=liger.*{reason}.*set training.kernels=torch") as error:
        validate_kernels(LIGER, config)
    assert "\n" not in str(error.value)
    validate_kernels(TrainingConfig(), config)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [("qwen3", {}, "of type qwen3"), ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu")],
)
def test_models_that_they_are_not_for(asked, family, settings, reason):
    with pytest.raises(SettingsError, match=f"{reason}; set training.kernels=torch"):
        validate_kernels(LIGER, tiny_model(family, **settings).config)


@pytest.fixture
def modelling(request):
    """transformers' module of a family, put back as it was: Liger changes it for all models."""
    module = sys.modules[type(tiny_model(request.param)).__module__]
    before = dict(vars(module))
    yield request.param
    vars(module).update(before)


def enabled(family):
    pytest.importorskip("liger_kernel")
    return tiny_enabled(family=family, dtype=torch.float32)


@pytest.mark.parametrize("modelling", ["llama", "qwen2", "qwen3", "mistral"], indirect=True)
def test_names_and_the_models_own_forward_stay(modelling):
    model = enabled(modelling)
    names, forward = list(model.state_dict()), model.forward
    use_liger(model)
    assert list(model.state_dict()) == names and model.forward == forward
    layer = model.model.layers[0]
    assert "forward" in vars(layer.mlp) and "forward" in vars(layer.input_layernorm)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's SwiGLU needs a GPU")
@pytest.mark.parametrize("modelling", ["llama", "qwen2", "qwen3", "mistral"], indirect=True)
def test_a_model_with_them_equals_one_without(modelling):
    results = []
    for change in (lambda model: None, use_liger):
        model = enabled(modelling).cuda().train()
        change(model)
        ids = random_ids(2, 24).cuda()
        loss = model(ids, labels=ids, simulation=Simulation(9, RefreshConfig(budget=6, stride=4)), use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.abs().max())))
