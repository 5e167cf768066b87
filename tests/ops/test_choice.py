"""Which form computes what: from the environment, read once, and from configuration and shapes."""

import logging

import pytest
import torch

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.ops import choice
from refreshkv.ops.choice import CHOICE, Choice
from tests.helpers.models import random_ids, tiny_enabled


@pytest.mark.parametrize(("value", "is_naive"), [(None, False), ("", False), ("kernels", False), ("naive", True)])
def test_the_environment_is_read_when_the_choice_is_made(monkeypatch, value, is_naive):
    monkeypatch.delenv("REFRESHKV_OPS", raising=False)
    if value is not None:
        monkeypatch.setenv("REFRESHKV_OPS", value)
    assert Choice.from_environment().naive_only == is_naive


def test_other_values_are_refused(monkeypatch):
    monkeypatch.setenv("REFRESHKV_OPS", "fast")
    with pytest.raises(ValueError, match="REFRESHKV_OPS=fast .* naive or kernels"):
        Choice.from_environment()


def test_tensors_on_cpus_go_to_the_naive_form():
    assert not CHOICE.uses_kernels(torch.zeros(1))


def test_the_choice_is_logged_once(monkeypatch, caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="refreshkv"):
        for _ in range(2):
            CHOICE.uses_kernels(torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == [": ".join(line) for line in choice.describe()]


def test_each_operation_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    described = dict(Choice(naive_only=False).describe())
    assert {"full steps in training", "decoding steps", "prompt in a cache"} <= described.keys()
    assert Choice(naive_only=True).describe() == [("everything", "plain PyTorch, because REFRESHKV_OPS=naive is set")]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("select_stride", RefreshConfig(budget=6, stride=4, select_stride=2, score_bits=4)),
        ("pool_ahead", RefreshConfig(budget=6, stride=4, pool_ahead=True)),
    ],
)
def test_kernels_refuse_what_they_do_not_know(monkeypatch, name, config):
    """Decoding steps, so far: neither a cache nor the operation falls back to another form in silence."""
    monkeypatch.setattr(Choice, "uses_kernels", lambda self, tensor: True)
    message = f"^{name} is computed by the readable form only so far: set REFRESHKV_OPS=naive in the environment$"
    model = tiny_enabled()
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 30), past_key_values=RefreshCache(model.config, 60, config))
    with pytest.raises(ValueError, match=message):
        config.step_options().flat()


def test_full_steps_go_to_cudnn_by_configuration_alone(monkeypatch):
    """The same answer however often a shape has come."""
    monkeypatch.setattr(choice, "cudnn_takes", lambda *tensors: True)
    query = torch.zeros(1, 1, 90, 16)
    config = RefreshConfig(stride=10)
    for recurring in (False, True, False):
        plan = config.plan(query, 40, recurring=recurring)
        assert all(CHOICE.takes_full_steps_by_cudnn(query, query, query, plan) == recurring for _ in range(20))
