"""The decoding step under torch.compile: one graph, whatever is decided. On a CPU, where the step is the naive one."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from refreshkv import NEVER, RefreshCache, RefreshConfig
from tests.helpers.marks import slow_unless
from tests.helpers.models import random_ids, tiny_enabled

CONFIGS = {
    "fixed": RefreshConfig(budget=6, stride=4),
    "similarity": RefreshConfig(budget=0.3, stride=3, threshold=0.1, observation_window=4, recent_window=2),
    "selecting": RefreshConfig(budget=6, stride=NEVER, select_stride=2, score_bits=4, pool_ahead=True),
    "selecting beside similarity": RefreshConfig(budget=0.3, stride=3, threshold=0.1, select_stride=2),
}


def left_padded(ids, paddings):
    mask = torch.ones_like(ids)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    return ids.masked_fill(mask == 0, 0), mask


def generate(model, ids, mask, config, compiled, cache=None, **settings):
    cache = cache or RefreshCache(model.config, 60, config)
    if compiled:
        compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        compile_config._compile_all_devices = True
        settings["compile_config"] = compile_config
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 14} | settings
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings), cache


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    "case", slow_unless([("similarity", 7), ("selecting", 7)], [(name, pad) for name in CONFIGS for pad in (0, 7)])
)
def test_compiled_steps_give_the_same_tokens(case):
    (name, padding), model = case, tiny_enabled()
    ids, mask = left_padded(random_ids(2, 20), (0, padding))
    expected, eager = generate(model, ids, mask, CONFIGS[name], compiled=False)
    found, cache = generate(model, ids, mask, CONFIGS[name], compiled=True)
    assert torch.equal(found, expected)
    assert torch.equal(cache.full_steps, eager.full_steps)
    assert torch.equal(cache.selecting_steps, eager.selecting_steps)
    assert cache.get_seq_length() == 33
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_steps_with_sinks_or_a_softcap_are_one_graph(family):
    """Without sliding windows, with which generate() does not compile."""
    settings = {"experts_implementation": "batched_mm"} if family == "gpt_oss" else {}  # a loop over experts breaks
    settings |= {"dtype": torch.float32, "layer_types": ["full_attention"] * 3}
    model, ids = tiny_enabled(family=family, **settings), random_ids(2, 20)
    expected, _ = generate(model, ids, None, CONFIGS["fixed"], compiled=False)
    found, _ = generate(model, ids, None, CONFIGS["fixed"], compiled=True)
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_neither_steps_nor_prompts_nor_caches_recompile():
    model, config = tiny_enabled(), CONFIGS["similarity"]
    cache = None
    for turn, length in enumerate((20, 13, 26)):
        ids = random_ids(2, length, seed=turn)
        expected, _ = generate(model, ids, None, config, compiled=False)
        if cache is not None and turn < 2:
            cache.reset()
        found, cache = generate(model, ids, None, config, compiled=True, cache=cache if turn < 2 else None)
        assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_module(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "compiled", slow_unless([compiled_forward], [compiled_forward, compiled_module, compiled_in_place])
)
def test_whole_models_may_be_compiled(compiled):
    """Prompts too, which `generate()` never compiles."""
    model, ids = tiny_enabled(CONFIGS["fixed"]), random_ids(2, 24)
    caches = [RefreshCache(model.config, 40) for _ in range(2)]
    expected, found = [], []
    bounds = [0, *range(17, 25)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        expected.append(model(ids[:, start:end], past_key_values=caches[0], use_cache=True).logits)
    again = compiled(model)
    for start, end in zip(bounds, bounds[1:], strict=False):
        found.append(again(ids[:, start:end], past_key_values=caches[1], use_cache=True).logits)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(caches[0].full_steps, caches[1].full_steps)


def test_a_full_cache_says_so_when_compiled():
    model, ids = tiny_enabled(), random_ids(2, 20)
    cache = RefreshCache(model.config, 25, CONFIGS["fixed"])
    with pytest.raises(ValueError, match="RefreshCache is full: 26 tokens, but max_cache_len=25"):
        generate(model, ids, torch.ones_like(ids), None, compiled=True, cache=cache)
