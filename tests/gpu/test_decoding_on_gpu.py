"""On a GPU: decoding through kernels and CUDA graphs equals the naive form, and nothing breaks the graph."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, StoppingCriteria

from refreshkv import NEVER, RefreshCache, RefreshConfig, Simulation, decode_ahead, enable, tuned_compilation
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.cache.layer import RefreshLayer
from refreshkv.evaluation.caches import Caches
from refreshkv.evaluation.perplexity.losses import sequence_losses
from refreshkv.evaluation.perplexity.stepwise import decode_known
from refreshkv.evaluation.strategies import build_strategies
from refreshkv.ops import naive
from refreshkv.ops.choice import CHOICE
from tests.attention.test_parity import CASES, SELECTING
from tests.helpers.models import FAMILIES, decode_logits, random_ids, tiny_enabled

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from refreshkv.ops.step import launches as decode_kernels
from tests.ops.test_step_kernels import assert_exact_selection, seen_of

ROOT = Path(__file__).resolve().parents[2]

# prompt, heads to a group, head size, configuration
SIZES = [
    (63, 1, 64, RefreshConfig(budget=20, stride=3)),
    (1023, 7, 128, RefreshConfig(budget=100, stride=3)),
    (1023, 4, 96, RefreshConfig(budget=1000, stride=2, recent_window=30, sink_tokens=4)),
    (4097, 4, 128, RefreshConfig(budget=0.125, stride=3, threshold=0.5)),
    (4097, 8, 256, RefreshConfig(budget=700, stride=3)),
    (2049, 4, 128, RefreshConfig(budget=0.125, stride=3, observation_window=16, recent_window=64)),
    (9001, 2, 64, RefreshConfig(budget=9000, stride=2)),
    (63, 1, 64, RefreshConfig(budget=20, stride=NEVER, select_stride=2, score_bits=4)),
    (1023, 3, 64, RefreshConfig(budget=100, stride=5, select_stride=2, score_bits=8)),
    (1023, 7, 128, RefreshConfig(budget=100, stride=NEVER, select_stride=1, score_bits=16)),
    (4097, 4, 128, RefreshConfig(budget=0.125, stride=NEVER, select_stride=2, score_bits=4, recent_window=30)),
    (4097, 8, 256, RefreshConfig(budget=700, stride=4, threshold=0.5, select_stride=3, score_bits=4)),
    (2049, 4, 128, RefreshConfig(budget=0.2, stride=5, select_stride=2, score_bits=4, observation_window=16)),
    (40001, 4, 128, RefreshConfig(budget=0.125, stride=NEVER, select_stride=1, score_bits=4)),
    (9001, 2, 64, RefreshConfig(budget=9000, stride=NEVER, select_stride=2, score_bits=4)),
]


@pytest.fixture(autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_steps_equal_the_naive_form(size, dtype):
    prompt, groups, head_dim, config = size
    torch.manual_seed(prompt + groups)
    heads, padding = (2 * groups, 2, 2), torch.tensor([0, prompt // 3], device="cuda")

    def draw(length):
        return [torch.randn(2, length, count, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for count in heads]

    block, layers = draw(prompt), []
    for _ in range(2):
        layers.append(RefreshLayer(prompt + 8, config))
        layers[-1].update(*block[1:])
        layers[-1].end_block(block[0], padding, head_dim**-0.5)
    ours, theirs = layers
    options = (config.step_options(), head_dim**-0.5)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for step in range(8):
        token = draw(1)
        found = decode_kernels.decode_step(*token, ours.state(), *options, ours.selecting_state())
        expected = naive.decode_step(*token, theirs.state(), *options, theirs.selecting_state())
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < tolerance, (step, error)
        assert torch.equal(ours.row_state, theirs.row_state) and torch.equal(ours.full_steps, theirs.full_steps)
        for name in ("keys", "values", *ours.batch_state):
            if name in ("keys", "values", "selecting_steps", "score_codes", "score_scales"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), (step, name)
        if dtype == torch.float32:
            if (step + 2) % (config.select_stride or NEVER):  # else the next step chooses anew
                assert seen_of(ours) == seen_of(theirs), step
        else:  # near ties at the cut may fall either way: go on from the same selection
            theirs.selected.copy_(ours.selected)


@pytest.mark.parametrize("distinct", [3, 200, 2**30])
@pytest.mark.parametrize(
    ("length", "budget"), [(40, 7), (1000, 1000), (1500, 1), (33000, 4096), (70001, 69000), (131072, 16384)]
)
def test_the_selection_is_exact(length, budget, distinct):
    assert_exact_selection(length, budget, distinct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_parity_of_kernels_and_naive_form(monkeypatch, padded, dtype):
    model = tiny_enabled(dtype=dtype, head_dim=16).cuda()
    ids = random_ids(2, 70).cuda()
    for prompt, config in CASES + SELECTING:
        mask = None
        if padded:
            mask = torch.ones_like(ids)
            mask[1, : prompt // 3] = 0
        monkeypatch.setitem(vars(CHOICE), "naive_only", False)
        found, cache = decode_logits(model, ids, prompt, config, mask)
        monkeypatch.setitem(vars(CHOICE), "naive_only", True)
        expected, wanted = decode_logits(model, ids, prompt, config, mask)
        if dtype == torch.bfloat16:
            assert found[:, : prompt + 1].isfinite().all()
            continue  # a selection may differ by a near tie; test_steps_equal_the_naive_form goes step by step
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=lambda m, c=config: f"{c}: {m}")
        assert torch.equal(cache.full_steps, wanted.full_steps), config
        assert torch.equal(cache.selecting_steps, wanted.selecting_steps), config


CACHES = {
    "fixed": lambda config: RefreshCache(config, 90, RefreshConfig(budget=6, stride=4)),
    "never": lambda config: RefreshCache(config, 90, RefreshConfig(budget=6, stride=NEVER)),
    "similarity": lambda config: RefreshCache(
        config, 90, RefreshConfig(budget=0.3, stride=3, threshold=0.1, observation_window=4, recent_window=2)
    ),
    "selecting": lambda config: RefreshCache(
        config, 90, RefreshConfig(budget=6, stride=NEVER, select_stride=2, score_bits=4)
    ),
    "selecting beside full steps": lambda config: RefreshCache(
        config, 90, RefreshConfig(budget=0.3, stride=7, select_stride=5, score_bits=8, observation_window=4)
    ),
    "selecting beside similarity": lambda config: RefreshCache(
        config, 90, RefreshConfig(budget=6, stride=3, threshold=0.1, select_stride=2, score_bits=16)
    ),
    "full": lambda config: FullCache(config, 90),
    "streaming": lambda config: StreamingCache(config, 90, 8),
    "h2o": lambda config: H2OCache(config, 90, 8),
    "snapkv": lambda config: SnapKVCache(config, 90, 8),
}


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("name", CACHES)
def test_generate_captures_the_step_by_itself(name, padding):
    """The same tokens as without compiling; one graph, no break, nothing that CUDA graphs had to leave out."""
    model = tiny_enabled(dtype=torch.float32, head_dim=16).cuda()
    ids = random_ids(2, 20).cuda()
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    settings = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    expected = model.generate(ids, past_key_values=CACHES[name](model.config), disable_compile=True, **settings)
    torch._dynamo.reset()
    counters.clear()
    compile_config = CompileConfig(fullgraph=True)
    for _ in range(2):  # another cache is recorded anew, but not compiled
        cache = CACHES[name](model.config)
        found = model.generate(ids, past_key_values=cache, compile_config=compile_config, **settings)
        assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
    if isinstance(cache, RefreshCache):
        assert int(cache.get_seq_length()) == 69 and cache.full_steps.shape[-1] == 69


@pytest.mark.parametrize("compile_config", [None, tuned_compilation()], ids=["default", "tuned"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"observation_window": 16, "recent_window": 64},
        {"threshold": 0.9},
        {"stride": NEVER, "select_stride": 2, "score_bits": 4},
        {"select_stride": 4, "score_bits": 8, "observation_window": 4},
    ],
)
def test_a_trained_model_goes_on_with_the_same_tokens(monkeypatch, settings, compile_config):
    """Greedily, 256 tokens in bfloat16, by kernels in a CUDA graph and by the naive form. Up to where they part, if
    they do, both are as near to what float32 gives after the same tokens: their rounding differs, and with it what is
    selected."""
    config = RefreshConfig(**{"budget": 0.125, "stride": 10, **settings})
    folder = ROOT / "base" / "python-4m"
    model = enable(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda(), config)
    exact = enable(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda(), config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = {"max_new_tokens": 256, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    asked |= {"custom_generate": decode_ahead, "return_dict_in_generate": True, "output_logits": True}
    asked |= {"compile_config": compile_config}
    texts = [
        (ROOT / "refreshkv" / name).read_text()
        for name in ("cache/preallocated_layer.py", "cache/offload.py", "prefix/store.py")
    ]
    prompts = [tokenizer(text, return_tensors="pt").input_ids[:, :1800].cuda() for text in texts]
    runs = []
    for is_naive in (False, True):
        monkeypatch.setitem(vars(CHOICE), "naive_only", is_naive)
        torch._dynamo.reset()  # a graph that was recorded holds the other form
        for ids in prompts:
            cache = RefreshCache(model.config, 2100, config)
            runs.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **asked))
    errors = []
    for ids, ours, theirs in zip(prompts, runs[:3], runs[3:], strict=True):
        apart = (ours.sequences != theirs.sequences).any(dim=0).nonzero().flatten().tolist()
        same = ours.sequences[:, : min([*apart, ours.sequences.shape[1] - 1])]
        steps = same.shape[1] - ids.shape[1] + 1
        with torch.no_grad():
            simulation = Simulation(ids.shape[1], config)
            wanted = exact(same, refresh=simulation, use_cache=False, logits_to_keep=steps).logits[0]
        found = (torch.cat(run.logits[:steps]).float() for run in (ours, theirs))
        errors.append([(logits - wanted).abs().mean(dim=1) for logits in found])
    ours, theirs = (torch.cat(column) for column in zip(*errors, strict=True))
    assert len(ours) > 100 and ours.mean() <= 1.25 * theirs.mean()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_tuned_steps(family, rows):
    """The tokens of the default; no product of a matrix with a row is written to memory before it is summed up."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.05}
    model = tiny_enabled(family=family, dtype=torch.float32, **sizes).cuda()
    ids = random_ids(rows, 20).cuda()
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "custom_generate": decode_ahead}
    outputs = []
    for compile_config in (None, tuned_compilation()):
        torch._dynamo.reset()
        cache = RefreshCache(model.config, 90, RefreshConfig(budget=6, stride=4))
        settings |= {"past_key_values": cache, "compile_config": compile_config}
        output, codes = run_and_get_code(model.generate, ids, **settings)
        outputs.append(output)
    assert torch.equal(*outputs)
    shapes = re.findall(r"empty_strided_cuda\(\(([\d, ]+)\)", codes[0])
    assert max(math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes) <= 512 * rows


