"""Full keys and values in host memory: the same numbers as with all of them on the device, step by step."""

import copy
from types import SimpleNamespace

import pytest
import torch

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.cache import offload
from refreshkv.cache.fetching import FetchingLayer
from refreshkv.cache.layer import RefreshLayer
from refreshkv.cache.offload import OffloadedLayer
from refreshkv.ops import naive
from refreshkv.ops.choice import Choice
from refreshkv.ops.state import NearState
from tests.attention.test_parity import CASES as PARITY_CASES
from tests.attention.test_parity import SELECTING as SELECTING_PARITY_CASES
from tests.attention.test_parity import assert_parity
from tests.generation.test_generate import BESIDE, BOTH, FIXED, SELECTING, SIMILAR, generate, left_padded
from tests.helpers.marks import slow_unless
from tests.helpers.models import decode_logits, random_ids, tiny_enabled, tiny_model
from tests.ops.test_step_kernels import CASES, drawn
from tests.ops.test_step_kernels import SELECTING as SELECTING_CASES

EVERY_CASE = {**CASES, **{f"selecting, {name}": case for name, case in SELECTING_CASES.items()}}

FETCHING_CASES = {name: case for name, case in SELECTING_CASES.items() if FetchingLayer.serves(case[-1])}

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """Tokens move to the front of the GPU's buffers every few steps."""
    monkeypatch.setattr(offload, "SLACK", 2)


def both_layers(case, steps, kind=OffloadedLayer, dtype=torch.float32):
    """Outputs of each step, of the device's layer and of the offloaded one, and the two layers."""
    prompt, _, groups, kv_heads, head_dim, padding, config = case
    generator = torch.Generator().manual_seed(0)
    padding = torch.tensor([0, padding], device=DEVICE)
    heads = (groups * kv_heads, kv_heads, kv_heads)
    layers = RefreshLayer(prompt + steps, config), kind(prompt + steps, config)
    scaling = head_dim**-0.5
    outputs = []
    for step in range(steps + 1):
        query, key, value = (drawn(generator, count, 1 if step else prompt, head_dim, dtype) for count in heads)
        for layer in layers:
            layer.update(key, value)
            if step == 0:
                layer.end_block(query, padding, scaling)
        if step:
            outputs.append([layer.step(query, key, value, scaling) for layer in layers])
    return outputs, layers


def check(outputs, layers, tolerance):
    for step, (expected, found) in enumerate(outputs):
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, msg=lambda text, step=step: f"step {step}: {text}"
        )
    ours, theirs = layers[1], layers[0]
    kept = ["full_steps", "row_state", "mean_query", "cumulative_length"]
    # a single observer is the step's own query, and kernels need not keep it
    for name in kept + ["observers"] * (ours.config.observation_window > 1):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    if isinstance(ours, OffloadedLayer):
        ours._flush(ours.length)
    for name in set(ours.batch_state) & {"selecting_steps", "score_codes", "score_scales"}:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    if isinstance(ours, OffloadedLayer):
        assert ours.keys.device.type == ours.values.device.type == "cpu"
    assert torch.equal(ours.keys.to(DEVICE), theirs.keys) and torch.equal(ours.values.to(DEVICE), theirs.values)


@pytest.mark.parametrize("name", EVERY_CASE)
def test_every_step_equals_the_device_layers(name):
    check(*both_layers(EVERY_CASE[name], steps=3 * EVERY_CASE[name][1]), tolerance=1e-5)


@pytest.mark.parametrize("name", slow_unless(("fixed",), EVERY_CASE))
def test_by_kernels(monkeypatch, name):
    """On a GPU, or under Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor: True)
    outputs, layers = both_layers(EVERY_CASE[name], steps=6)
    check(outputs, layers, tolerance=1e-4)


@pytest.mark.parametrize("name", FETCHING_CASES)
def test_fetching_layers_equal_the_device_layers(name):
    """Schedules without full steps."""
    case = FETCHING_CASES[name]
    outputs, layers = both_layers(case, steps=3 * case[1], kind=FetchingLayer)
    check(outputs, layers, tolerance=1e-5)
    check_near(layers[1])


@pytest.mark.parametrize("name", slow_unless(("every second, four bits",), FETCHING_CASES))
def test_fetching_layers_by_kernels(monkeypatch, name):
    """On a GPU, or under Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor: True)
    outputs, layers = both_layers(FETCHING_CASES[name], steps=6, kind=FetchingLayer)
    check(outputs, layers, tolerance=1e-4)
    check_near(layers[1])


