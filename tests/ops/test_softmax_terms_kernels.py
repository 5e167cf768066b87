"""The kernels with attention sinks and a softcap against the naive form: on a GPU, or under Triton's interpreter."""

import pytest
import torch

from refreshkv import NEVER, RefreshCache, RefreshConfig, Simulation
from refreshkv.baselines.full import FullLayer
from refreshkv.cache.layer import RefreshLayer
from refreshkv.ops import naive
from refreshkv.ops.choice import CHOICE, Choice
from refreshkv.ops.state import SoftmaxTerms
from tests.helpers.marks import slow_unless
from tests.helpers.models import random_ids, tiny_enabled

pytest.importorskip("triton")

from refreshkv.ops.rows import after_prompt, block_steps
from refreshkv.ops.step import launches
from tests.ops import test_row_kernels as rows_tests
from tests.ops import test_step_kernels as step_tests
from tests.ops.test_row_kernels import inputs, plan_of
from tests.ops.test_step_kernels import DEVICE, drawn, seen_of

TERMS = {"sinks": (True, None), "softcap": (False, 1.5), "both": (True, 2.5)}


def terms_of(kind, heads, seed=9):
    """Random sinks of both signs, some above every logit; a softcap within reach of the logits."""
    has_sinks, softcap = TERMS[kind]
    sinks = 2 * torch.randn(heads, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return SoftmaxTerms(sinks if has_sinks else None, softcap)


def compare_steps(case, kind, seed=0):
    """Steps of one layer by kernels and of another by the naive form: outputs, and what they decide and keep."""
    prompt, steps, groups, kv_heads, head_dim, padding, config = case
    generator, scaling = torch.Generator().manual_seed(seed), 2 * head_dim**-0.5
    padding, heads = torch.tensor([0, padding], device=DEVICE), (groups * kv_heads, kv_heads, kv_heads)
    terms = terms_of(kind, heads[0])
    query, key, value = (drawn(generator, count, prompt, head_dim) for count in heads)
    ours, theirs = (RefreshLayer(prompt + steps, config) for _ in range(2))
    for layer in (ours, theirs):
        layer.update(key, value)
        layer.end_block(query, padding, scaling, terms)
    for step in range(steps):
        token = [drawn(generator, count, 1, head_dim) for count in heads]
        options = (config.step_options(), scaling)
        found = launches.decode_step(*token, ours.state(), *options, ours.selecting_state(), terms)
        expected = naive.decode_step(*token, theirs.state(), *options, theirs.selecting_state(), terms)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, s=step: f"{s}: {m}")
        assert torch.equal(ours.full_steps, theirs.full_steps) and torch.equal(ours.row_state, theirs.row_state), step
        if (step + 2) % (config.select_stride or NEVER):  # else the next step chooses anew
            assert seen_of(ours) == seen_of(theirs), step


STEPS = ("fixed", "similarity", "observers and windows", "seven heads to a group", "one key")
STEPS += (
    "every second, four bits",
    "beside full steps",
    "much at once",
    "keys themselves",
    "three heads to a group of 64",
)
QUICK_STEPS = [("every second, four bits", "softcap"), ("much at once", "both")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        case if case in QUICK_STEPS else pytest.param(*case, marks=pytest.mark.slow)
        for case in [(name, kind) for name in STEPS for kind in TERMS]
    ],
)
def test_steps(name, kind):
    compare_steps((step_tests.CASES | step_tests.SELECTING)[name], kind)


@pytest.mark.parametrize("kind", slow_unless(["both"], TERMS))
def test_steps_that_read_the_cache_whole(monkeypatch, kind):
    generator, padding, terms = torch.Generator().manual_seed(2), torch.tensor([0, 5], device=DEVICE), terms_of(kind, 6)
    block = [drawn(generator, count, 21, 16) for count in (6, 2, 2)]
    layers = [FullLayer(30), FullLayer(30)]
    for layer in layers:
        layer.update(*block[1:])
        layer.end_block(block[0], padding, 0.5, terms)
    for _ in range(3):
        token = [drawn(generator, count, 1, 16) for count in (6, 2, 2)]
        outputs = []
        for layer, kernels in zip(layers, (True, False), strict=True):
            monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor, kernels=kernels: kernels)
            outputs.append(layer.step(*token, 0.5, terms))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def compare_rows(case, kind, seed=0):
    """Values and the gradients of query, key, value and sinks."""
    rows, length, prompt, groups, kv_heads, head_dim, config, padding = case
    tensors, scaling = inputs(rows, length, groups, kv_heads, head_dim, seed), 2 * head_dim**-0.5
    terms = terms_of(kind, groups * kv_heads)
    if terms.sinks is not None:
        terms, tensors = terms._replace(sinks=terms.sinks.requires_grad_()), (*tensors, terms.sinks.requires_grad_())
    plan, options = plan_of(tensors[0], prompt, config, torch.tensor([0, padding][-rows:], device=DEVICE))
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = torch.randn(rows, length - prompt, groups * kv_heads, head_dim, generator=generator).to(DEVICE)
    results = []
    for form in (after_prompt.refresh_rows, naive.refresh_rows):
        output = form(*tensors[:3], plan, options, scaling, terms)
        results.append((output, *torch.autograd.grad(output, tensors, upstream)))
    for name, found, wanted in zip(("output", "query", "key", "value", "sinks"), *results, strict=False):
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 1e-4, f"{name}: {error:.2e}"


