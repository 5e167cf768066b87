"""The naive operations against the paper's sequential algorithm, and their gradients."""

import random
from dataclasses import replace

import pytest
import torch

from refreshkv import NEVER, RefreshConfig
from refreshkv.ops import naive, schedule
from refreshkv.ops.naive import selection
from refreshkv.ops.schedule import is_refresh, plan
from refreshkv.ops.state import FullSteps, SelectionOptions
from tests.helpers.reference import sequential_attention


def attention_inputs(rows, heads, kv_heads, length, head_dim, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randn(rows, count, length, head_dim, generator=generator, dtype=torch.float64)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def decoded(query, key, value, prompt, config, scaling, left_padding=None):
    """Output of the positions after the prompt, (B, H, T-P, D), and the plan."""
    plan = config.plan(query, prompt, left_padding)
    return naive.refresh_rows(query, key, value, plan, config.selection_options(), scaling).transpose(1, 2), plan


def select_one(key, position, budget, padding=0, pool_kernel=7):
    """The selection of one full step whose query is all ones."""
    query = torch.ones(1, 1, 1, key.shape[-1]).expand(-1, -1, key.shape[2], -1)
    steps = FullSteps(torch.tensor([[position]]), torch.tensor([budget]), torch.tensor([padding]), budget, budget)
    return naive.select(query, key, steps, SelectionOptions(pool_kernel, 1, 0, 0), 1.0).flatten().tolist()


@pytest.mark.parametrize("seed", range(24))
def test_parallel_form_equals_the_paper_algorithm(seed):
    compare_with_literal(seed, {})


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("select_stride", [1, 2, 3, 7])
def test_parallel_form_with_selecting_steps_equals_the_literal_one(select_stride, bits):
    seed = 10 * select_stride + bits
    selecting = {"select_stride": select_stride, "score_bits": bits, "pool_ahead": seed % 3 > 0}
    compare_with_literal(seed, selecting)


def compare_with_literal(seed, selecting):
    draw = random.Random(seed)
    length = draw.choice([23, 40, 63])
    prompt = draw.randint(1, length - 1)
    config = RefreshConfig(
        budget=draw.choice([1, 2, 5, 11, 20, 100, 0.25, 0.5]),
        stride=draw.choice([1, 2, 3, 7, 10, NEVER]),
        threshold=draw.choice([None, 0.0, 0.3]),
        pool_kernel=draw.choice([1, 3, 7]),
        observation_window=draw.choice([1, 4, 9]),
        recent_window=draw.choice([0, 4]),
        sink_tokens=draw.choice([0, 2]),
        **selecting,
    )
    kv_heads = draw.choice([1, 2])
    query, key, value = attention_inputs(2, kv_heads * draw.choice([1, 2, 3]), kv_heads, length, 8, seed)
    output, pattern = decoded(query, key, value, prompt, config, scaling=0.4)
    for row in range(2):
        expected, full, chosen = sequential_attention(query[row], key[row], value[row], prompt, config, scaling=0.4)
        assert [p for p in pattern.full_positions[row].tolist() if p >= 0] == full
        if selecting:
            assert [p for p in pattern.selecting_positions[row].tolist() if p >= 0] == chosen
        torch.testing.assert_close(output[row], expected[:, prompt:], rtol=0, atol=1e-12)


def test_selecting_at_every_step_without_pooling_is_each_querys_own_top():
    """Section 10: `select_stride=1, pool_kernel=1`, no full steps."""
    query, key, value = attention_inputs(1, 4, 2, 30, 8, seed=7)
    config = RefreshConfig(budget=5, stride=NEVER, select_stride=1, pool_kernel=1)
    output, _ = decoded(query, key, value, 10, config, scaling=0.4)
    for position in range(10, 30):
        for head in range(4):
            group = range(head // 2 * 2, head // 2 * 2 + 2)
            keys, values = key[0, head // 2, : position + 1], value[0, head // 2, : position + 1]
            scores = torch.stack([(keys @ query[0, h, position] * 0.4).softmax(-1) for h in group]).amax(0)
            scores[position] = 2.0  # the token itself ranks first
            best = scores.topk(5).indices
            expected = (keys[best] @ query[0, head, position] * 0.4).softmax(-1) @ values[best]
            torch.testing.assert_close(output[0, head, position - 10], expected, rtol=0, atol=1e-12)


def test_a_strided_selecting_step_beyond_the_row_changes_nothing():
    query, key, value = attention_inputs(2, 4, 2, 30, 8, seed=8)
    config = RefreshConfig(budget=5, stride=4)
    expected, _ = decoded(query, key, value, 10, config, scaling=0.4)
    for select_stride in (20 + 1, NEVER):
        found, _ = decoded(query, key, value, 10, replace(config, select_stride=select_stride), scaling=0.4)
        assert torch.equal(found, expected)


def test_pooling_ahead_lifts_what_follows():
    """The highest key is at 3: of a window of 3, what it lifts are 3, 4 and 5."""
    key = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]).view(1, 1, 8, 1)
    steps = FullSteps(torch.tensor([[7]]), torch.tensor([3]), torch.tensor([0]), 3, 3)
    query = torch.ones(1, 1, 8, 1)
    ahead, centred = (
        naive.select(query, key, steps, SelectionOptions(3, 1, 0, 0, pool_ahead), 1.0).flatten().tolist()
        for pool_ahead in (True, False)
    )
    assert ahead == [3, 4, 5] and centred == [2, 3, 4]


def test_ties_go_to_the_lower_position():
    """Equal keys score exactly alike; among them the first ones are kept, in order."""
    assert select_one(torch.ones(1, 1, 12, 4), position=9, budget=5, padding=2) == [2, 3, 4, 5, 6]


def test_pooling_sees_only_positions_that_exist():
    """The highest key lies one column past the step: it must not lift its neighbours."""
    key = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0, 9.0]).view(1, 1, 6, 1)
    assert select_one(key, position=4, budget=3, pool_kernel=3) == [0, 1, 2]


