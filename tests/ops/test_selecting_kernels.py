"""The kernels of a selecting step against the naive form, step by step: on a GPU, or under Triton's interpreter."""

import pytest
import torch

from refreshkv.ops.naive import score_keys as naive_score_keys
from refreshkv.ops.naive.attention import attend_to_positions
from refreshkv.ops.naive.selection import select

pytest.importorskip("triton")

from refreshkv.ops.selection.score_keys import ScoreKeys, write_score_keys
from refreshkv.ops.state import PADDING, FullSteps, SelectionOptions
from refreshkv.ops.step.selecting import shares, threshold
from refreshkv.ops.step.selecting.launches import selecting_step
from refreshkv.ops.step.selecting.state import SelectingCache, SelectingOptions, SelectingScratch
from tests.helpers.marks import slow_tuples_unless, slow_unless

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEVER = 2**31 - 1

OPTIONS = {"pool_kernel": 7, "pool_ahead": False, "recent_window": 0, "sink_tokens": 0}

# prompt, steps, query heads per group, key/value heads, head size, padding of the second row, budget, select stride,
# bits, observers, options that differ
CASES = {
    "four bits": (40, 6, 4, 2, 16, 5, 8, 2, 4, 1, {}),
    "eight bits": (40, 4, 2, 2, 16, 5, 8, 2, 8, 1, {}),
    "keys themselves": (20, 2, 2, 2, 16, 5, 8, 2, 16, 1, {}),
    "three heads to a group of 64": (45, 4, 3, 3, 64, 0, 9, 1, 4, 1, {"pool_ahead": True}),
    "every query's own top": (33, 3, 1, 1, 24, 7, 5, 1, 4, 1, {"pool_kernel": 1}),
    "even pooling ahead": (50, 4, 2, 1, 16, 11, 12, 2, 4, 1, {"pool_kernel": 10, "pool_ahead": True}),
    "windows": (50, 4, 2, 2, 16, 11, 12, 2, 4, 1, {"recent_window": 5, "sink_tokens": 3}),
    "windows beyond the budget": (40, 4, 2, 1, 16, 4, 4, 2, 4, 1, {"recent_window": 9, "sink_tokens": 2}),
    "observers": (40, 6, 2, 2, 16, 5, 9, 2, 4, 4, {"recent_window": 3, "pool_ahead": True}),
    "short prompt, many observers": (2, 8, 2, 1, 16, 1, 3, 1, 4, 5, {"pool_kernel": 3}),
    "one key": (20, 4, 2, 1, 16, 3, 1, 2, 4, 1, {}),
    "a budget beyond the row": (12, 6, 2, 2, 16, 4, 1000, 3, 4, 1, {}),
    "a prompt of one token": (1, 6, 2, 1, 16, 0, 3, 1, 4, 1, {}),
    "much at once": (
        (20, 2, 3, 1, 24, 5, 9, 2, 4, 4, {"pool_kernel": 4, "pool_ahead": True, "recent_window": 3, "sink_tokens": 2})
    ),
    "several blocks": (2200, 2, 2, 1, 16, 33, 300, 1, 4, 1, {}),
}


def cache_after(key, value, padding, budget, *, observers, bits, capacity):
    """A layer's cache after a prompt; positions that do not exist yet are nan."""
    batch, kv_heads, prompt, head_dim = key.shape
    keys, values = (
        torch.full((batch, kv_heads, capacity, head_dim), float("nan"), device=DEVICE, dtype=key.dtype)
        for _ in range(2)
    )
    keys[:, :, :prompt], values[:, :, :prompt] = key, value
    score_keys = ScoreKeys.empty(keys, bits)
    write_score_keys(key, score_keys, 0)
    row_state = torch.tensor([[prompt - 1, budget, pad, prompt] for pad in padding], device=DEVICE)
    return SelectingCache(keys, values, score_keys, torch.tensor(prompt, device=DEVICE), row_state, observers)


def expected_step(layer, query, padding, budget, options, scaling):
    """The naive form on the state that the kernels have left: output and mask of the chosen."""
    position = int(layer.length) - 1
    keys, values = layer.keys[:, :, : position + 1], layer.values[:, :, : position + 1]
    score_key = keys
    if layer.score_keys.bits < 16:
        stored = naive_score_keys.quantize(keys, layer.score_keys.bits)
        assert torch.equal(layer.score_keys.codes[:, :, : position + 1], stored[0])
        assert torch.equal(layer.score_keys.scales[:, :, : position + 1], stored[1])
        score_key = naive_score_keys.dequantize(*stored)
    window = layer.observers.shape[2]
    observers = query
    if window > 1:
        slots = [(position - back) % window for back in range(window - 1, -1, -1)]
        observers = layer.observers[:, :, slots]
        assert torch.equal(observers[:, :, -1:], query)
    positions, budgets = torch.full_like(padding, position)[:, None], torch.full_like(padding, budget)
    width = min(budget, position + 1)
    steps = FullSteps(positions, budgets, padding, width, droppable=width)
    ranked = SelectionOptions(observation_window=window, **options)
    selected = select(observers, score_key, steps, ranked, scaling, own_first=True).squeeze(2)
    output = attend_to_positions(query, keys, values, selected, scaling).transpose(1, 2)
    mask = torch.zeros(*keys.shape[:2], position + 2, dtype=torch.bool, device=DEVICE)
    mask = mask.scatter(2, selected.masked_fill(selected < 0, position + 1), True)[..., : position + 1]
    return output, mask


def scores_of(scratch, position):
    """Pooled scores, of positions that are not preferred: a ranking is its float's bits."""
    return scratch.rankings[..., : position + 1].view(torch.float32)


