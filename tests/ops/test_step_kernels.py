"""The kernels of a decoding step against the naive form, step by step: on a GPU, or under Triton's interpreter."""

import gc
import pickle
import weakref
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from refreshkv import NEVER, RefreshConfig
from refreshkv.baselines.full import FullLayer
from refreshkv.baselines.h2o import H2OConfig, H2OLayer
from refreshkv.baselines.snapkv import SnapKVConfig, SnapKVLayer
from refreshkv.baselines.streaming import StreamingConfig, StreamingLayer
from refreshkv.cache import joint_state
from refreshkv.cache.layer import RefreshLayer
from refreshkv.cache.refresh import RefreshCache
from refreshkv.ops import naive
from refreshkv.ops.choice import Choice
from refreshkv.ops.state import LAST_FULL, Decisions, LayerState, SelectionOptions, SelectionScratch, StepOptions
from tests.helpers.marks import slow_unless
from tests.helpers.models import random_ids, tiny_enabled

pytest.importorskip("triton")

from refreshkv.ops.selection import step as decode_selection
from refreshkv.ops.step import attention as decode_attention
from refreshkv.ops.step import finishing
from refreshkv.ops.step import launches as decode_kernels

KERNELS = SimpleNamespace(uses_kernels=lambda tensor: True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# prompt, steps, query heads per group, key/value heads, head size, padding of the second row, configuration
CASES = {
    "fixed": (20, 12, 2, 2, 16, 5, RefreshConfig(budget=8, stride=5)),
    "every step full": (17, 6, 2, 1, 16, 0, RefreshConfig(budget=8, stride=1)),
    "seven heads to a group": (21, 9, 7, 1, 16, 3, RefreshConfig(budget=9, stride=4)),
    "odd head size": (21, 9, 1, 2, 24, 3, RefreshConfig(budget=9, stride=2)),
    "one key": (9, 14, 2, 2, 16, 3, RefreshConfig(budget=1, stride=6)),
    "a prompt of one token": (1, 12, 2, 1, 16, 0, RefreshConfig(budget=5, stride=3)),
    "a budget beyond the row": (12, 16, 2, 2, 16, 4, RefreshConfig(budget=1000, stride=7)),
    "a fraction of padded rows": (30, 14, 2, 2, 16, 13, RefreshConfig(budget=0.3, stride=6)),
    "never refreshed": (31, 16, 4, 1, 16, 0, RefreshConfig(budget=12, stride=NEVER)),
    "similarity": (20, 25, 2, 2, 16, 5, RefreshConfig(budget=10, stride=3, threshold=0.3)),
    "long intervals": (50, 26, 2, 1, 16, 5, RefreshConfig(budget=36, stride=24)),
    "similarity, long intervals": (50, 45, 2, 1, 16, 5, RefreshConfig(budget=36, stride=20, threshold=-0.1)),
    "observers and windows": (
        *(20, 14, 2, 2, 16, 5),
        RefreshConfig(budget=9, stride=5, observation_window=4, recent_window=3, sink_tokens=2, pool_kernel=3),
    ),
    "short prompt, many observers": (3, 14, 2, 1, 16, 1, RefreshConfig(budget=9, stride=5, observation_window=9)),
    "windows beyond the budget": (21, 9, 2, 1, 16, 4, RefreshConfig(budget=4, stride=4, recent_window=9)),
    "pooling ahead": (21, 9, 2, 2, 16, 4, RefreshConfig(budget=7, stride=3, pool_kernel=4, pool_ahead=True)),
}

# the same with selecting steps
SELECTING = {
    "every second, four bits": (
        *(20, 7, 2, 2, 16, 5),
        RefreshConfig(budget=8, stride=NEVER, select_stride=2, score_bits=4),
    ),
    "pooled over two": (
        *(33, 5, 2, 2, 16, 5),
        RefreshConfig(budget=8, stride=NEVER, select_stride=2, score_bits=4, pool_ahead=True, pool_kernel=2),
    ),
    "beside full steps": (
        *(20, 13, 3, 1, 24, 5),
        RefreshConfig(budget=9, stride=6, select_stride=4, score_bits=8, pool_ahead=True, pool_kernel=4),
    ),
    "beside the similarity schedule": (
        *(20, 8, 2, 2, 16, 5),
        RefreshConfig(budget=10, stride=2, threshold=0.0, select_stride=2, score_bits=4),
    ),
    "much at once": (
        *(20, 7, 3, 1, 24, 5),
        RefreshConfig(
            budget=0.5,
            stride=3,
            threshold=-0.1,
            select_stride=3,
            score_bits=4,
            pool_kernel=4,
            pool_ahead=True,
            observation_window=4,
            recent_window=3,
            sink_tokens=2,
        ),
    ),
    "keys themselves": (20, 8, 2, 2, 16, 5, RefreshConfig(budget=8, stride=5, select_stride=2)),
    "three heads to a group of 64": (
        *(45, 4, 3, 3, 64, 0),
        RefreshConfig(budget=9, stride=NEVER, select_stride=1, score_bits=4, pool_ahead=True),
    ),
    "heads of 128": (
        *(33, 3, 2, 1, 128, 7),
        RefreshConfig(budget=9, stride=NEVER, select_stride=1, score_bits=4, observation_window=2),
    ),
    "heads of 256": (
        *(33, 4, 2, 1, 256, 7),
        RefreshConfig(budget=9, stride=3, select_stride=2, score_bits=4),
    ),
    "every query's own top": (
        *(33, 3, 1, 1, 24, 7),
        RefreshConfig(budget=5, stride=NEVER, select_stride=1, score_bits=4, pool_kernel=1),
    ),
    "windows": (
        *(50, 6, 2, 2, 16, 11),
        RefreshConfig(budget=12, stride=5, select_stride=2, score_bits=4, recent_window=5, sink_tokens=3),
    ),
    "windows beyond the budget": (
        *(40, 6, 2, 1, 16, 4),
        RefreshConfig(budget=4, stride=5, select_stride=2, score_bits=4, recent_window=9, sink_tokens=2),
    ),
    "observers": (
        *(40, 9, 2, 2, 16, 5),
        RefreshConfig(budget=9, stride=NEVER, select_stride=2, score_bits=8, observation_window=4, recent_window=3),
    ),
    "short prompt, many observers": (
        *(2, 8, 2, 1, 16, 1),
        RefreshConfig(budget=3, stride=7, select_stride=1, score_bits=4, observation_window=5, pool_kernel=3),
    ),
    "one key": (20, 9, 2, 1, 16, 3, RefreshConfig(budget=1, stride=7, select_stride=3, score_bits=4)),
    "a budget beyond the row": (
        *(12, 8, 2, 2, 16, 4),
        RefreshConfig(budget=1000, stride=7, select_stride=3, score_bits=4),
    ),
    "a prompt of one token": (1, 9, 2, 1, 16, 0, RefreshConfig(budget=3, stride=5, select_stride=2, score_bits=4)),
    "few selections": (
        *(40, 50, 2, 1, 16, 5),
        RefreshConfig(budget=30, stride=NEVER, select_stride=24, score_bits=4),
    ),
}


def drawn(generator, heads, length, head_dim, dtype=torch.float32, rows=2):
    # as a model lays them out: (B, T, H, D) in memory
    return torch.randn(rows, length, heads, head_dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)


def prompted_layer(query, key, value, padding, config, capacity):
    layer = RefreshLayer(capacity, config)
    layer.update(key, value)
    layer.end_block(query, padding, query.shape[-1] ** -0.5)
    return layer


def seen_of(layer):
    """The set of positions each row and key/value head would attend to in the next step, if partial."""
    queue = naive.small_cache(int(layer.cumulative_length), layer.row_state, layer.selected.long())
    return [[sorted(position for position in head if position >= 0) for head in row] for row in queue.tolist()]


def compare(case, dtype=torch.float32, tolerance=1e-4, seed=0):
    prompt, steps, groups, kv_heads, head_dim, padding, config = case
    generator = torch.Generator().manual_seed(seed)
    padding = torch.tensor([0, padding], device=DEVICE)
    heads = (groups * kv_heads, kv_heads, kv_heads)
    block = [drawn(generator, count, prompt, head_dim, dtype) for count in heads]
    ours, theirs = (prompted_layer(*block, padding, config, prompt + steps) for _ in range(2))
    options = (config.step_options(), head_dim**-0.5)
    for step in range(steps):
        token = [drawn(generator, count, 1, head_dim, dtype) for count in heads]
        found = decode_kernels.decode_step(*token, ours.state(), *options, ours.selecting_state())
        expected = naive.decode_step(*token, theirs.state(), *options, theirs.selecting_state())
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, s=step: f"{s}: {m}")
        kept = ["keys", "values", "full_steps", "cumulative_length"]
        kept += [name for name in ours.batch_state if name in ("selecting_steps", "score_codes", "score_scales")]
        # a single observer is the step's own query
        for name in kept + ["observers"] * (config.observation_window > 1):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (step, name)
        assert torch.equal(ours.row_state, theirs.row_state), (step, "row_state")
        if config.threshold is not None:
            torch.testing.assert_close(ours.mean_query, theirs.mean_query)
        if (step + 2) % (config.select_stride or NEVER):  # else the next step chooses anew
            assert seen_of(ours) == seen_of(theirs), (step, "selected")
    return theirs


