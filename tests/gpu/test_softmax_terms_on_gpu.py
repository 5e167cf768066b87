"""On a GPU: kernels with attention sinks and a softcap against float64, and inside models that have them."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from refreshkv import NEVER, RefreshCache, RefreshConfig, Simulation
from refreshkv.baselines.full import FullCache
from refreshkv.ops import naive
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import SoftmaxTerms
from tests.helpers.models import random_ids, tiny_enabled
from tests.ops.test_row_kernels import plan_of

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from refreshkv.cache.layer import RefreshLayer
from refreshkv.ops.rows import after_prompt, block_steps
from refreshkv.ops.selection import ranking
from refreshkv.ops.step import launches
from tests.ops.test_softmax_terms_kernels import TERMS, compare_rows, compare_steps, terms_of
from tests.ops.test_step_kernels import seen_of

# T, P, query heads per group, head size, configuration
ROWS = [
    (1023, 511, 4, 128, RefreshConfig(budget=63, stride=2)),
    (1025, 300, 2, 256, RefreshConfig(budget=100, stride=10, observation_window=4)),
    (1023, 512, 3, 96, RefreshConfig(budget=63, stride=50)),
    (1023, 973, 4, 64, RefreshConfig(budget=200, stride=NEVER)),
    (1023, 512, 4, 128, RefreshConfig(budget=63, stride=10, select_stride=3, score_bits=4)),
    (4097, 2048, 8, 64, RefreshConfig(budget=1000, stride=NEVER, select_stride=40, score_bits=8)),
]


def exact_rows(query, key, value, plan, scaling, terms, selected):
    """The naive form in float64 with a selection made elsewhere."""
    visible = naive.visible_keys(plan, selected, columns=key.shape[2])
    return naive.grouped_attention(query[:, :, plan.prompt_length :], key, value, visible, scaling, terms).transpose(
        1, 2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("size", ROWS)
def test_rows_equal_float64(monkeypatch, size, kind, dtype):
    """Output, and the gradients of query, key, value and sinks, for the selection that the kernels make."""
    length, prompt, groups, head_dim, config = size
    torch.manual_seed(length)
    tensors = [
        torch.randn(2, length, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (2 * groups, 2, 2)
    ]
    terms = terms_of(kind, 2 * groups)
    if terms.sinks is not None:
        terms = terms._replace(sinks=terms.sinks.to(dtype).requires_grad_())
        tensors.append(terms.sinks)
    plan, options = plan_of(tensors[0], prompt, config, torch.tensor([0, prompt // 3], device="cuda"))
    upstream = torch.randn(2, length - prompt, 2 * groups, head_dim, device="cuda", dtype=dtype)
    made, select_all = [], ranking.select_all

    def recorded(*arguments, **keywords):
        made.append(select_all(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(ranking, "select_all", recorded)
    for fewest in (1, 1000):
        monkeypatch.setattr(block_steps, "FEWEST_SEGMENTS", fewest)
        output = after_prompt.refresh_rows(*tensors[:3], plan, options, head_dim**-0.5, terms)
        found = (output, *torch.autograd.grad(output, tensors, upstream))
        wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
        wide_terms = SoftmaxTerms(None if terms.sinks is None else wide[3], terms.softcap)
        exact = exact_rows(*wide[:3], plan, head_dim**-0.5, wide_terms, made[-1].long())
        for ours, theirs in zip(found, (exact, *torch.autograd.grad(exact, wide, upstream.double())), strict=True):
            # rounding the output to bfloat16 alone moves the sinks' gradient, a sum over all rows, by up to 0.8 %
            rounding = 1e-4 if dtype == torch.float32 else 3e-2 if ours.dim() == 1 else 1e-2
            error = (ours.double() - theirs).norm() / theirs.norm()
            assert error < rounding, (kind, fewest, tuple(ours.shape), float(error))


@pytest.mark.parametrize("kind", TERMS)
def test_float32_selections_are_the_naive_ones(kind):
    torch.backends.cuda.matmul.allow_tf32 = False
    compare_rows((2, 255, 200, 3, 2, 64, RefreshConfig(budget=60, stride=20, threshold=0.1), 40), kind)
    compare_rows((2, 511, 200, 2, 2, 64, RefreshConfig(budget=60, select_stride=7, score_bits=4), 40), kind)


# prompt, steps, query heads per group, key/value heads, head size, padding, configuration
STEPS = [
    (1023, 9, 7, 1, 128, 100, RefreshConfig(budget=100, stride=3)),
    (1023, 9, 4, 2, 96, 100, RefreshConfig(budget=300, stride=2, threshold=0.1)),
    (2049, 6, 4, 1, 128, 77, RefreshConfig(budget=0.125, stride=3, observation_window=16, recent_window=64)),
    (1023, 9, 8, 2, 64, 100, RefreshConfig(budget=100, stride=5, select_stride=2, score_bits=8)),
    (1023, 9, 8, 2, 64, 100, RefreshConfig(budget=100, stride=NEVER, select_stride=1, score_bits=4)),
    (1023, 9, 4, 2, 256, 100, RefreshConfig(budget=100, stride=5, select_stride=2, observation_window=3)),
]


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("case", STEPS)
def test_float32_steps_equal_the_naive_form(case, kind):
    torch.backends.cuda.matmul.allow_tf32 = False
    compare_steps(case, kind)


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("bits", [16, 4])
def test_bfloat16_steps_equal_float64(kind, bits):
    """Each step from the state that the kernels left: the naive form in float64 sees the same small cache."""
    config = RefreshConfig(budget=120, stride=5, select_stride=3 if bits == 4 else None, score_bits=bits)
    torch.manual_seed(3)
    heads, terms, padding = (8, 2, 2), terms_of(kind, 8), torch.tensor([0, 50], device="cuda")
    query, key, value = (torch.randn(2, count, 700, 64, device="cuda", dtype=torch.bfloat16) for count in heads)
    layer = RefreshLayer(720, config)
    layer.update(key, value)
    layer.end_block(query, padding, 0.25, terms)
    for step in range(1, 13):
        token = [torch.randn(2, count, 1, 64, device="cuda", dtype=torch.bfloat16) for count in heads]
        rows, before = layer.row_state.clone(), layer.selected.long().clone()
        options = (config.step_options(), 0.25)
        found = launches.decode_step(*token, layer.state(), *options, layer.selecting_state(), terms)
        known = (layer.keys[:, :, : 700 + step].double(), layer.values[:, :, : 700 + step].double())
        is_full = layer.full_steps[:, 699 + step]
        if config.select_stride and step % 3 == 0 and not bool(is_full.any()):
            assert all(699 + step in head for row in seen_of(layer) for head in row)  # its own token comes first
            continue
        expected = naive.decode(token[0].double(), *known, is_full, rows, before, 0.25, terms)
        error = (found.transpose(1, 2).double() - expected).norm() / expected.norm()
        assert error < 1e-2, (step, error)


GENERATED = {
    "fixed": RefreshConfig(budget=6, stride=4),
    "similarity": RefreshConfig(budget=6, stride=2, threshold=0.3, observation_window=3),
    "selecting": RefreshConfig(budget=6, stride=5, select_stride=2, score_bits=4),
}


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
@pytest.mark.parametrize("name", ["fixed", "similarity", "selecting", "full"])
def test_generate_captures_the_step_of_models_with_terms(monkeypatch, family, name):
    """One graph without a break; the tokens of the uncompiled kernels and of the naive form. Without sliding windows,
    with which generate() does not compile."""
    settings = {"experts_implementation": "batched_mm"} if family == "gpt_oss" else {}  # a loop over experts breaks
    settings |= {"dtype": torch.float32, "head_dim": 16, "layer_types": ["full_attention"] * 3}
    model, ids = tiny_enabled(family=family, **settings).cuda(), random_ids(2, 20).cuda()

    def cache():
        return FullCache(model.config, 60) if name == "full" else RefreshCache(model.config, 60, GENERATED[name])

    asked = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    eager = model.generate(ids, past_key_values=cache(), disable_compile=True, **asked)
    torch._dynamo.reset()
    counters.clear()
    compiled = CompileConfig(fullgraph=True)
    assert torch.equal(model.generate(ids, past_key_values=cache(), compile_config=compiled, **asked), eager)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
    monkeypatch.setitem(vars(CHOICE), "naive_only", True)
    assert torch.equal(model.generate(ids, past_key_values=cache(), disable_compile=True, **asked), eager)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
@pytest.mark.parametrize("name", GENERATED)
def test_generate_beside_sliding_windows(monkeypatch, family, name):
    """By kernels and by the naive form."""
    model, ids = tiny_enabled(family=family, dtype=torch.float32, head_dim=16).cuda(), random_ids(2, 20).cuda()
    asked = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, past_key_values=RefreshCache(model.config, 60, GENERATED[name]), **asked)
    monkeypatch.setitem(vars(CHOICE), "naive_only", True)
    cache = RefreshCache(model.config, 60, GENERATED[name])
    assert torch.equal(model.generate(ids, past_key_values=cache, **asked), found)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_training_gradients_of_models_with_terms(monkeypatch, family):
    """All weights' gradients, the sinks' among them, by kernels and by the naive form.

    The softcap is so large that few logits reach it: those that do nearly tie, and the forms may choose others of them.
    """
    softcap = {"attn_logit_softcapping": 20.0} if family == "gemma2" else {}
    model = tiny_enabled(family=family, dtype=torch.float32, head_dim=16, **softcap).cuda()
    ids = random_ids(2, 90).cuda()
    simulation, results = Simulation(40, RefreshConfig(budget=9, stride=5)), []
    for is_naive in (False, True):
        monkeypatch.setitem(vars(CHOICE), "naive_only", is_naive)
        model.zero_grad()
        model(ids, labels=ids, simulation=simulation, use_cache=False).loss.backward()
        results.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    ours, theirs = results
    assert ours.keys() == theirs.keys() and (family != "gpt_oss" or any("sinks" in name for name in ours))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
