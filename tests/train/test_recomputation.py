"""Activation checkpointing of a share of the layers: which recompute, what it changes, and where their inputs wait."""

import pytest
import torch

from refreshkv import RefreshConfig, Simulation
from refreshkv.settings import SettingsError
from refreshkv.train import recomputation
from refreshkv.train.config import TrainingConfig
from refreshkv.train.recomputation import recompute_layers, recomputed_layers
from tests.helpers.models import random_ids, tiny_enabled

LAYERS = 6


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 2 / 3, 0.9, 1.0])
@pytest.mark.parametrize("layers", [1, 2, 7, 28, 32])
def test_the_share_is_spread_evenly_and_the_last_layer_is_kept(layers, share):
    found = recomputed_layers(layers, share)
    count = round(share * layers)
    assert sum(found) == count
    assert count == layers or not found[-1]
    for first in range(layers):
        for last in range(first, layers):
            length = last + 1 - first
            assert abs(sum(found[first : last + 1]) - length * count / layers) < 1


def gradients_and_runs(share, offload=False):
    """Gradients, and how often each layer's attention ran."""
    model = tiny_enabled(layers=LAYERS).train()
    runs = [0] * LAYERS
    for number, layer in enumerate(model.model.layers):

        def count(*_, number=number):
            runs[number] += 1

        layer.self_attn.register_forward_hook(count)
    if share is not None:
        recompute_layers(model, share, offload)
    ids = random_ids(2, 40)
    simulation = Simulation(15, RefreshConfig(budget=6, stride=4))
    model(ids, labels=ids, simulation=simulation, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, runs


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.34, 0.5, True])
def test_gradients_are_the_same_and_the_right_layers_run_twice(share, offload):
    expected, runs = gradients_and_runs(None)
    assert runs == [1] * LAYERS
    found, runs = gradients_and_runs(share, offload)
    assert runs == [1 + recomputes for recomputes in recomputed_layers(LAYERS, share)]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_inputs_of_recomputed_layers_alone_are_moved(monkeypatch):
    moved, ordinary = [], torch.empty

    def empty(*arguments, **settings):
        if "pin_memory" in settings:
            moved.append(tuple(arguments[0]))
        return ordinary(*arguments, **settings)

    monkeypatch.setattr(recomputation.torch, "empty", empty)
    gradients_and_runs(0.5, offload=True)
    assert moved == [(2, 40, 32)] * (LAYERS // 2)


def test_a_share_outside_the_layers_is_refused():
    for share in (-0.5, 1.5, 2):
        with pytest.raises(SettingsError, match="training.activation_checkpointing"):
            TrainingConfig(activation_checkpointing=share)
