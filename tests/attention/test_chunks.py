"""Prompts in chunks: values and gradients against the plain form, special cases, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from refreshkv import RefreshConfig, SettingsError, Simulation
from refreshkv.attention.chunks import chunked_prompt
from refreshkv.attention.dense import DenseAttention
from refreshkv.attention.function import refresh_attention
from refreshkv.ops import naive
from refreshkv.ops.state import PLAIN_SOFTMAX, SoftmaxTerms
from tests.helpers.models import random_ids, tiny_enabled

MODULE = SimpleNamespace(num_key_value_groups=2, is_causal=True, layer_idx=0)

PROMPTS = [
    ((20, 63, 111), [0, 0], 0),
    ((1, 2, 40, 63), [0, 0], 4),
    (((10, 63), (30, 40, 63)), [3, 17], 0),
    (((2, 5, 9, 63), (8, 30, 63)), [0, 9], 6),
]


@pytest.mark.parametrize("case", range(len(PROMPTS)))
@pytest.mark.parametrize("terms", [PLAIN_SOFTMAX, SoftmaxTerms(torch.randn(4, dtype=torch.float64), 3.0)])
def test_values_and_gradients_are_those_of_the_plain_form(case, terms):
    chunks, padding, sinks = PROMPTS[case]
    simulation = Simulation(
        chunks[-1] if isinstance(chunks[-1], int) else 63, RefreshConfig(sink_tokens=sinks), chunks=chunks
    )
    generator, length = torch.Generator().manual_seed(case), simulation.prompt_length
    query, key, value = (
        torch.randn(2, heads, length, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    padding = torch.tensor(padding)
    dense = DenseAttention(MODULE, padding if padding.any() else None, 0.4, 0.0, None, "sdpa", {}, terms)
    found = chunked_prompt(dense, query, key, value, simulation)
    expected = naive.chunked_prompt(query, key, value, simulation.chunk_ends(2), padding, sinks, 0.4, terms)
    real = torch.arange(length) >= padding[:, None]
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-12)
    upstream = torch.randn(found[real].shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad(output[real], (query, key, value), upstream) for output in (found, expected)]
    for own, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(own, plain, rtol=0, atol=1e-12)


def test_the_mask_says_what_each_token_sees():
    mask = naive.chunk_mask([(2, 4, 6), (3, 6)], torch.tensor([0, 1]), sink_tokens=1)[:, 0].int()
    assert mask.tolist() == [
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [1, 0, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1],
        ],
        [
            [1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 1, 1, 1, 1, 0],
            [0, 1, 1, 1, 1, 1],
        ],
    ]


def test_one_chunk_is_the_ordinary_prompt():
    model, ids, config = tiny_enabled(), random_ids(2, 50), RefreshConfig(budget=8, stride=5)
    with torch.no_grad():
        whole, one = (model(ids, simulation=Simulation(30, config, chunks=c)).logits for c in (None, (30,)))
    assert torch.equal(whole, one)


def test_gradients_reach_the_weights_through_checkpointing():
    ids, config = random_ids(2, 50), RefreshConfig(budget=8, stride=5, sink_tokens=1)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_enabled().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        simulation = Simulation(30, config, chunks=[(9, 30), (4, 12, 30)])
        model(ids, simulation=simulation, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, repeated)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunks": (5, 5, 30)}, "ascending ends of chunks, the last of them prompt_length=30"),
        ({"chunks": (5, 29)}, "ascending"),
        ({"chunks": ()}, "ascending"),
        ({"chunks": (0, 30)}, "chunks must be a whole number >= 1"),
        ({"chunks": [(5, 30), (31, 30)]}, "ascending"),
        ({"chunks": (29, 30), "config": RefreshConfig(observation_window=2)}, "fewer tokens than observation_window=2"),
        ({"chunks": (5, 30), "config": RefreshConfig(rectify=True)}, "rectify=True exclude each other"),
    ],
)
def test_chunks_that_cannot_be_are_refused(settings, words):
    with pytest.raises(SettingsError, match=words):
        Simulation(30, **settings)


def test_models_and_batches_that_cannot_be_chunked_are_refused():
    ids, simulation = random_ids(2, 40), Simulation(30, RefreshConfig(budget=8), chunks=[(5, 30)])
    with pytest.raises(SettingsError, match="chunks are given for 1 rows, and the batch has 2"):
        tiny_enabled()(ids, simulation=simulation)
    layer_types = ["full_attention", "sliding_attention"]
    model = tiny_enabled(family="qwen2", sliding_window=12, use_sliding_window=True, layer_types=layer_types)
    with pytest.raises(SettingsError, match="chunks need full attention in every layer"):
        model(ids, simulation=simulation)


def test_a_sequence_spread_over_processes_is_refused():
    module = tiny_enabled().model.layers[0].self_attn
    query, key = torch.zeros(1, 4, 40, 8), torch.zeros(1, 2, 40, 8)
    simulation = Simulation(30, RefreshConfig(budget=8), chunks=(5, 30))
    with pytest.raises(SettingsError, match=r"set parallel\.sequence=1"):
        refresh_attention(module, query, key, key, None, simulation=simulation, average_heads=lambda mean: mean)