def check_near(layer):
    """The small cache holds the selected tokens, each in its slot."""
    near, (anchors, budgets, padding, _) = layer.near(), layer.row_state.unbind(1)
    for row, size in enumerate(torch.minimum(anchors + 1 - padding, budgets).tolist()):
        for head in range(near.held.shape[1]):
            chosen = layer.selected[row, head, :size].long()
            slots = near.slot_of[row, head, chosen].long()
            assert near.held[row, head, slots].tolist() == chosen.tolist()
            assert sorted(near.slot_of[row, head].unique().tolist())[-1] < layer.width
            for far, small in ((layer.keys, near.keys), (layer.values, near.values)):
                assert torch.equal(far[row, head, chosen], small[row, head, slots])


def test_placing_by_kernels():
    """Selections of several blocks and sizes, of which successive ones share much, against the naive form."""
    pytest.importorskip("triton")
    from refreshkv.ops.step import near as kernels

    generator, width, columns = torch.Generator().manual_seed(0), 70, 200
    budgets, padding = torch.tensor([70, 41]), torch.tensor([0, 9])
    layers = []
    for _ in range(2):
        like = torch.zeros(2, 2, width, dtype=torch.int32, device=DEVICE)
        numbers = {"length": torch.tensor(0), "row_state": torch.zeros(2, 4, dtype=torch.int64)}
        numbers = {name: tensor.to(DEVICE) for name, tensor in numbers.items()}
        near = {name: torch.full_like(like, -1) for name in ("selected", "held", "fetched")}
        near |= {"slot_of": like.new_full((2, 2, columns), -1), "own": like.new_full((2, 2, 2), -1)}
        near |= {"wanted": torch.zeros(2, dtype=torch.bool, device=DEVICE)}
        keys = torch.zeros(2, 2, columns, 4, device=DEVICE)
        layers.append(
            (numbers, like, NearState(keys, keys, **{name: t.clone() for name, t in numbers.items()}, **near))
        )
    score = torch.rand(2, 2, columns, generator=generator)
    for turn, position in enumerate((100, 101, 102, 150, 151)):
        score = torch.where(torch.rand(score.shape, generator=generator) < 0.3, torch.rand_like(score), score)
        best = score.masked_fill(torch.arange(columns) > position, -1.0).argsort(-1, descending=True)
        chosen = torch.cat([torch.full((2, 2, 1), position), best.masked_fill(best == position, 199)], -1)[..., :width]
        selecting = turn % 2 == 0 or position == 150
        for place, (numbers, selected, near) in zip((naive.place_near, kernels.place_near), layers, strict=True):
            anchor = torch.full_like(budgets, position if selecting else position - 1)
            numbers["row_state"].copy_(torch.stack([anchor, budgets, padding, padding], 1))
            numbers["length"].fill_(position + 1)
            if selecting:
                selected.copy_(chosen)
            place(SimpleNamespace(**numbers, selected=selected, keys=near.keys), near)
        kept = torch.arange(width, device=DEVICE) < budgets.to(DEVICE)[:, None, None]
        for name, expected, found in zip(NearState._fields, layers[0][2], layers[1][2], strict=True):
            if name == "fetched" and not selecting:
                continue
            if name == "selected":
                expected, found = expected * kept, found * kept
            assert torch.equal(expected, found), (turn, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long intervals", "similarity, long intervals"])
def test_by_kernels_until_most_have_dropped(monkeypatch, name):
    """More ranks drop out than the kernels sort at a time, while tokens move to the front."""
    pytest.importorskip("triton")
    monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor: True)
    outputs, layers = both_layers(CASES[name], steps=CASES[name][1] + 8)
    check(outputs, layers, tolerance=1e-4)


def test_moving_tokens(monkeypatch):
    pytest.importorskip("triton")
    from refreshkv.ops.step import transfer

    source = torch.randn(2, 3, 50, 24).to(DEVICE)
    index = torch.randint(-1, 50, (2, 3, 19), dtype=torch.int32).to(DEVICE)
    wanted = torch.tensor([False, True], device=DEVICE)
    results = []
    for form in (naive, transfer):
        target = torch.zeros(2, 3, 60, 24, device=DEVICE)
        form.copy_tokens(source, target, 7, 21, 33)
        form.copy_tokens(source.transpose(2, 3).contiguous().transpose(2, 3), target, 0, 58, 2)
        form.gather_tokens(source, index, wanted, target)
        results.append(target)
    assert torch.equal(*results)
    assert not results[0][0, :, :19].any() and results[0][1, :, :19].any()