QUICK = ("fixed", "a fraction of padded rows", "seven heads to a group", "similarity", "observers and windows")


@pytest.mark.parametrize("name", slow_unless(QUICK, CASES))
def test_steps_equal_the_naive_form(name):
    layer = compare(CASES[name])
    if "similarity" in name:
        assert len({tuple(row) for row in layer.full_steps.tolist()}) == 2, "rows refresh together: the test shows less"


QUICK_SELECTING = ("every second, four bits", "much at once")


@pytest.mark.parametrize("name", slow_unless(QUICK_SELECTING, SELECTING))
def test_selecting_steps_equal_the_naive_form(name):
    layer = compare(SELECTING[name])
    prompt, steps = SELECTING[name][:2]
    config, step = layer.config, torch.arange(prompt + steps, device=DEVICE) - (prompt - 1)
    expected = (step > 0) & (step % config.select_stride == 0) & ~layer.full_steps
    assert torch.equal(layer.selecting_steps, expected) and expected.any()
    if config.threshold is not None:
        assert len({tuple(row) for row in expected.tolist()}) == 2, "rows select together: the test shows less"


TOGETHER = ("fixed", "similarity", "long intervals", "observers and windows", "beside full steps", "much at once")


@pytest.mark.parametrize("name", slow_unless(("observers and windows", "much at once"), TOGETHER))
@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_layers_that_select_together(monkeypatch, name, parts):
    """Steps of three layers whose selections are one launch, and of each by itself; rows change places in between."""
    monkeypatch.setattr(joint_state, "CHOICE", KERNELS)
    monkeypatch.setattr(decode_selection, "parts_of", lambda pairs, capacity: parts)
    prompt, _, groups, kv_heads, head_dim, padding, config = (CASES | SELECTING)[name]
    steps = 6
    generator, padding = torch.Generator().manual_seed(3), torch.tensor([0, padding], device=DEVICE)
    heads = (groups * kv_heads, kv_heads, kv_heads)
    blocks = [[drawn(generator, count, prompt, head_dim) for count in heads] for _ in range(3)]
    together, alone = ([prompted_layer(*block, padding, config, prompt + steps) for block in blocks] for _ in range(2))
    joint_state.join_layers(together)
    together[-1].earlier_layers = tuple(together[:-1])
    options = (config.step_options(), head_dim**-0.5)
    for step in range(steps):
        if step == 3:
            before = together[0].joint
            for layer in (*together, *alone):
                layer.batch_select_indices(torch.tensor([1, 0, 1], device=DEVICE))
            assert together[0].joint is together[2].joint is not before
        rows = 2 if step < 3 else 3
        for ours, theirs in zip(together, alone, strict=True):
            token = [drawn(generator, count, 1, head_dim, rows=rows) for count in heads]
            ours.update(*token[1:])
            found = ours.step(*token, head_dim**-0.5)
            expected = decode_kernels.decode_step(*token, theirs.state(), *options, theirs.selecting_state())
            assert torch.equal(found, expected), step
        for ours, theirs in zip(together, alone, strict=True):
            for ours_state, theirs_state, state in zip(ours.state(), theirs.state(), LayerState._fields, strict=True):
                if state != "observers" or config.observation_window > 1:
                    assert torch.equal(ours_state, theirs_state), (step, state)
            assert ours.row_state.data_ptr() == ours.joint.row_state[ours.number].data_ptr()


