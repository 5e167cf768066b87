"""Prompts of stored chunks: turned, computed again in part, and decoded from, against the model and the simulation."""

import pytest
import torch
from transformers import DynamicCache

from refreshkv import RefreshCache, RefreshConfig, SettingsError, Simulation, enable
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.prefix.blending import blend, most_changed
from refreshkv.prefix.chunks import generate_from_chunks, load_chunks
from refreshkv.prefix.recycling import recycle
from refreshkv.prefix.rotary import find_rotations
from refreshkv.prefix.store import PrefixStore
from tests.helpers.marks import slow_tuples_unless, slow_unless
from tests.helpers.models import FAMILIES, random_ids, tiny_enabled, tiny_model
from tests.helpers.prefix_stores import FIXED, ROOM, SELECTING, greedy, known_tokens, remember

ROTARY = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
ENDS, LENGTH = (70, 75, 110, 130), 142
"""Ends of the prompt's chunks, the last one the question's, and all known tokens."""


def rotary_model(kind, **settings):
    return tiny_enabled(
        rope_parameters={"rope_theta": 10000.0, **ROTARY[kind]}, max_position_embeddings=2048, **settings
    )


def store_of(model):
    return PrefixStore(None, 10**9, model)


def chunks_of(ids, ends=ENDS):
    return [ids[0, start:end] for start, end in zip((0, *ends), ends[:-1], strict=False)]


@torch.no_grad()
def keys_at(model, ids, start):
    """Keys of each layer for a row alone, from position `start` on."""
    cache, positions = DynamicCache(), torch.arange(start, start + ids.shape[1]).unsqueeze(0)
    model(ids, position_ids=positions, past_key_values=cache)
    return [layer.keys for layer in cache.layers]


def assert_turns(model, start, tolerance=1e-5):
    """The first layer's keys to rounding; those behind an attention, whose angles the model rounds to float32 and so
    otherwise at each place, to `tolerance`."""
    ids = random_ids(1, 60, seed=start)
    pairs = zip(keys_at(model, ids, 0), keys_at(model, ids, start), strict=True)
    for number, (rotation, (stored, there)) in enumerate(zip(find_rotations(model), pairs, strict=True)):
        scale, bound = there.abs().max(), tolerance if number else 1e-6
        torch.testing.assert_close(rotation.turn(stored, start) / scale, there / scale, rtol=0, atol=bound)
        assert (stored - there).abs().max() / scale > 0.1
        assert rotation.turn(stored, 0) is stored


@pytest.mark.parametrize("kind", ROTARY)
def test_a_stored_chunk_turned_is_the_chunk_computed_there(kind):
    """In both data types, near and far."""
    for dtype, start, tolerance in ((torch.float64, 1, 1e-5), (torch.float64, 1900, 1e-4), (torch.float32, 300, 1e-5)):
        assert_turns(rotary_model(kind, dtype=dtype), start, tolerance)


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "gpt_oss"])
def test_keys_of_every_family_are_turned(family, monkeypatch):
    """Partial rotary embeddings, pairs of neighbours, normalised keys."""
    from tests.helpers import models

    monkeypatch.setitem(models.CHANGED, "cohere", "Cohere")
    settings = {"layer_types": ["full_attention"] * 3} if family == "gpt_oss" else {}
    model = tiny_model(family=family, **settings)
    if family == "cohere":
        assert {rotation.pairs for rotation in find_rotations(model)} == {"interleaved"}
    assert_turns(model, 300)


def test_keys_that_nothing_known_turns_are_refused():
    """A rotary embedding that turns by the square of the position."""
    model = tiny_model()
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda states, position_ids: forward(states, position_ids**2)
    with pytest.raises(SettingsError, match="the keys of layer 0 do not follow from their position"):
        find_rotations(model)


def test_one_chunk_is_prefix_reuse_bit_for_bit():
    """So is a chunk that is the beginning of a longer stored prompt."""
    model, ids = tiny_enabled(dtype=torch.float32), random_ids(1, LENGTH)
    store = store_of(model)
    remember(model, store, ids[:, :120])
    for config in (FIXED, SELECTING):
        caches = [RefreshCache(model.config, ROOM, config) for _ in range(2)]
        assert recycle(store, caches[0], ids[:, :120], least=1).tokens == 118
        reuse = load_chunks(store, caches[1], [ids[0, :118]], first=16)
        assert (reuse.tokens, reuse.known_tokens, reuse.recomputed_tokens) == (118, 118, 0)
        recycled, chunked = (known_tokens(model, cache, ids, 130) for cache in caches)
        assert torch.equal(recycled, chunked)


