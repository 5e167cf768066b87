"""The naive operations against the paper's sequential algorithm, and their gradients."""

import random

import pytest
import torch

from refreshkv import NEVER, RefreshConfig
from refreshkv.ops import naive
from refreshkv.schedule import plan
from refreshkv.selection import gather_observers, select_positions
from tests.reference import sequential_attention


def attention_inputs(rows, heads, kv_heads, length, head_dim, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randn(rows, count, length, head_dim, generator=generator, dtype=torch.float64)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def decoded(query, key, value, prompt, config, scaling, left_padding=None):
    """Output of the rows after the prompt, (B, H, T-P, D), and the schedule."""
    if left_padding is None:
        left_padding = torch.zeros(query.shape[0], dtype=torch.int64)
    schedule = plan(query.detach(), prompt, config.stride, config.threshold)
    budgets = config.budgets(prompt - left_padding)
    observers = gather_observers(query.detach(), schedule.full_positions, config.observation_window)
    full = schedule.full_positions
    selected = select_positions(observers, key.detach(), full, budgets, left_padding, config, scaling)
    args = (schedule.anchors, schedule.segments, full, selected, budgets, left_padding, scaling)
    return naive.decoded_rows(query[:, :, prompt:], key, value, *args), schedule


@pytest.mark.parametrize("seed", range(24))
def test_parallel_form_equals_the_paper_algorithm(seed):
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
    )
    kv_heads = draw.choice([1, 2])
    query, key, value = attention_inputs(2, kv_heads * draw.choice([1, 2, 3]), kv_heads, length, 8, seed)
    output, schedule = decoded(query, key, value, prompt, config, scaling=0.4)
    for row in range(2):
        expected, full = sequential_attention(query[row], key[row], value[row], prompt, config, scaling=0.4)
        assert [p for p in schedule.full_positions[row].tolist() if p >= 0] == full
        torch.testing.assert_close(output[row], expected[:, prompt:], rtol=0, atol=1e-12)


def test_ties_go_to_the_lower_position():
    """Equal keys score exactly alike; among them the first ones are kept, in order."""
    query, key = torch.ones(1, 1, 1, 1, 4), torch.ones(1, 1, 12, 4)
    positions, budgets, padding = torch.tensor([[9]]), torch.tensor([5]), torch.tensor([2])
    selected = naive.select(
        query, key, positions, budgets, padding, width=5, pool_kernel=7, recent_window=0, sink_tokens=0, scaling=1.0
    )
    assert selected.tolist() == [[[[2, 3, 4, 5, 6]]]]


def test_pooling_sees_only_positions_that_exist():
    """The highest key lies one column past the step: it must not lift its neighbours."""
    key = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0, 9.0]).view(1, 1, 6, 1)
    selected = naive.select(
        torch.ones(1, 1, 1, 1, 1),
        key,
        torch.tensor([[4]]),
        torch.tensor([3]),
        torch.tensor([0]),
        width=3,
        pool_kernel=3,
        recent_window=0,
        sink_tokens=0,
        scaling=1.0,
    )
    assert selected.tolist() == [[[[0, 1, 2]]]]


def test_selection_in_chunks_is_the_same(monkeypatch):
    config = RefreshConfig(budget=6, stride=3, observation_window=4, recent_window=2)
    query, key, value = attention_inputs(2, 4, 2, 50, 8, seed=1)
    whole, _ = decoded(query, key, value, 11, config, scaling=0.4)
    monkeypatch.setattr(naive, "MAX_SCORES", 1)
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
    left_padding = torch.tensor([0, padding])
    # selections stay those of the given inputs: they are not differentiated, and must not flip under the probe
    schedule = plan(query, 4, config.stride, config.threshold)
    budgets = config.budgets(4 - left_padding)
    observers = gather_observers(query, schedule.full_positions, config.observation_window)
    selected = select_positions(observers, key, schedule.full_positions, budgets, left_padding, config, 0.5)

    def rows(query, key, value):
        return naive.decoded_rows(
            query,
            key,
            value,
            schedule.anchors,
            schedule.segments,
            schedule.full_positions,
            selected,
            budgets,
            left_padding,
            0.5,
        )

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
