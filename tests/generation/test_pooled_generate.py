"""refreshkv.generate: the tokens of a cache made by hand, in every way it may be called, and many requests at once."""

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.generation import BaseStreamer

import refreshkv
from refreshkv import NEVER, DraftCounts, RefreshCache, RefreshConfig, SettingsError
from refreshkv.generation.cache_pool import MOST_FREE, CachePool, Shape
from refreshkv.generation.generate import _state
from tests.generation.test_generate import SLIDING, letters_tokenizer
from tests.helpers.marks import slow_unless
from tests.helpers.models import random_ids, tiny_enabled, tiny_model

SIMILAR = RefreshConfig(budget=0.3, stride=3, threshold=0.1, observation_window=4, recent_window=2)
SELECTING = RefreshConfig(budget=6, stride=NEVER, select_stride=2, score_bits=4, pool_ahead=True)
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}


def by_hand(model, ids, config=SIMILAR, **settings):
    """The tokens from a cache that is made for this text."""
    length = ids.shape[1] + settings.get("max_new_tokens", 12)
    cache = RefreshCache(config=model.config, max_cache_len=length, refresh=config)
    return model.generate(ids, past_key_values=cache, **{**GREEDY, **settings})


def pool_of(model):
    return _state(model).pool.free


class Collector(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended += 1


# ---- one request


@pytest.mark.parametrize(("settings", "config"), [({}, SELECTING), (SLIDING, SIMILAR)], ids=["selecting", "sliding"])
def test_the_cache_is_sized_and_used_again(settings, config):
    model = tiny_enabled(config, **settings)
    caches = []
    for turn, length in enumerate((61, 20)):
        ids = random_ids(2, length, seed=turn)
        assert torch.equal(refreshkv.generate(model, ids, **GREEDY), by_hand(model, ids, config))
        ((shape, cache),) = pool_of(model)
        assert (shape.rows, cache.capacity) == (2, 128)
        caches.append(cache)
    assert caches[0] is caches[1]
    ids = random_ids(2, 120)
    assert torch.equal(refreshkv.generate(model, ids, **GREEDY), by_hand(model, ids, config))
    ((_, larger),) = pool_of(model)
    assert larger.capacity == 256


def test_every_way_to_call_it_gives_the_same_tokens():
    model, ids = tiny_enabled(SIMILAR), random_ids(2, 30)
    settings = {"do_sample": True, "temperature": 0.8, "eos_token_id": None, "max_new_tokens": 10}

    def seeded(call, *arguments, **more):
        torch.manual_seed(3)
        return call(*arguments, **settings, **more)

    cache = RefreshCache(config=model.config, max_cache_len=64)
    expected = seeded(model.generate, ids, past_key_values=cache)
    own = seeded(model.generate, ids)
    assert not torch.equal(expected, own)
    assert torch.equal(seeded(refreshkv.generate, model, ids), expected)
    assert torch.equal(seeded(refreshkv.generate, model, input_ids=ids, attention_mask=torch.ones_like(ids)), expected)
    assert torch.equal(seeded(model.generate, ids, custom_generate=refreshkv.generate), expected)
    torch.manual_seed(3)
    assert torch.equal(refreshkv.generate(model, ids, GenerationConfig(**settings)), expected)
    model.generate = partial(refreshkv.generate, model)
    assert torch.equal(seeded(model.generate, ids), expected)
    assert torch.equal(seeded(model.generate, inputs=ids, custom_generate=None), expected)


def test_a_model_is_enabled_by_its_saved_schedule_or_the_given_one():
    plain, ids = tiny_model(), random_ids(1, 40)
    with pytest.raises(SettingsError, match=r'no "refreshkv" in its config.json: pass config=RefreshConfig'):
        refreshkv.generate(plain, ids, **GREEDY)
    found = refreshkv.generate(plain, ids, refresh=SIMILAR, **GREEDY)
    assert torch.equal(found, by_hand(tiny_enabled(SIMILAR), ids))
    other = refreshkv.generate(plain, ids, refresh=SELECTING, **GREEDY)
    assert torch.equal(other, by_hand(plain, ids, SELECTING)) and not torch.equal(other, found)
    saved = tiny_model()
    saved.config.refreshkv = SIMILAR.to_dict()
    assert torch.equal(refreshkv.generate(saved, ids, **GREEDY), found)


def test_lossless_tokens_are_those_of_full_attention():
    model, ids, counts = tiny_enabled(SELECTING), random_ids(2, 40), DraftCounts()
    expected = tiny_model().generate(ids, **GREEDY)
    assert not torch.equal(refreshkv.generate(model, ids, **GREEDY), expected)
    for lossless in (True, counts):
        assert torch.equal(refreshkv.generate(model, ids, lossless=lossless, **GREEDY), expected)
    assert counts.tokens == 12 and counts.rounds > 0 and len(pool_of(model)) == 1
    assert torch.equal(model.generate(ids, custom_generate=refreshkv.generate, lossless=True, **GREEDY), expected)
    with pytest.raises(SettingsError, match="does not support streamer"):
        refreshkv.generate(model, ids, lossless=True, streamer=Collector(), **GREEDY)


@pytest.mark.parametrize("name", ["streamer", "stream_to"])
def test_a_streamer_gets_each_token_once(name):
    model, ids = tiny_enabled(SIMILAR), random_ids(1, 20)
    call, streamer = (refreshkv.generate, Collector()), Collector()
    if name == "stream_to":
        found = model.generate(ids, custom_generate=refreshkv.generate, stream_to=streamer, **GREEDY)
    else:
        found = call[0](model, ids, streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat(streamer.parts), found[0])
    assert [len(part) for part in streamer.parts] == [20] + [1] * 12 and streamer.ended == 1


@pytest.mark.parametrize("where", ["argument", "generation config", "model"])
def test_stop_strings_end_a_text(where):
    model, ids, tokenizer = tiny_enabled(SIMILAR), random_ids(1, 20), letters_tokenizer(size=100)
    free = refreshkv.generate(model, ids, **GREEDY)
    word = tokenizer.decode(free[0, 25])
    settings, config = dict(GREEDY), None
    if where == "argument":
        settings["stop_strings"] = [word]
    elif where == "model":
        model.generation_config.stop_strings = [word]
    else:
        settings, config = {}, GenerationConfig(**GREEDY, stop_strings=[word])
    stopped = refreshkv.generate(model, ids, config, tokenizer=tokenizer, **settings)
    first = next(i for i, token in enumerate(free[0, 20:].tolist()) if word in tokenizer.decode(token))
    assert torch.equal(stopped, free[:, : 21 + first]) and stopped.shape != free.shape
    with pytest.raises(ValueError, match="pass tokenizer="):
        refreshkv.generate(model, ids, config, **settings)


def test_a_streamer_that_fails_leaves_the_pool_in_order():
    model, ids = tiny_enabled(SIMILAR), random_ids(1, 20)
    expected = refreshkv.generate(model, ids, **GREEDY)

    class Cancelled(Collector):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 5:
                raise InterruptedError("the client has gone")

    with pytest.raises(InterruptedError):
        refreshkv.generate(model, ids, streamer=Cancelled(), **GREEDY)
    assert len(pool_of(model)) == 1
    assert torch.equal(refreshkv.generate(model, ids, **GREEDY), expected)


# ---- turns of a chat


@torch.no_grad()
def test_turns_of_a_chat_stay_in_one_cache():
    model, ids = tiny_enabled(SIMILAR), random_ids(1, 20)
    first = refreshkv.generate(model, ids, cache_length=200, return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert cache.capacity == 256 and pool_of(model) == []
    question = torch.cat([first.sequences, random_ids(1, 9, seed=5)], dim=1)
    second = refreshkv.generate(model, question, past_key_values=cache, **GREEDY)
    assert cache.length == question.shape[1] + 11 and pool_of(model) == []
    expected = RefreshCache(config=model.config, max_cache_len=256)
    model.generate(ids, past_key_values=expected, **GREEDY)
    assert torch.equal(second, model.generate(question, past_key_values=expected, **GREEDY))


# ---- ordinary attention


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_beams": 3}, "beam search"),
        ({"assistant_model": True}, "assisted generation"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"use_cache": False}, "use_cache=False"),
    ],
)
def test_other_ways_of_decoding_get_ordinary_attention_and_one_warning(settings, what):
    model, plain, ids = tiny_enabled(SIMILAR), tiny_model(), random_ids(1, 30)
    if "assistant_model" in settings:
        settings = {"assistant_model": tiny_model(seed=1)}
    with pytest.warns(UserWarning, match=f"refreshkv: {what}"):
        found = refreshkv.generate(model, ids, **GREEDY, **settings)
    assert torch.equal(found, plain.generate(ids, **GREEDY, **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(refreshkv.generate(model, ids, **GREEDY, **settings), found)


def test_beams_by_custom_generate_get_ordinary_attention_too():
    model, ids = tiny_enabled(SIMILAR), random_ids(1, 30)
    with pytest.warns(UserWarning, match="refreshkv: beam search"):
        found = model.generate(ids, custom_generate=refreshkv.generate, num_beams=3, **GREEDY)
    assert torch.equal(found, tiny_model().generate(ids, num_beams=3, **GREEDY))


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_model_without_refreshable_layers_decodes_with_its_own_attention(by_keyword):
    settings = {"family": "qwen2", "use_sliding_window": True, "sliding_window": 12}
    model = tiny_model(**settings, layer_types=["sliding_attention"] * 2)
    ids = random_ids(1, 30)
    expected = model.generate(ids, **GREEDY)

    def call():
        if by_keyword:
            return model.generate(ids, custom_generate=refreshkv.generate, **GREEDY)
        return refreshkv.generate(model, ids, **GREEDY)

    with pytest.warns(UserWarning, match="every layer of this model has a sliding window.* its own attention") as said:
        found = [call(), call()]
    assert all(torch.equal(one, expected) for one in found)
    lines = [str(warning.message) for warning in said if "refreshkv" in str(warning.message)]
    assert len(lines) == 1 and "\n" not in lines[0]


def test_the_callers_own_cache_and_implementations_of_others():
    model, ids = tiny_enabled(SIMILAR), random_ids(1, 30)
    plain = tiny_model().generate(ids, **GREEDY)
    assert torch.equal(refreshkv.generate(model, ids, past_key_values=DynamicCache(), **GREEDY), plain)
    with pytest.warns(UserWarning, match="cache_implementation='static' is left out"):
        found = refreshkv.generate(model, ids, cache_implementation="static", **GREEDY)
    assert torch.equal(found, by_hand(model, ids))


# ---- many requests


def test_the_pool_keeps_what_is_used_and_no_more():
    model, pool = tiny_enabled(SIMILAR), CachePool()
    shapes = [Shape(rows, SIMILAR, False) for rows in range(1, MOST_FREE + 3)]
    for shape in shapes:
        pool.give_back(shape, pool.take(model.config, shape, 100))
    assert [shape for shape, _ in pool.free] == shapes[2:]
    caches = [pool.take(model.config, shapes[-1], tokens) for tokens in (129, 60, 300)]
    assert [cache.capacity for cache in caches] == [256, 128, 384]
    for cache in caches:
        pool.give_back(shapes[-1], cache)
    assert pool.take(model.config, shapes[-1], 129) is caches[0]
    assert pool.take(model.config, shapes[-1], 20) is caches[1]
    assert pool.take(model.config, shapes[-1], 20) is caches[2]


def held_bytes():
    """Bytes of all tensors that are alive, but those that the compiler makes up."""
    gc.collect()
    tensors = [own for own in gc.get_objects() if type(own) in (torch.Tensor, torch.nn.Parameter)]
    storages = {own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("requests", slow_unless([10], [10, 100]))
def test_requests_at_once_get_the_answers_of_single_ones(requests):
    """8 threads, random lengths: after a warm-up with the longest, one compiled graph and one cache serve them all."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_enabled(SIMILAR, dtype=torch.float32)
    lengths = torch.randint(5, 100, (requests, 2), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [(random_ids(1, prompt, seed=number), 1 + new // 8) for number, (prompt, new) in enumerate(lengths)]
    expected = [by_hand(model, ids, max_new_tokens=new) for ids, new in texts]
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    settings = {"do_sample": False, "eos_token_id": None, "compile_config": compiled}

    def warm_up():
        refreshkv.generate(model, random_ids(1, 20), cache_length=128, max_new_tokens=3, **settings)

    warm_up()
    assert counters["stats"]["unique_graphs"] > 0
    counters.clear()
    ((_, cache),) = pool_of(model)
    running, most, together = set(), [], threading.Barrier(8)

    def ask(number):
        running.add(threading.get_ident())
        if number < 8:
            together.wait(60)
        most.append(len(running))
        try:
            ids, new = texts[number]
            found = refreshkv.generate(model, ids, max_new_tokens=new, **settings)
            return torch.equal(found, expected[number])
        finally:
            running.discard(threading.get_ident())

    before = held_bytes()
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(requests)))
    warm_up()  # a few hundred bytes of a request stay until the next one
    assert held_bytes() == before, "requests leave memory behind"
    assert counters["stats"]["unique_graphs"] == 0
    assert [pair[1] for pair in pool_of(model)] == [cache]
    assert max(most) == 8
