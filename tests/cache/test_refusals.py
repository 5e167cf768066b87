"""What a cache cannot be used for: one line each."""

import copy
import pickle

import pytest
import torch

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.cache import keyword
from tests.generation.test_generate import SLIDING
from tests.helpers.models import random_ids, tiny_enabled, tiny_model

CONFIG = RefreshConfig(budget=6, stride=4)
IDS = random_ids(2, 20)
CACHES = {
    "refresh": lambda config: RefreshCache(config, 40, CONFIG),
    "offloaded": lambda config: RefreshCache(config, 40, CONFIG, offload=True),
    "full": lambda config: FullCache(config, 40),
    "streaming": lambda config: StreamingCache(config, 40, 9),
    "h2o": lambda config: H2OCache(config, 40, 9),
    "snapkv": lambda config: SnapKVCache(config, 40, 9),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize(
    "other",
    [{"layers": 1}, {"layers": 3}, SLIDING, {**SLIDING, "sliding_window": 7}],
    ids=["fewer", "more", "sliding", "another window"],
)
def test_a_cache_for_other_layers(name, other):
    model = tiny_enabled(CONFIG, **(SLIDING if "sliding_window" in other and other != SLIDING else {}))
    cache = CACHES[name](tiny_model(**other).config)
    with pytest.raises(ValueError, match=r"is for a model of \d layers.*make one with this model's config") as caught:
        model(IDS, past_key_values=cache)
    assert "\n" not in str(caught.value) and cache.length == 0


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_of_a_cache_with_gradients(name, duplicate):
    model = tiny_enabled(CONFIG)
    cache = CACHES[name](model.config)
    model(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match=r"filled with gradients cannot be copied: .*torch.no_grad\(\)") as caught:
        duplicate(cache)
    assert "\n" not in str(caught.value)
    cache.reset()
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        other = duplicate(cache)
        found, expected = (model(IDS[:, :1], past_key_values=each).logits for each in (other, cache))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
@torch.no_grad()
def test_batch_rows_by_mask_and_by_number(name, settings):
    model = tiny_enabled(CONFIG, **settings)
    caches = [CACHES[name](model.config) for _ in range(4)]
    for cache, change in zip(
        caches, (torch.tensor([False, True]), torch.tensor([1]), torch.tensor([-1]), [1]), strict=True
    ):
        model(IDS, past_key_values=cache)
        cache.batch_select_indices(change)
    found = [model(IDS[1:, :1], past_key_values=cache).logits for cache in caches]
    assert all(torch.equal(each, found[0]) for each in found)
    alone = CACHES[name](model.config)
    model(IDS[1:], past_key_values=alone)
    torch.testing.assert_close(found[0], model(IDS[1:, :1], past_key_values=alone).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["refresh", "h2o"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([True, False, True]), "a mask of 3 batch rows does not fit a cache of 2"),
        (torch.tensor([False, False]), "no batch row is chosen"),
        (torch.tensor([], dtype=torch.int64), "no batch row is chosen"),
        (torch.tensor([0, 2]), "are not all in a cache of 2 rows"),
        (torch.tensor([-3]), "are not all in a cache of 2 rows"),
        (torch.tensor([0.0]), "by a list of numbers or a mask"),
        (torch.tensor([[0]]), "by a list of numbers or a mask"),
    ],
)
@torch.no_grad()
def test_batch_rows_that_there_are_not(name, indices, message):
    model = tiny_enabled(CONFIG)
    cache, other = CACHES[name](model.config), CACHES[name](model.config)
    for each in (cache, other):
        model(IDS, past_key_values=each)
    for change in (cache.batch_select_indices, cache.reorder_cache):
        with pytest.raises(ValueError, match=message):
            change(indices)
    with pytest.raises(ValueError, match="repeats must be a whole number >= 1"):
        cache.batch_repeat_interleave(0)
    found, expected = (model(IDS[:, :1], past_key_values=each).logits for each in (cache, other))
    assert torch.equal(found, expected)


def test_a_cache_is_found_under_the_names_of_all_releases(monkeypatch):
    """transformers 5.24 calls it `cache`; calls may name it as before."""
    cache = object()
    for name in ("cache", "past_key_values"):
        monkeypatch.setattr(keyword, "CACHE_NAME", name)
        assert keyword.given_cache(keyword.as_keyword(cache)) is cache
        assert keyword.given_cache({"past_key_values": cache, name: cache}) is cache
        assert keyword.given_cache({"past_key_values": cache}) is cache and keyword.given_cache({}) is None