def test_known_tokens_are_decoded_by_recorded_steps():
    """Two batches of one shape, compiled for once, before the time is taken; losses as of the parallel form, which has
    SnapKV with the paper's selection as a small cache that is never refreshed."""
    model = tiny_enabled(dtype=torch.float32, head_dim=16).cuda()
    config, caches = RefreshConfig(budget=6, stride=4), Caches(model)
    for name in ("full", "refresh", "snapkv"):
        (way,) = build_strategies([name], config)
        torch._dynamo.reset()
        counters.clear()
        for seed in (1, 2):
            ids = random_ids(2, 60, seed=seed).cuda()
            decoded = decode_known(model, ids, 30, way, caches)
            simulation = (
                None
                if name == "full"
                else Simulation(30, config if name == "refresh" else replace(config, stride=NEVER))
            )
            expected = sequence_losses(model, ids, simulation, last=30)
            torch.testing.assert_close(decoded.losses, expected.cpu(), rtol=0, atol=1e-4)
            assert counters["stats"]["unique_graphs"] == 1 and counters["inductor"]["cudagraph_skips"] == 0


def test_a_full_cache_says_so():
    model, ids = tiny_enabled(dtype=torch.float32, head_dim=16).cuda(), random_ids(2, 20).cuda()
    cache = RefreshCache(model.config, 25, RefreshConfig(budget=6))
    with pytest.raises(ValueError, match="RefreshCache is full: 26 tokens, but max_cache_len=25"):
        model.generate(ids, past_key_values=cache, max_new_tokens=30, eos_token_id=None)