def test_chosen_tokens_that_are_held_stay_where_they_are():
    """Against a dictionary of slots, with rows of several sizes."""
    generator = torch.Generator().manual_seed(0)
    width, columns, held = 9, 30, torch.full((2, 2, 9), -1, dtype=torch.int32)
    for turn in range(6):
        sizes = torch.tensor([width, 4 + turn % 3])
        selected = torch.rand(2, 2, columns, generator=generator).argsort(-1)[..., :width].int()
        slots, fetched = naive.place_chosen(selected, sizes, held, columns)
        for row, size in enumerate(sizes.tolist()):
            for head in range(2):
                before, moved = held[row, head].tolist(), fetched[row, head].tolist()
                wanted, where = selected[row, head, :size].tolist(), slots[row, head, :size].tolist()
                after = [new if new >= 0 else old for old, new in zip(before, moved, strict=True)]
                assert [after[slot] for slot in where] == wanted and len(set(where)) == size
                assert {position for position in moved if position >= 0} == set(wanted) - set(before)
        held = torch.where(fetched >= 0, fetched, held)
    assert (fetched < 0).any() and (fetched >= 0).any()


@pytest.mark.parametrize("case", range(len(SELECTING_PARITY_CASES)))
def test_selecting_steps_equal_training(case):
    prompt, config = SELECTING_PARITY_CASES[case]
    model, ids = tiny_enabled(groups=2, seed=3), random_ids(3, 45, seed=4)
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, prompt // 3, prompt - 1]):
        mask[row, :padding] = 0
    assert_parity(model, ids, prompt, config, mask, offload=True)


@pytest.mark.parametrize("case", slow_unless(range(0, len(PARITY_CASES), 3), range(len(PARITY_CASES))))
def test_parity_with_training(case):
    prompt, config = PARITY_CASES[case]
    model, ids = tiny_enabled(groups=2, seed=3), random_ids(3, 70, seed=4)
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, prompt // 3, prompt - 1]):
        mask[row, :padding] = 0
    assert_parity(model, ids, prompt, config, mask, offload=True)


@pytest.mark.parametrize(
    "config", [FIXED, SIMILAR, SELECTING, BOTH, BESIDE], ids=["fixed", "similarity", "selecting", "both", "beside"]
)
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=["greedy", "beams", "chunks"]
)
def test_generate(config, settings):
    model, (ids, mask) = tiny_enabled(), left_padded(random_ids(2, 20), [0, 5])
    settings = settings | {"attention_mask": mask, "new": 40}
    expected = generate(model, ids, config, **settings)
    cache = RefreshCache(model.config, 200, config, offload=True)
    assert torch.equal(generate(model, ids, cache=cache, **settings), expected)
    cache.reset()
    assert torch.equal(generate(model, ids, cache=cache, **settings), expected)


@pytest.mark.parametrize("selecting", [{}, {"select_stride": 3, "score_bits": 4}], ids=["plain", "selecting"])
def test_a_second_turn(selecting):
    """No mask, so nothing waits for the GPU in between."""
    dtype = torch.float32 if DEVICE == "cuda" else torch.float64
    config, ids = RefreshConfig(budget=7, stride=5, **selecting), random_ids(2, 60).to(DEVICE)
    model = tiny_enabled(layers=4, head_dim=16, dtype=dtype).to(DEVICE)
    caches = [RefreshCache(model.config, 60, config, offload=offloaded) for offloaded in (False, True)]
    bounds = [0, 20, *range(21, 30), 45, *range(46, 61)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        with torch.no_grad():
            logits = [model(ids[:, start:end], past_key_values=cache, use_cache=True).logits for cache in caches]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-3 if DEVICE == "cuda" else 1e-10)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_model_and_copies_of_a_cache(is_compiled):
    """A user's own torch.compile gives the same numbers; a copied cache goes on by itself."""
    config, model = RefreshConfig(budget=7, stride=5, select_stride=2, score_bits=4), tiny_enabled()
    ids = random_ids(1, 40)
    expected, _ = decode_logits(model, ids, 20, config)
    cache = RefreshCache(model.config, 60, config, offload=True)
    compiled = torch.compile(model, backend="eager") if is_compiled else model
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        again = copy.deepcopy(cache)
        for known in (cache, again):
            for position in range(20, 40):
                logits = compiled(ids[:, position : position + 1], past_key_values=known, use_cache=True).logits
                torch.testing.assert_close(logits, expected[:, position : position + 1], rtol=0, atol=1e-10)
    torch._dynamo.reset()


def test_rows_of_an_unused_cache_change_nothing():
    RefreshCache(tiny_model().config, 60, FIXED, offload=True).layers[0].batch_repeat_interleave(2)


def test_the_device_holds_the_small_cache_alone():
    config, model, ids = RefreshConfig(budget=8, stride=5), tiny_enabled(), random_ids(1, 300)
    _, cache = decode_logits(model, ids, 280, config, offload=True)
    layer = cache.layers[0]
    assert layer.near_keys.shape[2] == 8 + 6 + 2 and layer.keys.shape[2] == 300 and not hasattr(layer, "block")