def test_the_memory_of_a_cache_is_free_at_once(monkeypatch):
    """No layer is part of a circle, which Python would find some time later."""
    monkeypatch.setattr(joint_state, "CHOICE", KERNELS)
    model, gone = tiny_enabled(CASES["fixed"][-1]).to(DEVICE), []
    cache = RefreshCache(model.config, 20)
    with torch.no_grad():
        model(random_ids(2, 12).to(DEVICE), past_key_values=cache)
    for layer in cache.layers:
        assert layer.joint is not None
        weakref.finalize(layer, gone.append, layer.number)
    gc.disable()
    try:
        del layer, cache
        assert sorted(gone) == list(range(model.config.num_hidden_layers))
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 5, 16])
def test_any_number_of_splits(monkeypatch, splits):
    monkeypatch.setattr(decode_attention, "splits_of", lambda pairs, device: splits)
    monkeypatch.setitem(decode_attention.TILE, "BLOCK_N", 16)
    compare(CASES["similarity"])
    compare(CASES["observers and windows"])


@pytest.mark.parametrize(
    ("name", "sample", "candidates", "margin"),
    [
        ("fixed", 16, 16, 3.0),
        ("observers and windows", 16, 1, 3.0),
        ("fixed", 8, 16, 0.0),
        pytest.param("long intervals", 64, 64, 3.0, marks=pytest.mark.slow),
        pytest.param("long intervals", 16, 1, 3.0, marks=pytest.mark.slow),
    ],
)
def test_selection_whatever_the_brackets(monkeypatch, name, sample, candidates, margin):
    """Good brackets, some with too many candidates between them, and wrong ones; several blocks of everything."""
    monkeypatch.setattr(decode_selection, "SAMPLE", sample)
    monkeypatch.setattr(decode_selection, "CANDIDATES", candidates)
    monkeypatch.setattr(decode_selection, "MARGIN", margin)
    monkeypatch.setattr(decode_selection, "BLOCK", 16)
    monkeypatch.setattr(finishing, "RANKED", 16)
    monkeypatch.setattr(decode_kernels, "RANKING_PROGRAMS", 4)
    compare(CASES[name])