def test_selection_in_chunks_is_the_same(monkeypatch):
    config = RefreshConfig(budget=6, stride=3, observation_window=4, recent_window=2)
    query, key, value = attention_inputs(2, 4, 2, 50, 8, seed=1)
    whole, _ = decoded(query, key, value, 11, config, scaling=0.4)
    monkeypatch.setattr(selection, "MAX_SCORES", 1)
    chunked, _ = decoded(query, key, value, 11, config, scaling=0.4)
    assert torch.equal(whole, chunked)


@pytest.mark.parametrize(
    "config",
    [
        RefreshConfig(budget=3, stride=3),
        RefreshConfig(budget=4, stride=2, threshold=0.5, observation_window=3, recent_window=1, sink_tokens=1),
        RefreshConfig(budget=50, stride=NEVER),
    ],
)
@pytest.mark.parametrize("padding", [0, 2])
def test_gradcheck(config, padding):
    query, key, value = attention_inputs(2, 4, 2, 11, 3, seed=2)
    plan, options = config.plan(query, 4, torch.tensor([0, padding])), config.selection_options()
    # the selection stays that of the given inputs: it is not differentiated, and must not flip under the probe
    selected = naive.select(query, key, plan.steps, options, 0.5)
    visible = naive.visible_keys(plan, selected, columns=11)

    def rows(query, key, value):
        return naive.grouped_attention(query, key, value, visible, 0.5)

    inputs = [tensor.clone().requires_grad_() for tensor in (query[:, :, 4:], key, value)]
    assert torch.autograd.gradcheck(rows, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(dtype):
    config = RefreshConfig(budget=8, stride=4)
    query, key, value = (tensor.to(dtype) for tensor in attention_inputs(1, 4, 2, 40, 8, seed=3))
    half, _ = decoded(query, key, value, 12, config, scaling=0.4)
    exact, _ = decoded(query.double(), key.double(), value.double(), 12, config, scaling=0.4)
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("threshold", [-0.9, -0.3, 0.0, 0.3, 0.7, 0.95])
def test_all_checks_at_once_decide_as_one_by_one(threshold):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(2, 3, 80, 4, generator=generator).cumsum(2) + seed % 3  # it drifts, or turns about
        mean, positions = query.mean(1), range(11, 80, 4)
        wanted = torch.zeros(2, 80, dtype=torch.bool)
        wanted[:, 11] = True
        then = mean[:, 11]
        for position in positions[1:]:
            wanted[:, position] = is_refresh(mean[:, position], then, threshold)
            then = torch.where(wanted[:, position, None], mean[:, position], then)
        full, latest = plan(query, 12, 4, threshold)
        assert torch.equal(full, torch.where(wanted[:, positions], torch.tensor(list(positions)), -1))
        assert torch.equal(full.gather(1, latest), full.cummax(1).values)


def test_checks_are_decided_alike_a_few_at_a_time(monkeypatch):
    query = torch.randn(3, 2, 200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = plan(query, 20, 2, 0.3)
    monkeypatch.setattr(schedule, "MAX_COSINES", 1000)
    for found, expected in zip(plan(query, 20, 2, 0.3), whole, strict=True):
        assert torch.equal(found, expected)