@pytest.mark.parametrize("selecting", [{}, {"select_stride": 3, "score_bits": 4}])
def test_turns_chunks_and_a_reset(selecting):
    """The same cache again: other prompt lengths, chunks, a second turn. Naive steps in float64 say what is right."""
    model = tiny_enabled(dtype=torch.float64, head_dim=16).cuda()
    fast = tiny_enabled(dtype=torch.float32, head_dim=16).cuda()
    config = RefreshConfig(budget=0.3, stride=4, observation_window=5, **selecting)
    cache = RefreshCache(fast.config, 90, config)
    for length, chunk in ((20, None), (31, 8), (13, None)):
        settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12, "prefill_chunk_size": chunk}
        exact, tokens = RefreshCache(model.config, 90, config), random_ids(2, length, seed=length).cuda()
        for turn in range(2):
            settings["attention_mask"] = torch.ones_like(tokens)  # a generated token may be the padding token
            expected = model.generate(tokens, past_key_values=exact, disable_compile=True, **settings)
            assert torch.equal(fast.generate(tokens, past_key_values=cache, **settings), expected), (length, turn)
            tokens = torch.cat([expected, random_ids(2, 5, seed=turn).cuda()], dim=1)
            settings["prefill_chunk_size"] = None
        cache.reset()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("name", CACHES)