@pytest.mark.parametrize("name", ["full", "streaming", "h2o", "snapkv"])
@pytest.mark.parametrize("groups", slow_unless([7], [1, 7]))
def test_the_baselines_equal_their_naive_form(monkeypatch, name, groups):
    monkeypatch.setattr(decode_attention, "splits_of", lambda pairs, device: 3)
    prompt, steps, head_dim, capacity = 21, 8, 16, 40
    generator = torch.Generator().manual_seed(1)
    padding = torch.tensor([0, 5], device=DEVICE)
    block = [drawn(generator, count, prompt, head_dim) for count in (groups * 2, 2, 2)]
    make = {
        "full": lambda: FullLayer(capacity),
        "streaming": lambda: StreamingLayer(capacity, StreamingConfig(0.4, 2)),
        "h2o": lambda: H2OLayer(capacity, H2OConfig(0.4)),
        "snapkv": lambda: SnapKVLayer(capacity, SnapKVConfig(0.4)),
    }[name]
    layers = [make(), make()]
    for layer in layers:
        layer.update(*block[1:])
        layer.end_block(block[0], padding, 0.25)
    for step in range(steps):
        token = [drawn(generator, count, 1, head_dim) for count in (groups * 2, 2, 2)]
        outputs = []
        for layer, kernels in zip(layers, (True, False), strict=True):
            monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor, kernels=kernels: kernels)
            outputs.append(layer.step(*token, 0.25))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5, msg=lambda m, s=step: f"{s}: {m}")
        for state in layers[0].batch_state:
            ours, theirs = (getattr(layer, state) for layer in layers)
            torch.testing.assert_close(ours, theirs, msg=lambda m, s=(step, state): f"{s}: {m}")


