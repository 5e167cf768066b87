"""Recycled prompts give what fresh ones give: every strategy, family and overlap."""

import random

import pytest
import torch
from transformers import DynamicCache

from refreshkv import RefreshCache, RefreshConfig, Simulation
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.prefix.prompt_cache import PromptCache, keep_all_tokens
from refreshkv.prefix.recycling import STORE_BELOW, put_new, recycle, store_prompts
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError
from tests.helpers.models import FAMILIES, random_ids, tiny_enabled
from tests.helpers.prefix_stores import (
    FIXED,
    ROOM,
    SIMILAR,
    STRATEGIES,
    greedy,
    ids_of,
    known_tokens,
    overlapping,
    remember,
)

SLIDING = {
    "family": "qwen2",
    "layers": 3,
    "sliding_window": 12,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MODELS = [*({"family": family} for family in FAMILIES), SLIDING]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of a parallel and a sequential form


def new_store(model, tmp_path=None, most=10**9):
    return PrefixStore(None if tmp_path is None else tmp_path / "store", most, model)


# ---- parity


OVERLAPS = [(1, FIXED), (29, SIMILAR), (39, FIXED), (40, SIMILAR)]


@pytest.mark.parametrize(
    ("settings", "dtype", "overlaps"),
    [
        (MODELS[0], torch.float64, OVERLAPS),
        (SLIDING, torch.float64, OVERLAPS),
        (SLIDING, torch.float32, OVERLAPS[2:]),
        *((settings, torch.float64, OVERLAPS[1:2]) for settings in MODELS[1:-1]),
        *(pytest.param(settings, torch.float64, OVERLAPS, marks=pytest.mark.slow) for settings in MODELS[1:-1]),
        *(pytest.param(settings, torch.float32, OVERLAPS, marks=pytest.mark.slow) for settings in (MODELS[0], SLIDING)),
    ],
)
def test_recycled_prompts_equal_the_parallel_form(settings, dtype, overlaps):
    """The parity test of a prompt that was begun by another one: each way to cut it, both schedules."""
    model, generator = tiny_enabled(dtype=dtype, **settings), torch.Generator().manual_seed(1)
    for overlap, config in overlaps:
        first, prompt = overlapping(generator, 45, overlap, 40)
        ids = torch.cat([prompt, ids_of(generator, 15)], dim=1)
        store = new_store(model)
        remember(model, store, first)
        cache = RefreshCache(model.config, 55, config)
        depth = recycle(store, cache, prompt, least=1).tokens
        assert depth == min(overlap, 40 - max(2, config.observation_window))
        found = known_tokens(model, cache, ids, 40)
        with torch.no_grad():
            expected = model(ids, refresh=Simulation(40, config), use_cache=False).logits[:, depth:]
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("settings", "overlaps"),
    [
        pytest.param({}, [3, 40], id="full"),
        pytest.param(SLIDING, [33], id="sliding"),
        pytest.param({}, [0, 3, 33, 40], id="full, all", marks=pytest.mark.slow),
        pytest.param(SLIDING, [0, 3, 33, 40], id="sliding, all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_goes_on_from_a_recycled_prompt(name, settings, overlaps, tmp_path):
    model, generator = tiny_enabled(**settings), torch.Generator().manual_seed(2)
    for overlap in overlaps:
        first, prompt = overlapping(generator, 50, overlap, 40)
        ids = torch.cat([prompt, ids_of(generator, 8)], dim=1)
        store = new_store(model, tmp_path if overlap == 33 else None)
        remember(model, store, first)
        fresh, cache = STRATEGIES[name](model.config), STRATEGIES[name](model.config)
        reuse = recycle(store, cache, prompt, least=1)
        found, expected = known_tokens(model, cache, ids, 40), known_tokens(model, fresh, ids, 40)
        left = {"similarity": 4, "snapkv, the authors'": 8}.get(name, 2)
        assert (reuse.tokens, reuse.prompt_tokens) == (min(overlap, 40 - left), 40)
        assert (reuse.bytes > 0) == (overlap > 0)
        torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=0, atol=1e-10)


def random_pairs(count, longest, seed=0):
    """`count` times an overlap, from none to all of the prompt, and two prompts that share it."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for number in range(count):
        length, other = draw.randint(2, longest), draw.randint(2, longest)
        overlap = [0, min(length, other), draw.randint(0, min(length, other))][min(2, number % 20)]
        yield overlap, *overlapping(generator, length, overlap, other)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_random_pairs_in_float32(count):
    """Greedy tokens are equal and logits, of up to 6, to 1e-5; one store for all, so that entries compete."""
    model, names = tiny_enabled(dtype=torch.float32, initializer_range=0.2), list(STRATEGIES)
    store, reused = new_store(model, most=3 * 10**6), []
    for number, (overlap, first, second) in enumerate(random_pairs(count, 120)):
        make = STRATEGIES[names[number % len(names)]]
        remember(model, store, first)
        cache = make(model.config)
        reuse = recycle(store, cache, second, least=1)
        assert reuse.tokens >= min(overlap, second.shape[1] - 8)
        found, expected = greedy(model, cache, second, 4), greedy(model, make(model.config), second, 4)
        assert torch.equal(found[0], expected[0]), f"pair {number}, {names[number % len(names)]}"
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
        reused.append(reuse.tokens / second.shape[1])
        assert store.size <= store.max_bytes
    assert sum(share == 0 for share in reused) > count / 40 and sum(share > 0.9 for share in reused) >= count / 20


def test_random_pairs_in_bfloat16():
    """A matrix product of fewer rows may round differently: the logits after a prompt differ by at most two steps of
    bf16 at the largest of them."""
    model = tiny_enabled(dtype=torch.bfloat16, initializer_range=0.2)
    for _, first, second in random_pairs(20, 100, seed=3):
        store = new_store(model)
        remember(model, store, first)
        cache = STRATEGIES["full"](model.config)
        recycle(store, cache, second, least=1)
        _, found = greedy(model, cache, second, new=1)
        _, expected = greedy(model, STRATEGIES["full"](model.config), second, new=1)
        assert (found - expected).abs().max() <= 2 * 2**-7 * expected.abs().max()


# ---- batches


@pytest.mark.parametrize(("name", "folder"), [*((name, False) for name in STRATEGIES), ("fixed", True)])
def test_left_padded_rows_share_a_column(name, folder, tmp_path):
    """Prompts of different lengths and overlaps are filled up to the first column that any of them lacks."""
    model, generator = tiny_enabled(**SLIDING), torch.Generator().manual_seed(4)
    store = new_store(model, tmp_path if folder else None)
    lengths, overlaps, paddings = [40, 31, 22], [30, 25, 22], [0, 9, 18]
    ids = torch.zeros(3, 40, dtype=torch.int64)
    for row, (length, overlap) in enumerate(zip(lengths, overlaps, strict=True)):
        first, ids[row : row + 1, 40 - length :] = overlapping(generator, 45, overlap, length)
        remember(model, store, first)
    mask = (torch.arange(40) >= torch.tensor(paddings)[:, None]).long()
    cache = STRATEGIES[name](model.config)
    reuse = recycle(store, cache, ids, mask, least=1)
    assert (reuse.tokens, reuse.prompt_tokens) == (30 + 21 + 12, 93) and cache.get_seq_length() == 30
    ids, mask = torch.cat([ids, random_ids(3, 15)], dim=1), torch.nn.functional.pad(mask, (0, 15), value=1)
    found = known_tokens(model, cache, ids, 40, mask)
    expected = known_tokens(model, STRATEGIES[name](model.config), ids, 40, mask)[:, 30:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_row_whose_tokens_come_later_needs_no_entry():
    model, generator = tiny_enabled(), torch.Generator().manual_seed(5)
    store = new_store(model)
    first, second = overlapping(generator, 40, 20, 40)
    remember(model, store, first)
    ids = torch.cat([second, torch.cat([torch.zeros(1, 25, dtype=torch.int64), ids_of(generator, 15)], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    cache, fresh = RefreshCache(model.config, ROOM, FIXED), RefreshCache(model.config, ROOM, FIXED)
    assert recycle(store, cache, ids, mask, least=1).tokens == 20
    expected = known_tokens(model, fresh, ids, 40, mask)[:, 20:]
    found = known_tokens(model, cache, ids, 40, mask)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[1, 5:], expected[1, 5:], rtol=0, atol=1e-10)


def test_one_row_without_any_overlap_ends_the_reuse_of_its_batch():
    model, generator = tiny_enabled(), torch.Generator().manual_seed(6)
    store = new_store(model)
    first, second = overlapping(generator, 40, 30, 40)
    remember(model, store, first)
    cache = RefreshCache(model.config, ROOM, FIXED)
    reuse = recycle(store, cache, torch.cat([second, 3 + (second + 7) % 50]), least=1)
    assert reuse.tokens == 0 and cache.get_seq_length() == 0


# ---- requests


def test_prompts_of_a_batch_are_computed_once():
    model = tiny_enabled(**SLIDING)
    store = new_store(model)
    ids = random_ids(3, 90, seed=7)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    calls = []
    model.register_forward_pre_hook(
        lambda _, args, given: calls.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    store_prompts(store, ids, mask)
    store_prompts(store, ids, mask)
    assert calls == [(3, 90)]
    for name, make in STRATEGIES.items():
        cache = make(model.config)
        reuse = recycle(store, cache, ids, mask)
        assert reuse.tokens == 250 - 3 * (90 - cache.get_seq_length()) and cache.get_seq_length() >= 82
        assert reuse.seconds_saved is not None
        calls.clear()
        found = greedy(model, cache, ids, attention_mask=mask)
        assert calls[0][1] <= 8, name
        expected = greedy(model, make(model.config), ids, attention_mask=mask)
        assert torch.equal(found[0], expected[0])
    longer = torch.cat([ids, random_ids(3, 5)], dim=1)
    calls.clear()
    store_prompts(store, longer, torch.nn.functional.pad(mask, (0, 5), value=1))
    assert calls == [(3, 5)]
    assert sorted(len(entry.ids) for entry in store.entries) == [75, 95, 95], "shorter ones are covered"


def test_what_is_stored_after_a_request():
    """Another question about the same book is not worth the book's bytes again; a quarter more text is."""
    model, generator = tiny_enabled(), torch.Generator().manual_seed(8)
    store, book = new_store(model), ids_of(generator, 200)
    for more, stored in [(0, True), (10, False), (15, False), (60, True), (20, False), (0, False)]:
        ids = torch.cat([book, ids_of(generator, more)], dim=1) if more else book
        cache = RefreshCache(model.config, ROOM, FIXED)
        reuse = recycle(store, cache, ids)
        greedy(model, cache, ids)
        entry = put_new(store, ids, cache, reuse, seconds=1.0)
        assert (entry is not None) == stored == (reuse.tokens < STORE_BELOW * ids.shape[1])
        if stored:
            book = ids
    assert [len(entry.ids) for entry in store.entries] == [260]
    assert store.entries[0].seconds == pytest.approx(260 / 200), "what it takes whole, from the seconds of the first"


@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("name", ["full", "fixed", "similarity"])
def test_a_cache_is_stored_after_generation(name, settings):
    """The prompt is taken from the cache that the request used, without the tokens it generated."""
    model, generator = tiny_enabled(**settings), torch.Generator().manual_seed(9)
    store = new_store(model)
    first, second = overlapping(generator, 90, 70, 80)
    cache = keep_all_tokens(STRATEGIES[name](model.config))
    greedy(model, cache, first)
    entry = store.put(first, cache)
    assert entry.ids.tolist() == first[0].tolist()
    cache, fresh = STRATEGIES[name](model.config), STRATEGIES[name](model.config)
    assert recycle(store, cache, second).tokens == 70
    found, expected = greedy(model, cache, second), greedy(model, fresh, second)
    assert torch.equal(found[0], expected[0])


def test_a_reuse_that_is_not_worth_it_leaves_the_cache_empty():
    model, generator = tiny_enabled(), torch.Generator().manual_seed(10)
    store = new_store(model)
    first, second = overlapping(generator, 90, 63, 80)
    remember(model, store, first)
    cache = RefreshCache(model.config, ROOM, FIXED)
    assert recycle(store, cache, second).tokens == 0 and cache.get_seq_length() == 0
    assert recycle(store, cache, second, least=63).tokens == 63


def test_chunks_turns_and_resets_after_a_reuse():
    model, generator = tiny_enabled(), torch.Generator().manual_seed(11)
    store = new_store(model)
    first, second = overlapping(generator, 60, 41, 60)
    remember(model, store, first)
    cache, fresh = RefreshCache(model.config, ROOM, SIMILAR), RefreshCache(model.config, ROOM, SIMILAR)
    for _ in range(2):  # the second time after a reset
        recycle(store, cache, second, least=1)
        found = greedy(model, cache, second, prefill_chunk_size=7)[0]
        assert torch.equal(found, greedy(model, fresh, second)[0])
        turn = torch.cat([found, ids_of(generator, 5)], dim=1)
        assert torch.equal(greedy(model, cache, turn)[0], greedy(model, fresh, turn)[0])
        assert torch.equal(cache.full_steps[..., 60:], fresh.full_steps[..., 60:])
        cache.reset()
        fresh.reset()


def test_sampling_after_a_reuse_draws_the_same():
    model, generator = tiny_enabled(), torch.Generator().manual_seed(12)
    store = new_store(model)
    first, second = overlapping(generator, 60, 41, 60)
    remember(model, store, first)
    outputs = []
    for reused in (True, False):
        cache = RefreshCache(model.config, ROOM, FIXED)
        assert not reused or recycle(store, cache, second, least=1).tokens == 41
        torch.manual_seed(5)
        outputs.append(model.generate(second, past_key_values=cache, do_sample=True, max_new_tokens=12))
    assert torch.equal(*outputs)


# ---- what is refused


def test_what_cannot_be_filled_or_stored():
    model, ids = tiny_enabled(**SLIDING), random_ids(1, 40)
    store = new_store(model)
    entry = remember(model, store, ids)
    cache = RefreshCache(model.config, ROOM, FIXED)
    greedy(model, cache, ids)
    with pytest.raises(ValueError, match=r"holds 45 tokens cannot be filled: call reset\(\) first"):
        store.load(entry, cache)
    with pytest.raises(ValueError, match=r"layer 0 keeps only its window of 12 tokens: call .*keep_all_tokens"):
        store.put(ids, cache)
    cache = SnapKVCache(model.config, ROOM, 20)
    greedy(model, cache, ids)
    with pytest.raises(ValueError, match="does not hold the prompt's 40 tokens"):
        store.put(ids, keep_all_tokens(cache))
    with pytest.raises(ValueError, match=r"does not hold the prompt's 40 tokens"):
        store.put(ids, PromptCache(model.config, ROOM))
    for offload in (False, True):  # what was decoded from a small cache is not what a prompt would leave
        cache = keep_all_tokens(RefreshCache(model.config, ROOM, FIXED, offload=offload))
        tokens, _ = greedy(model, cache, ids)
        with pytest.raises(ValueError, match=r"does not hold the prompt's 44 tokens as full attention leaves them"):
            store.put(tokens[:, :44], cache)
        assert len(store.put(ids, cache).ids) == 40
    with pytest.raises(ValueError, match="H2OLayer depends on all queries of a prompt"):
        cache = H2OCache(model.config, ROOM, 20)
        cache.layers[1].load_prefix(*torch.zeros(2, 1, 2, 5, 8, dtype=torch.float64))
    for refused in (lambda h2o: store.load(entry, h2o), lambda h2o: recycle(store, h2o, ids)):
        with pytest.raises(SettingsError, match=r"H2OCache depends on all queries .*: leave out the prefix store"):
            refused(H2OCache(model.config, ROOM, 20))
    with pytest.raises(ValueError, match="41 tokens were asked of an entry that holds 40"):
        store.load(entry, RefreshCache(model.config, ROOM, FIXED), 41)
    with pytest.raises(ValueError, match="this DynamicCache is empty"):
        store.put(ids, DynamicCache())
    cache = DynamicCache(config=model.config)
    store.load(entry, cache)
    with pytest.raises(ValueError, match=r"holds 40 tokens cannot be filled"):
        store.load(entry, cache)
    with pytest.raises(ValueError, match="RefreshCache is full: 40 tokens, but max_cache_len=30"):
        store.load(entry, RefreshCache(model.config, 30, FIXED))


@pytest.mark.parametrize("window", [RefreshConfig(budget=6, observation_window=5), "snapkv"])
def test_too_short_a_rest_of_a_prompt_is_refused(window):
    """The selection needs the queries of the whole observation window, and the store has none."""
    model, ids = tiny_enabled(), random_ids(1, 40)
    store = new_store(model)
    entry = remember(model, store, ids)

    def make():
        return SnapKVCache(model.config, ROOM, 8, 5) if window == "snapkv" else RefreshCache(model.config, 60, window)

    for depth, enough in [(36, False), (35, True)]:
        cache = make()
        store.load(entry, cache, depth)
        if enough:
            assert torch.equal(greedy(model, cache, ids)[0], greedy(model, make(), ids)[0])
        else:
            with pytest.raises(ValueError, match="a block of 4 tokens follows .* leave that many tokens"):
                greedy(model, cache, ids)
