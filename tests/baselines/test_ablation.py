"""The paper's ablations against a literal Python form, and against RefreshKV where nothing is changed."""

import pytest
import torch

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.baselines.ablation import AblationCache
from refreshkv.evaluation.strategies import build_strategy
from refreshkv.settings import SettingsError
from tests.baselines.test_baselines import PROMPT, STEPS, attend, drawn, run_layer
from tests.helpers.models import random_ids, tiny_enabled, tiny_model

STRIDE = 4


def choose(query, key, value, position, budget, group):
    """What one key/value head keeps at `position`, best first; query (T, G, D)."""
    _, probabilities = attend(query[position], key, value, list(range(position + 1)))
    scores = {"max": probabilities.amax(0), "mean": probabilities.mean(0), "first": probabilities[0]}[group].float()
    pooled = [float(scores[max(0, j - 3) : j + 4].max()) for j in range(position + 1)]
    return sorted(range(position + 1), key=lambda j: (-pooled[j], j))[:budget]


def literal(query, key, value, budget, group, selects, attends):
    """One key/value head: query (T, G, D), key and value (T, D) -> outputs after the prompt (STEPS, G, D)."""
    last, outputs = PROMPT - 1, []
    kept = choose(query, key, value, last, budget, group)
    for position in range(PROMPT, PROMPT + STEPS):
        left = max(0, len(kept) - max(0, len(kept) + position - last - 1 - budget))
        seen = kept[:left] + list(range(max(last + 1, position - budget), position + 1))
        is_full = (position - (PROMPT - 1)) % STRIDE == 0
        output, _ = attend(query[position], key, value, list(range(position + 1)) if is_full and attends else seen)
        outputs.append(output)
        if is_full and selects:
            last, kept = position, choose(query, key, value, position, budget, group)
    return torch.stack(outputs)


@pytest.mark.parametrize(("selects", "attends"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("group", ["max", "mean", "first"])
@pytest.mark.parametrize("budget", [3, 8, 100])
def test_steps_equal_the_literal_form(budget, group, selects, attends):
    query, key, value = drawn(4, 0), drawn(2, 1), drawn(2, 2)
    cache = AblationCache(tiny_model().config, 60, budget, STRIDE, group, selects, attends)
    found, layer = run_layer(cache, query, key, value)
    for head in range(2):
        queries = query[0, 2 * head : 2 * head + 2].transpose(0, 1)
        expected = literal(queries, key[0, head], value[0, head], budget, group, selects, attends)
        torch.testing.assert_close(found[0, :, 2 * head : 2 * head + 2], expected, rtol=0, atol=1e-10)
    full = layer.full_steps[0, PROMPT : PROMPT + STEPS].sum()
    assert full == (STEPS // STRIDE if attends else 0)


def test_nothing_changed_is_refreshkv():
    model = tiny_enabled(layers=2, dtype=torch.float64)
    ids = random_ids(2, 40, seed=5)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
    expected = model.generate(
        ids, past_key_values=RefreshCache(model.config, 70, RefreshConfig(budget=0.3, stride=5)), **settings
    )
    assert torch.equal(
        model.generate(ids, past_key_values=AblationCache(model.config, 70, 0.3, 5), **settings), expected
    )


def test_strategies_by_name():
    config = RefreshConfig(budget=16, stride=10)
    for text, settings in {
        "grouped:mean": {"stride": 10, "group": "mean"},
        "grouped:first:5": {"stride": 5, "group": "first"},
        "without-refresh:5": {"stride": 5, "selects": False},
        "without-full-attention": {"stride": 10, "attends": False},
    }.items():
        strategy = build_strategy(text, config)
        assert strategy.settings == {"cache": "AblationCache", "budget": 16, **settings}
        assert isinstance(strategy.build_cache(tiny_model().config, 40), AblationCache)
        assert not strategy.is_parallel
    with pytest.raises(SettingsError, match="GROUP must be one of max, mean, first"):
        build_strategy("grouped:median", config)
    with pytest.raises(SettingsError, match="stride"):
        AblationCache(tiny_model().config, 40, stride=0)