def assert_exact_selection(length, budget, distinct, tail=12, kv_heads=3):
    """Random rankings, few of them different or many, against a stable sort; the lowest ranks in order."""
    generator = torch.Generator().manual_seed(length + distinct)
    rankings = torch.randint(0, distinct, (2, kv_heads, length + 5), generator=generator, dtype=torch.int32).to(DEVICE)
    padding = torch.tensor([0, length // 5], device=DEVICE)
    anchors = torch.zeros_like(padding)
    row_state = torch.stack([anchors, torch.full_like(padding, budget), padding, anchors], dim=1)
    selected = torch.full((2, kv_heads, budget), -1, device=DEVICE, dtype=torch.int32)
    flags = torch.zeros(2, length + 5, device=DEVICE, dtype=torch.bool)
    mean_query = torch.zeros(2, 64, device=DEVICE)
    scratch = SelectionScratch.empty((2,), kv_heads, length + 5, 64, torch.device(DEVICE))
    scratch.full.fill_(length - 1)
    scratch.arrived.zero_()
    decode_kernels.select(
        scratch._replace(rankings=rankings),
        torch.tensor(length, device=DEVICE),
        Decisions(row_state, selected, torch.zeros_like(selected), mean_query, flags),
        StepOptions(tail, None, SelectionOptions(1, 1, 0, 0)),
    )
    for row, start in enumerate(padding.tolist()):
        size = min(budget, length - start)
        for head in range(kv_heads):
            order = rankings[row, head, start:length].sort(descending=True, stable=True).indices[:size] + start
            found = selected[row, head, :size].long()
            assert torch.equal(found.sort().values, order.sort().values)
            assert torch.equal(found[-tail:], order[-tail:])
    assert flags.sum() == 2 and row_state[:, LAST_FULL].tolist() == [length - 1] * 2


@pytest.mark.parametrize("distinct", [3, 200, 2**30])
@pytest.mark.parametrize(("length", "budget"), [(40, 7), (300, 250), (1500, 100), (1500, 1), (5000, 5000)])
def test_the_selection_is_exact(length, budget, distinct):
    assert_exact_selection(length, budget, distinct)


# each size with each number of distinct scores; 2 and 8 programs in turn, as the interpreter takes long for each
SHARED = product([(40, 7), (200, 150), (400, 30), (400, 1), (250, 250)], [3, 200, 2**30])
LONG_SHARED = product([(1500, 100), (1500, 1), (900, 900)], [3, 200, 2**30])


@pytest.mark.parametrize(
    ("length", "budget", "distinct", "parts"),
    [(*size, distinct, (8, 2)[number % 2]) for number, (size, distinct) in enumerate(SHARED)]
    + [pytest.param(*size, distinct, 8, marks=pytest.mark.slow) for size, distinct in LONG_SHARED],
)
def test_the_selection_by_several_programs_is_exact(monkeypatch, length, budget, distinct, parts):
    """Parts without positions, or with more candidates than they have room for, among them."""
    monkeypatch.setattr(decode_selection, "parts_of", lambda pairs, capacity: parts)
    monkeypatch.setattr(decode_selection, "SAMPLE", 64)
    monkeypatch.setattr(decode_selection, "CANDIDATES", 128)
    monkeypatch.setattr(decode_selection, "BLOCK", 64)
    assert_exact_selection(length, budget, distinct, kv_heads=1)


def test_programs_that_share_a_row():
    found = [decode_selection.parts_of(pairs, 32800) for pairs in (1, 8, 16, 64, 256, 1000)]
    assert found == [16, 16, 16, 4, 1, 1] and decode_selection.parts_of(8, 2000) == 1


def test_a_pickled_cache_goes_on(monkeypatch):
    """What pickle takes apart, the layers' state and that of all of them, is one again."""
    monkeypatch.setattr(joint_state, "CHOICE", KERNELS)
    model, ids = tiny_enabled(dtype=torch.float32, head_dim=16, groups=4).to(DEVICE), random_ids(2, 17).to(DEVICE)
    results = []
    with torch.no_grad():
        for is_pickled in (False, True):
            cache = RefreshCache(model.config, 40, RefreshConfig(budget=6, stride=2))
            for columns in (ids[:, :14], ids[:, 14:15]):
                model(columns, past_key_values=cache)
            cache = pickle.loads(pickle.dumps(cache)) if is_pickled else cache
            logits = [model(ids[:, 15:16], past_key_values=cache).logits]  # a full step
            cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
            logits.append(model(ids[:, 16:], past_key_values=cache).logits)
            results.append((torch.cat(logits, dim=1), cache.full_steps))
    (expected, steps), (found, found_steps) = results
    assert torch.equal(found, expected) and torch.equal(found_steps, steps)
