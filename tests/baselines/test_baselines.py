"""The caches to compare with, each against a literal Python form: lists of entries, one row and head at a time."""

import pytest
import torch

from refreshkv import NEVER, RefreshCache, RefreshConfig
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.settings import SettingsError
from tests.helpers.models import decode_logits, random_ids, tiny_enabled, tiny_model

PROMPT, STEPS, SCALING = 23, 21, 0.25

CACHES = {
    "streaming": lambda config, budget: StreamingCache(config, 60, budget),
    "streaming, one sink": lambda config, budget: StreamingCache(config, 60, budget, sink_tokens=1),
    "h2o": lambda config, budget: H2OCache(config, 60, budget),
    "snapkv": lambda config, budget: SnapKVCache(config, 60, budget),
    "snapkv, the authors'": lambda config, budget: SnapKVCache(config, 60, budget, 4, 5, "average"),
}


def attend(query, key, value, seen):
    """query (G, D) of one key/value head -> output (G, D), probabilities (G, entries)."""
    probabilities = (query @ key[seen].T * SCALING).softmax(-1)
    return probabilities @ value[seen], probabilities


def first_entries(name, query, key, value, budget, totals):
    """What one key/value head keeps of a prompt, the first to go first; query (T, G, D)."""
    tokens = list(range(PROMPT))
    for position in tokens:
        _, probabilities = attend(query[position], key, value, tokens[: position + 1])
        totals[: position + 1] += probabilities.amax(0)
    if "streaming" in name:
        sinks = 1 if "one sink" in name else 4
        return tokens if PROMPT <= budget else tokens[:sinks] + tokens[PROMPT - budget + sinks :]
    if name == "h2o":
        recent = tokens[PROMPT - budget // 2 :]
        scores = totals.tolist()
    else:
        window, half = (4, 2) if "authors" in name else (1, 3)
        recent = tokens[PROMPT - window :] if window > 1 else []
        scores = torch.zeros(PROMPT, dtype=torch.float64)
        for position in tokens[PROMPT - window :]:
            _, probabilities = attend(query[position], key, value, tokens[: position + 1])
            scores[: position + 1] += probabilities.amax(0) / window
        scores[recent] = 0.0
        near = [scores[max(0, j - half) : j + half + 1] for j in tokens]
        scores = [float(part.sum() / 5 if "authors" in name else part.max()) for part in near]
    order = sorted(tokens, key=lambda j: (j not in recent, -scores[j], j))
    return order[:budget][::-1]


def literal(name, query, key, value, budget):
    """One key/value head: query (T, G, D), key and value (T, D) -> outputs after the prompt (STEPS, G, D)."""
    totals = torch.zeros(len(key), dtype=torch.float64)
    entries, outputs = first_entries(name, query, key, value, budget, totals), []
    for position in range(PROMPT, PROMPT + STEPS):
        entries.append(position)
        output, probabilities = attend(query[position], key, value, entries)
        outputs.append(output)
        totals[entries] += probabilities.amax(0)
        if len(entries) > budget:
            if name == "h2o":
                old = [entry for entry in entries if entry <= position - budget // 2]
                entries.remove(min(old, key=lambda entry: float(totals[entry])))
            else:
                sinks = 0 if "streaming" not in name else 1 if "one sink" in name else 4
                entries.pop(sinks)
    return torch.stack(outputs)


def drawn(heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, PROMPT + STEPS, 16, generator=generator, dtype=torch.float64)


def run_layer(cache, query, key, value, left_padding=None):
    """Outputs of the steps after the prompt, (B, STEPS, H, D), and the layer."""
    layer, outputs = cache.layers[0], []
    layer.update(key[:, :, :PROMPT], value[:, :, :PROMPT])
    padding = torch.zeros(len(query), dtype=torch.int64) if left_padding is None else left_padding
    layer.end_block(query[:, :, :PROMPT], padding, SCALING)
    for step in range(PROMPT, PROMPT + STEPS):
        token = [tensor[:, :, step : step + 1] for tensor in (query, key, value)]
        layer.update(*token[1:])
        outputs.append(layer.step(*token, SCALING))
    return torch.cat(outputs, dim=1), layer


@pytest.mark.parametrize("budget", [8, 13, 30, 100])
@pytest.mark.parametrize("name", CACHES)
def test_steps_equal_the_literal_form(name, budget):
    query, key, value = drawn(4, 0), drawn(2, 1), drawn(2, 2)
    found, layer = run_layer(CACHES[name](tiny_model().config, budget), query, key, value)
    for head in range(2):
        queries = query[0, 2 * head : 2 * head + 2].transpose(0, 1)
        expected = literal(name, queries, key[0, head], value[0, head], budget)
        torch.testing.assert_close(found[0, :, 2 * head : 2 * head + 2], expected, rtol=0, atol=1e-6)
    needed = (1, 2, min(budget, 60) + 1, 16)
    assert layer.keys.shape == layer.values.shape == needed, "more memory than the budget or the context needs"


@pytest.mark.parametrize("name", CACHES)
def test_left_padded_rows_equal_the_same_rows_alone(name):
    model = tiny_enabled(layers=2)
    ids = random_ids(2, 24, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
    cache = CACHES[name](model.config, 0.4)
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    cache = CACHES[name](model.config, 0.4)
    alone = model.generate(ids[1:, 9:], past_key_values=cache, **settings)
    assert torch.equal(together[1:, 9:], alone)


def test_full_attention_is_the_plain_model():
    plain, model = tiny_model(), tiny_enabled()
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    settings = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False, "attention_mask": mask}
    found = model.generate(ids, past_key_values=FullCache(model.config, 60), **settings)
    assert torch.equal(found, plain.generate(ids, **settings))
    for chunk in (8, 19):
        cache = FullCache(model.config, 60)
        assert torch.equal(model.generate(ids, past_key_values=cache, prefill_chunk_size=chunk, **settings), found)


@pytest.mark.parametrize("budget", [7, 0.3])
def test_snapkv_is_refreshkv_that_never_refreshes(budget):
    model, ids = tiny_enabled(), random_ids(2, 50)
    expected, _ = decode_logits(model, ids, 20, RefreshConfig(budget=budget, stride=NEVER))
    cache = SnapKVCache(model.config, 60, budget)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        found = [model(ids[:, step : step + 1], past_key_values=cache).logits for step in range(20, 50)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 20:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CACHES)
def test_after_a_reset_nothing_is_left(name):
    model = tiny_enabled()
    settings = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
    cache = CACHES[name](model.config, 6)
    model.generate(random_ids(2, 20, seed=1), past_key_values=cache, **settings)
    with pytest.raises(ValueError, match="give it in one block"), torch.no_grad():
        model(random_ids(2, 3), past_key_values=cache)
    cache.reset()
    ids = random_ids(2, 15, seed=2)
    found = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(found, model.generate(ids, past_key_values=CACHES[name](model.config, 6), **settings))


def test_settings_that_cannot_be_are_refused():
    config = tiny_model().config
    with pytest.raises(SettingsError, match="budget=4 leaves no room beside sink_tokens=4"):
        StreamingCache(config, 60, 4)
    with pytest.raises(SettingsError, match="sink_tokens must be a whole number >= 0, got -1"):
        StreamingCache(config, 60, 8, sink_tokens=-1)
    with pytest.raises(SettingsError, match='pooling must be "max" or "average"'):
        SnapKVCache(config, 60, pooling="mean")
    with pytest.raises(SettingsError, match="budget must be"):
        H2OCache(config, 60, 0)
    with pytest.raises(SettingsError, match="max_cache_len must be"):
        FullCache(config, 0)


def test_a_refresh_cache_refuses_a_bad_length_first():
    with pytest.raises(SettingsError, match="max_cache_len must be"):
        RefreshCache(tiny_model().config, None, RefreshConfig(budget=0.5))