ROWS = ("fixed", "a fraction of padded rows", "never refreshed", "similarity", "similarity, long intervals", "one key")
ROWS += ("observers and windows", "seven heads to a group", "odd head size", "every step full")
ROWS += tuple(name for name in rows_tests.CASES if name.startswith("selecting"))
QUICK_ROWS = [("selecting between full steps", "both"), ("never refreshed", "both")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        case if case in QUICK_ROWS else pytest.param(*case, marks=pytest.mark.slow)
        for case in [(name, kind) for name in ROWS for kind in TERMS]
    ],
)
def test_rows(name, kind):
    compare_rows(rows_tests.CASES[name], kind)


@pytest.mark.slow
@pytest.mark.parametrize("length", [63, 111, 1024])
@pytest.mark.parametrize("fewest", [1, 1000])
def test_rows_of_awkward_lengths(monkeypatch, length, fewest):
    """In blocks that gather their keys together, and in segments alone."""
    monkeypatch.setattr(block_steps, "FEWEST_SEGMENTS", fewest)
    prompt, stride = length // 3, max(5, length // 20)
    compare_rows((1, length, prompt, 2, 1, 16, RefreshConfig(budget=11, stride=stride), 3), "both", seed=length)


@pytest.mark.slow
def test_torch_compile_takes_rows_with_terms_whole():
    """One graph for both directions; the same values and gradients as without."""
    query, key, value = inputs(1, 27, 2, 1, 16)
    plan, options = plan_of(query, 14, RefreshConfig(budget=9, stride=5))
    sinks = terms_of("both", 2).sinks.requires_grad_()

    def attend(query, key, value, sinks):
        return after_prompt.refresh_rows(query, key, value, plan, options, 0.25, SoftmaxTerms(sinks, 2.0))

    leaves, results = (query, key, value, sinks), []
    for form in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        output = form(*leaves)
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("family", slow_unless(["gemma2"], ["gpt_oss", "gemma2"]))
@torch.no_grad()
def test_models_decode_by_kernels(monkeypatch, family):
    """Through a cache whose layers select together, and in one pass: the logits of the naive form."""
    config = RefreshConfig(budget=5, stride=3, select_stride=2, score_bits=8)
    model, ids = tiny_enabled(config, family=family, dtype=torch.float32, head_dim=16).to(DEVICE), random_ids(1, 12)
    ids, results = ids.to(DEVICE), []
    for kernels in (False, True):
        monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor, kernels=kernels: kernels)
        cache, logits = RefreshCache(model.config, 12), []
        for columns in ids.split([8, 1, 1, 1, 1], dim=1):
            logits.append(model(columns, past_key_values=cache).logits)
        assert (cache.layers[0].joint is not None) == kernels
        whole = model(ids, simulation=Simulation(8, config), use_cache=False).logits
        results.append((torch.cat(logits, dim=1), whole))
    for found in results[1]:
        torch.testing.assert_close(found, results[0][0], rtol=0, atol=1e-3)
    torch.testing.assert_close(results[0][1], results[0][0], rtol=0, atol=1e-3)


def test_cudnn_gets_no_full_steps_with_terms(monkeypatch):
    """It knows the ordinary softmax only."""
    monkeypatch.setattr("refreshkv.ops.choice.cudnn_takes", lambda *tensors: True)
    query = torch.zeros(1, 4, 90, 16)
    plan, _ = plan_of(query, 40, RefreshConfig(stride=10))
    assert CHOICE.takes_full_steps_by_cudnn(query, query, query, plan)
    for kind in TERMS:
        assert not CHOICE.takes_full_steps_by_cudnn(query, query, query, plan, terms_of(kind, 4))


def test_kernels_take_terms_but_not_values_of_another_size(monkeypatch):
    monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor: True)
    key = torch.zeros(1, 2, 9, 16)
    assert CHOICE.attends_by_kernels(key, key) and not CHOICE.attends_by_kernels(key, key[..., :8])
