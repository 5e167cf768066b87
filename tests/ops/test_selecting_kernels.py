"""The kernels of a selecting step against the naive form, step by step: on a GPU, or under Triton's interpreter."""

import pytest
import torch

from refreshkv.ops.naive import score_keys as naive_score_keys
from refreshkv.ops.naive import selecting as naive

pytest.importorskip("triton")

from refreshkv.ops.selection.score_keys import ScoreKeys, write_score_keys
from refreshkv.ops.step import selecting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEVER = 2**31 - 1

OPTIONS = {"pool_kernel": 7, "pool_ahead": False, "recent_window": 0, "sink_tokens": 0}

# prompt, steps, query heads per group, key/value heads, head size, padding of the second row, budget, select stride,
# bits, observers, options that differ
CASES = {
    "four bits": (40, 6, 4, 2, 16, 5, 8, 2, 4, 1, {}),
    "eight bits": (40, 4, 2, 2, 16, 5, 8, 2, 8, 1, {}),
    "keys themselves": (40, 4, 2, 2, 16, 5, 8, 2, 16, 1, {}),
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
    "several blocks": (2200, 2, 2, 1, 16, 33, 300, 1, 4, 1, {}),
}


class Layer:
    """A layer's state, after a prompt."""

    def __init__(self, key, value, padding, budget, heads, bits, window, capacity):
        batch, kv_heads, prompt, head_dim = key.shape
        self.keys, self.values = (
            torch.full((batch, kv_heads, capacity, head_dim), float("nan"), device=DEVICE, dtype=key.dtype)
            for _ in range(2)
        )
        self.keys[:, :, :prompt], self.values[:, :, :prompt] = key, value
        self.score_keys = ScoreKeys.empty(self.keys, bits)
        write_score_keys(key, self.score_keys, 0)
        self.length = torch.tensor(prompt, device=DEVICE)
        rows = [[prompt - 1, budget, pad, prompt] for pad in padding]
        self.row_state = torch.tensor(rows, device=DEVICE)
        self.observers = torch.zeros(batch, heads, window, head_dim, device=DEVICE, dtype=key.dtype)


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
    budgets = torch.full_like(padding, budget)
    width = min(budget, position + 1)
    selected = naive.choose(observers, score_key, budgets, padding, width=width, scaling=scaling, **options)
    output = naive.attend(query, keys, values, selected, scaling).transpose(1, 2)
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
    layer = Layer(
        *(drawn(kv_heads, prompt) for _ in range(2)), padding.tolist(), budget, heads, bits, window, prompt + steps
    )
    layer.observers.copy_(drawn(heads, window))
    scratch = selecting.SelectingScratch.empty(heads, layer.keys, window)
    for tensor in vars(scratch).values():
        tensor.fill_(-7)  # nothing may be read that was not written
    for step in range(1, steps + 1):
        query, key, value = drawn(heads, 1), drawn(kv_heads, 1), drawn(kv_heads, 1)
        state = (layer.keys, layer.values, layer.score_keys, layer.length, layer.row_state, layer.observers, scratch)
        strides = {"stride": NEVER, "select_stride": select_stride}
        found = selecting.selecting_step(query, key, value, *state, **strides, **options, scaling=scaling)
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
        mask = selecting.chosen_positions(scratch, padding)[..., : position + 1]
        if not torch.equal(mask, chosen):
            # float32 logits of another order of summation: scores that close may swap places
            assert dtype != torch.float32
            assert (mask.sum(-1) == chosen.sum(-1)).all()
            cut = torch.where(chosen, scores_of(scratch, position), torch.inf).amin(-1, keepdim=True)
            close = (scores_of(scratch, position) / cut - 1).abs() < 1e-5
            assert close[mask != chosen].all()
            continue
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_step_equals_the_naive_form(name):
    compare(CASES[name])


def test_full_steps_are_not_selecting_ones():
    key = torch.randn(1, 1, 8, 16, device=DEVICE)
    layer = Layer(key, key, [0], 4, 1, 4, 1, 20)
    scratch = selecting.SelectingScratch.empty(1, layer.keys, 1)
    kinds = []
    for _ in range(8):
        token = torch.randn(1, 1, 1, 16, device=DEVICE)
        selecting.selecting_step(
            token, token, token, layer.keys, layer.values, layer.score_keys, layer.length, layer.row_state,
            layer.observers, scratch, stride=6, select_stride=2, scaling=0.25, **OPTIONS,
        )  # fmt: skip
        kinds.append(int(scratch.selecting) >= 0)
    assert kinds == [False, True, False, True, False, False, False, True]


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize(("candidates", "budget"), [(1024, 5), (16, 5), (16, 37)])
def test_ties_go_to_the_lower_position(value, candidates, budget, monkeypatch):
    """Equal keys all tie; whether the tied positions are sorted out at once or searched for."""
    monkeypatch.setattr(selecting, "FEWEST_CANDIDATES", candidates)
    key = torch.full((2, 1, 60, 16), value, device=DEVICE)
    layer = Layer(key, key, [0, 9], budget, 2, 4, 1, 70)
    scratch = selecting.SelectingScratch.empty(2, layer.keys, 1)
    token = key[:, :, :1]
    selecting.selecting_step(
        token.expand(-1, 2, -1, -1), token, token, layer.keys, layer.values, layer.score_keys, layer.length,
        layer.row_state, layer.observers, scratch, stride=NEVER, select_stride=1, scaling=0.25, **OPTIONS,
    )  # fmt: skip
    chosen = selecting.chosen_positions(scratch, layer.row_state[:, 2])
    for row, first in enumerate([0, 9]):
        expected = [*range(first, first + budget - 1), 60]
        assert chosen[row, 0].nonzero().flatten().tolist() == expected


def test_search_equals_sorting(monkeypatch):
    """With few candidates allowed at once, the row is searched."""
    monkeypatch.setattr(selecting, "FEWEST_CANDIDATES", 16)
    monkeypatch.setattr(selecting, "MOST_CANDIDATES", 16)
    monkeypatch.setattr(selecting, "RANKED", 64)
    compare((300, 2, 2, 2, 16, 33, 60, 1, 4, 1, {}))
    compare((300, 1, 2, 2, 16, 33, 60, 1, 4, 1, {"sink_tokens": 70}))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("groups", "kv_heads", "head_dim"), [(4, 8, 128), (3, 3, 64)])
def test_step_equals_the_naive_form_in_16_bits(groups, kv_heads, head_dim, bits, dtype):
    compare((3000, 2, groups, kv_heads, head_dim, 100, 375, 1, bits, 1, {}), dtype, 2e-2)