def compare(case, dtype=torch.float32, tolerance=1e-4):
    prompt, steps, groups, kv_heads, head_dim, pad, budget, select_stride, bits, window, changed = case
    options = OPTIONS | changed
    generator = torch.Generator().manual_seed(0)

    def drawn(heads, tokens):
        return torch.randn(2, tokens, heads, head_dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)

    heads, scaling = groups * kv_heads, head_dim**-0.5
    padding = torch.tensor([0, pad], device=DEVICE)
    key, value = drawn(kv_heads, prompt), drawn(kv_heads, prompt)
    # the kernels want each head's observers in one piece
    observers = drawn(heads, window).contiguous()
    layer = cache_after(key, value, padding.tolist(), budget, observers=observers, bits=bits, capacity=prompt + steps)
    scratch = SelectingScratch.empty(layer.keys, layer.observers)
    for tensor in scratch:
        tensor.fill_(-7)  # nothing may be read that was not written
    for step in range(1, steps + 1):
        query, key, value = drawn(heads, 1), drawn(kv_heads, 1), drawn(kv_heads, 1)
        schedule = SelectingOptions(stride=NEVER, select_stride=select_stride, **options)
        found = selecting_step(query, key, value, layer, scratch, schedule, scaling)
        position = prompt - 1 + step
        assert int(layer.length) == position + 1
        if step % select_stride:
            assert scratch.selecting.tolist() == [-1, -1] and not found.any()
            # another kind of step stores the token as well
            layer.keys[:, :, position], layer.values[:, :, position] = key[:, :, 0], value[:, :, 0]
            write_score_keys(key, layer.score_keys, position)
            layer.observers[:, :, position % window] = query[:, :, 0]
            continue
        assert torch.equal(layer.keys[:, :, position], key[:, :, 0])
        assert torch.equal(layer.values[:, :, position], value[:, :, 0])
        expected, chosen = expected_step(layer, query, padding, budget, options, scaling)
        mask = scratch.chosen(padding)[..., : position + 1]
        if not torch.equal(mask, chosen):
            # float32 logits of another order of summation: scores that close may swap places
            assert dtype != torch.float32
            assert (mask.sum(-1) == chosen.sum(-1)).all()
            least = torch.where(chosen, scores_of(scratch, position), torch.inf).amin(-1, keepdim=True)
            close = (scores_of(scratch, position) / least - 1).abs() < 1e-5
            assert close[mask != chosen].all()
            continue
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


QUICK = CASES.keys() if DEVICE == "cuda" else {"much at once", "keys themselves"}


@pytest.mark.parametrize("name", slow_unless(QUICK, CASES))
def test_step_equals_the_naive_form(name):
    compare(CASES[name])


@pytest.mark.slow
def test_full_steps_are_not_selecting_ones():
    key = torch.randn(1, 1, 8, 16, device=DEVICE)
    layer = cache_after(key, key, [0], 4, observers=torch.zeros_like(key[:, :, :1]), bits=4, capacity=20)
    scratch = SelectingScratch.empty(layer.keys, layer.observers)
    kinds = []
    for _ in range(8):
        token = torch.randn(1, 1, 1, 16, device=DEVICE)
        schedule = SelectingOptions(stride=6, select_stride=2, **OPTIONS)
        selecting_step(token, token, token, layer, scratch, schedule, scaling=0.25)
        kinds.append(int(scratch.selecting) >= 0)
    assert kinds == [False, True, False, True, False, False, False, True]


# value of all keys, room for candidates, budget
TIES = [(0.0, 1024, 5), (1.0, 1024, 5), (0.0, 16, 5), (1.0, 16, 5), (0.0, 16, 37), (1.0, 16, 37)]


@pytest.mark.parametrize(("value", "candidates", "budget"), slow_tuples_unless([(1.0, 1024, 5), (1.0, 16, 37)], TIES))
def test_ties_go_to_the_lower_position(value, candidates, budget, monkeypatch):
    """Equal keys all tie; the limit is found among the candidates, or in the whole row if there are too many."""
    monkeypatch.setattr(threshold, "FEWEST_CANDIDATES", candidates)
    key = torch.full((2, 1, 60, 16), value, device=DEVICE)
    token = key[:, :, :1]
    query = token.repeat(1, 2, 1, 1)
    layer = cache_after(key, key, [0, 9], budget, observers=query.clone(), bits=4, capacity=70)
    scratch = SelectingScratch.empty(layer.keys, layer.observers)
    schedule = SelectingOptions(stride=NEVER, select_stride=1, **OPTIONS)
    selecting_step(query, token, token, layer, scratch, schedule, scaling=0.25)
    chosen = scratch.chosen(layer.row_state[:, PADDING])
    for row, first in enumerate([0, 9]):
        expected = [*range(first, first + budget - 1), 60]
        assert chosen[row, 0].nonzero().flatten().tolist() == expected


@pytest.mark.slow
def test_search_equals_resolving(monkeypatch):
    """With little room for candidates, the whole row is searched."""
    monkeypatch.setattr(threshold, "FEWEST_CANDIDATES", 16)
    monkeypatch.setattr(threshold, "MOST_CANDIDATES", 16)
    monkeypatch.setattr(shares, "RANKED", 64)
    compare((300, 2, 2, 2, 16, 33, 60, 1, 4, 1, {}))
    compare((300, 1, 2, 2, 16, 33, 60, 1, 4, 1, {"sink_tokens": 70}))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("groups", "kv_heads", "head_dim"), [(4, 8, 128), (3, 3, 64)])
def test_step_equals_the_naive_form_in_16_bits(groups, kv_heads, head_dim, bits, dtype):
    compare((3000, 2, groups, kv_heads, head_dim, 100, 375, 1, bits, 1, {}), dtype, 2e-2)