@pytest.mark.parametrize(
    ("kind", "config"),
    slow_tuples_unless(
        [("default", FIXED), ("yarn", SELECTING)],
        [(kind, config) for kind in ROTARY for config in (FIXED, SELECTING)],
    ),
)
def test_served_rows_are_simulated_rows(kind, config):
    """Decoded from chunks that were stored in another order, score keys of 4 bits included."""
    model, ids = rotary_model(kind), random_ids(1, LENGTH)
    store = store_of(model)
    for chunk in reversed(chunks_of(ids)[1:]):
        store.put_chunk(chunk)
    cache = RefreshCache(model.config, ROOM, config)
    reuse = load_chunks(store, cache, chunks_of(ids))
    assert (reuse.tokens, reuse.known_tokens) == (110, 40)
    served = known_tokens(model, cache, ids, 130)
    with torch.no_grad():
        simulated = model(ids, simulation=Simulation(130, config, chunks=ENDS)).logits[:, 110:]
        whole = model(ids, simulation=Simulation(130, config)).logits[:, 110:]
    torch.testing.assert_close(served, simulated, rtol=0, atol=1e-5)
    assert (served - whole).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "amount"), [("llama", {"first": 1000}), ("stablelm", {"changed": 1.0}), ("nanochat", {"changed": 1.0})]
)
def test_all_recomputed_is_the_full_prompt(family, amount):
    model, ids = tiny_enabled(family=family), random_ids(1, LENGTH)
    for config in (FIXED, SELECTING)[: 2 if family == "llama" else 1]:
        cache = RefreshCache(model.config, ROOM, config)
        assert load_chunks(store_of(model), cache, chunks_of(ids), **amount).recomputed_tokens == 40
        served = known_tokens(model, cache, ids, 130)
        with torch.no_grad():
            whole = model(ids, simulation=Simulation(130, config)).logits[:, 110:]
        torch.testing.assert_close(served, whole, rtol=0, atol=1e-10)


@torch.no_grad()
def states_of(model, ids, ends=ENDS):
    """Keys and values of each layer for chunks that are computed alone where they stand."""
    parts = []
    for start, end in zip((0, *ends), ends[:-1], strict=False):
        cache = DynamicCache()
        model(ids[:, start:end], position_ids=torch.arange(start, end).unsqueeze(0), past_key_values=cache)
        parts.append([(layer.keys, layer.values) for layer in cache.layers])
    return [
        tuple(torch.cat(blocks, dim=2) for blocks in zip(*layer, strict=True)) for layer in zip(*parts, strict=True)
    ]


@torch.no_grad()
def blended_one_by_one(model, ids, states, columns):
    """The definition of `blend`: each token again by itself, after what stands before it."""
    for column in columns:
        cache = DynamicCache()
        for number, (keys, values) in enumerate(states):
            cache.update(keys[:, :, :column], values[:, :, :column], number)
        model(ids[:, column : column + 1], position_ids=torch.tensor([[column]]), past_key_values=cache)
        for (keys, values), layer in zip(states, cache.layers, strict=True):
            keys[:, :, column], values[:, :, column] = layer.keys[:, :, column], layer.values[:, :, column]
    return states


