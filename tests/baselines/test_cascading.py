"""The cascading cache against lists of tokens, one at a time, against StreamingLLM, and against its parallel form."""

import pytest
import torch

from refreshkv import RefreshConfig
from refreshkv.baselines.cascading import CascadingCache, CascadingConfig, kept_tokens, parallel_mask
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.evaluation.strategies import build_strategies
from refreshkv.settings import SettingsError
from tests.baselines.test_baselines import PROMPT, STEPS, attend, drawn, run_layer
from tests.helpers.models import random_ids, tiny_enabled, tiny_model


def literal(query, key, value, sizes, decay, by_score):
    """One key/value head: query (T, G, D), key and value (T, D) -> outputs after the prompt; sub-caches are lists."""
    parts, odd, scores, outputs = [[] for _ in sizes], [False] * len(sizes), {}, []

    def insert(token):
        if len(parts[0]) < sizes[0]:
            return parts[0].append(token)
        for number in range(1, len(sizes)):
            part, full = parts[number], len(parts[number]) == sizes[number]
            if number > 1 and full:
                odd[number] = not odd[number]
                if not odd[number]:  # each second token that comes to a full sub-cache is not accepted
                    if by_score and scores[token] > scores[part[-1]]:
                        part[-1] = token
                    return None
            part.append(token)
            if not full:
                return None
            token = part.pop(0)
        return None

    for position in range(PROMPT + STEPS):
        held = [token for part in parts for token in part] + [position]
        seen = list(range(position + 1)) if position < PROMPT else held
        output, probabilities = attend(query[position], key, value, seen)
        received = dict(zip(seen, probabilities.amax(0).tolist(), strict=True))
        for token in held:
            scores[token] = decay * scores.get(token, 0.0) + (1 - decay) * received[token]
        if position >= PROMPT:
            outputs.append(output)
        insert(position)
    return torch.stack(outputs)


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize(("budget", "parts", "sinks"), [(12, 3, 4), (13, 4, 1), (9, 2, 0), (8, 1, 3), (60, 4, 4)])
def test_steps_equal_the_literal_form(budget, parts, sinks, by_score):
    query, key, value = drawn(4, 0), drawn(2, 1), drawn(2, 2)
    settings = CascadingConfig(budget, parts, sinks, by_score, decay=0.8)
    cache = CascadingCache(tiny_model().config, 60, budget, parts, sinks, by_score, decay=0.8)
    found, layer = run_layer(cache, query, key, value)
    for head in range(2):
        queries = query[0, 2 * head : 2 * head + 2].transpose(0, 1)
        expected = literal(queries, key[0, head], value[0, head], settings.sizes(budget), 0.8, by_score)
        torch.testing.assert_close(found[0, :, 2 * head : 2 * head + 2], expected, rtol=0, atol=1e-6)
    assert layer.keys.shape == (1, 2, budget + 1, 16), "more memory than the budget needs"


def test_the_score_decides_something():
    query, key, value = drawn(4, 0), drawn(2, 1), drawn(2, 2)
    caches = [CascadingCache(tiny_model().config, 60, 12, 3, 4, by_score) for by_score in (False, True)]
    by_count, by_score = (run_layer(cache, query, key, value)[0] for cache in caches)
    assert not torch.allclose(by_count, by_score, atol=1e-3)


def decoded(model, cache, ids, prompt):
    with torch.no_grad():
        parts = [model(ids[:, :prompt], past_key_values=cache).logits]
        parts += [model(ids[:, step : step + 1], past_key_values=cache).logits for step in range(prompt, ids.shape[1])]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("prompt", "settings"), [
    (20, CascadingConfig(13, 3, 2)), (9, CascadingConfig(16, 4, 4)), (33, CascadingConfig(0.5, 2, 1)),
])  # fmt: skip
def test_the_parallel_form_equals_decoding(prompt, settings):
    """To 1e-10 in float64, the mask in the plain model's attention."""
    ids = random_ids(2, 63)
    seen = parallel_mask(prompt, ids.shape[1], settings)
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    with torch.no_grad():
        plain = tiny_model(attn_implementation="sdpa")
        expected = plain(ids, attention_mask=mask.expand(2, 1, -1, -1), use_cache=False).logits
    model = tiny_enabled()
    cache = CascadingCache(model.config, 70, settings.budget, settings.parts, settings.sink_tokens)
    found = decoded(model, cache, ids, prompt)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (~seen.tril() & torch.ones_like(seen).tril()).any(), "nothing left the cache"


@pytest.mark.parametrize("by_score", [False, True])
def test_one_sub_cache_is_streaming_llm(by_score):
    model, ids = tiny_enabled(), random_ids(2, 50)
    found = decoded(model, CascadingCache(model.config, 60, 11, 1, by_score=by_score), ids, 20)
    expected = decoded(model, StreamingCache(model.config, 60, 11), ids, 20)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("by_score", [False, True])
def test_left_padded_rows_equal_the_same_rows_alone_and_a_reset_leaves_nothing(by_score):
    model, ids = tiny_enabled(), random_ids(2, 24, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
    cache = CascadingCache(model.config, 60, 0.5, 2, 2, by_score)
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    cache.reset()
    alone = model.generate(ids[1:, 9:], past_key_values=cache, **settings)
    assert torch.equal(together[1:, 9:], alone)


def test_older_tokens_are_sparser():
    kept, _ = kept_tokens(400, (4, 16, 16, 16, 16))
    assert kept[:4] == [0, 1, 2, 3] and sorted(kept[4:20]) == list(range(384, 400))
    for part in range(1, 4):
        held = sorted(kept[4 + 16 * part : 20 + 16 * part])
        gaps = {late - early for early, late in zip(held, held[1:], strict=False)}
        assert gaps == {2**part}


def test_what_cannot_be_is_refused_and_strategies_have_names():
    with pytest.raises(SettingsError, match="by_score=True has no parallel form"):
        parallel_mask(8, 20, CascadingConfig(12, by_score=True))
    with pytest.raises(SettingsError, match="budget=7 leaves no room .* for parts=4"):
        CascadingConfig(7)
    with pytest.raises(SettingsError, match="decay must be"):
        CascadingConfig(12, decay=1.0)
    names = ["cascading", "cascading:2", "cascading:2:score"]
    made = build_strategies(names, RefreshConfig(budget=12))
    assert [item.name for item in made] == ["cascading N=4", "cascading N=2", "cascading N=2 by score"]
    assert not any(item.is_parallel for item in made)
    assert isinstance(made[2].build_cache(tiny_model().config, 50), CascadingCache)
    with pytest.raises(SettingsError, match="ACCEPTANCE must be count or score, got x"):
        build_strategies(["cascading:2:x"], RefreshConfig(budget=12))