def test_decode_ahead_equals_the_loop_of_transformers(name, compiled):
    """Texts that end early, at and beside checks, and go on: by a question, or by the token that was next."""
    model = tiny_enabled(dtype=torch.float32, head_dim=16).cuda()
    settings = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "disable_compile": not compiled}
    question = 0 if name in ("streaming", "h2o", "snapkv") else 3
    results = []
    for loop in ({}, {"custom_generate": decode_ahead}):
        ids, cache = random_ids(1, 20).cuda(), CACHES[name](model.config)
        for turn in range(3):
            ids = model.generate(
                ids, past_key_values=cache, eos_token_id=list(range(3 + turn, 61, 5)), **settings, **loop
            )
            ids = torch.cat([ids, random_ids(1, question * (turn % 2), seed=turn).cuda()], dim=1)
        results.append((ids, int(cache.get_seq_length())))
    (expected, length), (found, ours) = results
    assert torch.equal(found, expected) and ours == length


class NoWaiting(StoppingCriteria):
    """From the 8th token on, once everything is recorded, waiting for the device is an error; ends the text."""

    def __init__(self, length: int):
        self.length, self.calls = length, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.calls == 8:
            torch.cuda.set_sync_debug_mode("error")
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", CACHES)
def test_decode_ahead_never_waits(name, sample):
    model, ids = tiny_enabled(dtype=torch.float32, head_dim=16).cuda(), random_ids(2, 20).cuda()
    rule = NoWaiting(52)
    settings = {"max_new_tokens": 50, "do_sample": sample, "eos_token_id": 61, "pad_token_id": 0}
    settings |= {"stopping_criteria": [rule], "custom_generate": decode_ahead}
    try:
        output = model.generate(ids, past_key_values=CACHES[name](model.config), **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.shape == (2, 52) and rule.calls == 33, "32 tokens, and one that was taken back"


def test_decode_ahead_samples_as_transformers_does():
    model, ids = tiny_enabled(dtype=torch.float32, head_dim=16).cuda(), random_ids(2, 20).cuda()
    settings = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": [7, 9, 11], "pad_token_id": 0}
    results = []
    for loop in ({}, {"custom_generate": decode_ahead}):
        torch.manual_seed(3)
        output = model.generate(ids, past_key_values=CACHES["fixed"](model.config), **settings, **loop)
        results.append((output, torch.rand(1, device="cuda")))
    (expected, after), (found, ours) = results
    assert torch.equal(found, expected) and torch.equal(ours, after)