@pytest.mark.parametrize("columns", slow_unless([[70, 75, 76]], [[70], [0, 69, 70, 71, 74, 90, 109], [70, 75, 76]]))
def test_blending_is_computing_the_tokens_one_by_one(columns):
    for model in (tiny_enabled(layers=3), tiny_enabled(family="gpt_oss", layer_types=["full_attention"] * 3)):
        ids = random_ids(1, LENGTH)
        states = states_of(model, ids)
        found = blend(model, ids[:, :110], [(k.clone(), v.clone()) for k, v in states], torch.tensor(columns))
        for blended, expected in zip(found, blended_one_by_one(model, ids, states, columns), strict=True):
            for one, other in zip(blended, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_most_changed_tokens_are_those_of_the_plain_form():
    model, ids = tiny_enabled(layers=3), random_ids(1, LENGTH)[:, :110]
    states, cache = states_of(model, ids), DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    distance = (cache.layers[1].values - states[1][1]).pow(2).sum(dim=(0, 1, 3)).sqrt().tolist()
    order = sorted(range(70, 110), key=lambda token: (-distance[token], token))
    for share, count in ((0.01, 2), (0.15, 17), (1.0, 40)):
        assert most_changed(model, ids, states, share, 70).tolist() == sorted(order[:count])
    cache = RefreshCache(model.config, ROOM, FIXED)
    assert load_chunks(store_of(model), cache, chunks_of(ids), changed=0.15).recomputed_tokens == 17


def test_recomputing_brings_the_prompt_nearer_to_the_full_one():
    model, ids = tiny_enabled(layers=3, initializer_range=0.1), random_ids(1, LENGTH)
    full, store, errors = keys_at(model, ids[:, :110], 0), store_of(model), []
    for amount in ({}, {"changed": 0.15}, {"changed": 0.3}):
        cache = FullCache(model.config, ROOM)
        load_chunks(store, cache, chunks_of(ids), **amount)
        errors.append(sum(float((a.keys[:, :, :110] - b).norm()) for a, b in zip(cache.layers, full, strict=True)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("folder", [None, "store"], ids=["memory", "folder"])
def test_generating_from_chunks(folder, tmp_path):
    """With all computed again the text is that of the whole prompt; a damaged chunk is computed anew."""
    config = RefreshConfig(budget=8, stride=4)
    model, ids = tiny_enabled(config, dtype=torch.float32), random_ids(1, 130)
    store, settings = (
        PrefixStore(folder and tmp_path / folder, 10**9, model),
        {"do_sample": False, "eos_token_id": None},
    )
    for _ in range(2):
        found = generate_from_chunks(store, chunks_of(ids), ids[0, 110:], max_new_tokens=6, first=1000, **settings)
        assert torch.equal(found, greedy(model, RefreshCache(model.config, ROOM), ids)[0])
        for file in tmp_path.glob("store/*.safetensors"):
            file.write_bytes(file.read_bytes()[:-4] + b"none")
    assert len(store.entries) == 3


def test_a_longer_prompt_serves_its_beginning():
    model, ids = tiny_enabled(), random_ids(1, LENGTH)
    store = store_of(model)
    store.put_chunk(ids[:, :100])
    assert store.put_chunk(ids[0, :70]) is store.entries[0] and len(store.entries) == 1


def test_what_cannot_be_is_refused():
    model, ids = tiny_enabled(), random_ids(1, LENGTH)
    store, chunks = store_of(model), chunks_of(ids)

    def refused(words, cache=None, store=store, chunks=chunks, **amount):
        with pytest.raises((SettingsError, ValueError), match=words) as caught:
            load_chunks(store, RefreshCache(model.config, ROOM, FIXED) if cache is None else cache, chunks, **amount)
        assert "\n" not in str(caught.value)

    refused("first must be a whole number", first=-1)
    refused("changed must be a share from 0 to 1", changed=1.5)
    refused("first=3 and changed=0.5 exclude each other", first=3, changed=0.5)
    refused("chunks is empty", chunks=[])
    refused("max_bytes=100 of the prefix store holds no chunk of 70 tokens", store=PrefixStore(None, 100, model))
    refused("sink_tokens=1: chunks", cache=RefreshCache(model.config, ROOM, RefreshConfig(budget=8, sink_tokens=1)))
    refused("H2OCache depends on all queries", cache=H2OCache(model.config, ROOM, 0.3))
    filled = RefreshCache(model.config, ROOM, FIXED)
    load_chunks(store, filled, chunks)
    refused("a cache that holds 110 tokens cannot be filled", cache=filled)
    refused("call refreshkv.enable", store=store_of(tiny_model()))
    one = tiny_enabled(layers=1)
    refused("use first=N", cache=RefreshCache(one.config, ROOM, FIXED), store=store_of(one), changed=0.5)
    types = ["full_attention", "sliding_attention"]
    other = tiny_enabled(family="qwen2", sliding_window=12, use_sliding_window=True, layer_types=types)
    refused("full attention in every layer", cache=RefreshCache(other.config, ROOM, FIXED), store=store_of(other))
    with pytest.raises(SettingsError, match="the question has 1 tokens"):
        generate_from_chunks(store, chunks, ids[0, 110:111], max_new_tokens=3, refresh=FIXED)
    flash = enable(tiny_model(), FIXED, prompt_attention="flash_attention_2")
    with pytest.raises(SettingsError, match="knows no tokens that are computed again"):
        blend(flash, ids[:, :110], states_of(model, ids), torch.tensor([80]))
