"""Learned look-ahead: the same in one pass and in decoding, nothing at zero, its training signal, its file."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import refreshkv
from refreshkv import NEVER, RefreshCache, RefreshConfig, SettingsError, Simulation, Trace, add_look_ahead
from refreshkv.attention.look_ahead import look_ahead_modules
from refreshkv.attention.look_ahead_file import LOOK_AHEAD_FILE, look_ahead_weights
from refreshkv.baselines.full import FullCache
from refreshkv.generation.lossless import decode_lossless
from refreshkv.parity import decoding_difference
from tests.helpers.models import decode_logits, padded_positions, random_ids, tiny_enabled

PROMPT = 17
SCHEDULES = {
    "fixed": RefreshConfig(budget=8, stride=5),
    "similarity": RefreshConfig(budget=8, stride=3, threshold=0.0, observation_window=4),
    "selecting": RefreshConfig(budget=0.4, stride=NEVER, select_stride=2, score_bits=4, pool_ahead=True),
    "both": RefreshConfig(budget=8, stride=4, threshold=0.1, select_stride=3, recent_window=3, sink_tokens=2),
}


def with_random_look_ahead(seed=0, **settings):
    model = add_look_ahead(tiny_enabled(**settings), queries=3, rank=2)
    torch.manual_seed(seed)
    for module in look_ahead_modules(model).values():
        nn.init.normal_(module.up)
        nn.init.normal_(module.offsets, std=3.0)
    return model


@torch.no_grad()
def simulated(model, ids, config, **more):
    return model(ids, simulation=Simulation(PROMPT, config), use_cache=False, **more).logits


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_untrained_queries_change_no_bit(schedule):
    ids, config = random_ids(2, 60), SCHEDULES[schedule]
    plain = simulated(tiny_enabled(), ids, config)
    assert torch.equal(simulated(add_look_ahead(tiny_enabled(), queries=3), ids, config), plain)
    assert (simulated(with_random_look_ahead(), ids, config) - plain).abs().max() > 1e-3  # and trained ones do


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_pass_equals_decoding(schedule):
    difference, _ = decoding_difference(with_random_look_ahead(), random_ids(2, 45), PROMPT, SCHEDULES[schedule])
    assert difference.max() < 1e-10


@pytest.mark.parametrize("schedule", ["similarity", "selecting"])
def test_one_pass_equals_decoding_with_left_padding(schedule):
    model, ids, config = with_random_look_ahead(), random_ids(2, 50), SCHEDULES[schedule]
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    more = {"attention_mask": mask, "position_ids": padded_positions(mask)}
    parallel = simulated(model, ids, config, **more)
    sequential, _ = decode_logits(model, ids, PROMPT, config, mask)
    assert (parallel - sequential)[mask.bool()].abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "olmo3", "gemma2"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_pass_equals_decoding_in_every_family(family, schedule):
    model = with_random_look_ahead(family=family)
    assert decoding_difference(model, random_ids(2, 60), PROMPT, SCHEDULES[schedule])[0].max() < 1e-10


def turn(vector, angle):
    """The rotary embedding of a vector (D,) by the angles (D / 2,)."""
    first, second = vector.chunk(2)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def captured(model, ids, config):
    """The queries (before and after the rotary embedding), the keys and the trace of layer 0 in one pass."""
    attention, seen = model.model.layers[0].self_attn, {}
    handles = [
        attention.q_proj.register_forward_hook(lambda module, args, output: seen.update(before=output)),
        attention.k_proj.register_forward_hook(lambda module, args, output: seen.update(key=output)),
    ]
    trace = Trace(measured_steps=100)
    model(ids, simulation=Simulation(PROMPT, config), trace=trace, use_cache=False)
    for handle in handles:
        handle.remove()
    before, key = (seen[name].detach().unflatten(2, (-1, 8)).transpose(1, 2) for name in ("before", "key"))
    return before, key, trace


@pytest.mark.parametrize("steps", ["full", "selecting"])
def test_the_training_signal_and_its_gradient_equal_the_definition(steps):
    """Section 13 of the specification, query head by query head and step by step."""
    horizon = 4
    config = RefreshConfig(budget=8, stride=horizon if steps == "full" else NEVER)
    config = config if steps == "full" else RefreshConfig(budget=8, stride=NEVER, select_stride=horizon)
    model, ids = with_random_look_ahead(groups=2), random_ids(2, 32)
    before, key, trace = captured(model, ids, config)
    module = look_ahead_modules(model)[0]
    found = trace.look_ahead_divergences[0]
    gradients = torch.autograd.grad(found, [module.offsets, module.down, module.up])

    frequency = 1.0 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, 8, 2).double() / 8)
    torch.testing.assert_close(module.frequencies, frequency, rtol=1e-6, atol=0.0)
    frequency, length = module.frequencies, ids.shape[1]
    terms = []
    for row in range(2):
        for head in range(4):
            keys = torch.stack([turn(key[row, head // 2, t], t * frequency) for t in range(length)])
            queries = torch.stack([turn(before[row, head, t], t * frequency) for t in range(length)])
            for a in range(PROMPT - 1, length - 1, horizon):
                after = range(a + 1, min(a + horizon, length - 1) + 1)
                target = sum((queries[t] @ keys[: t + 1].T * 8**-0.5).softmax(0)[: a + 1] for t in after)
                target = target / target.sum()
                r = before[row, head, a]
                observers = [queries[a]] + [
                    turn(
                        r + r @ module.down[head // 2, i] @ module.up[head // 2, i],
                        (a + module.offsets[head // 2, i]) * frequency,
                    )
                    for i in range(3)
                ]
                score = sum((query @ keys[: a + 1].T * 8**-0.5).softmax(0) for query in observers) / 4
                terms.append((target * (target / score).log()).sum())
    expected = torch.stack(terms).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found.item() > 0.01
    for one, other in zip(
        gradients, torch.autograd.grad(expected, [module.offsets, module.down, module.up]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    found = sum(captured(model, ids, config)[2].look_ahead_divergences.values())
    found.backward()  # into the look-ahead alone
    assert {name.split(".")[-2] for name, part in model.named_parameters() if part.grad is not None} == {"look_ahead"}


def test_saved_queries_come_back_with_the_model(tmp_path):
    model, ids = with_random_look_ahead(config=SCHEDULES["selecting"]), random_ids(2, 60)
    refreshkv.save_look_ahead(model, tmp_path)
    again = refreshkv.enable(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    expected, found = look_ahead_weights(model), look_ahead_weights(again)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    config = SCHEDULES["selecting"]
    assert torch.equal(simulated(again, ids, config), simulated(model, ids, config))

    other = tiny_enabled(layers=3)
    with pytest.raises(SettingsError, match="is of another model: layers.2.down does not fit"):
        refreshkv.load_look_ahead(other, tmp_path)
    (tmp_path / LOOK_AHEAD_FILE).unlink()
    with pytest.raises(SettingsError, match="has no look_ahead.safetensors"):
        refreshkv.enable(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))


@pytest.mark.parametrize(
    "family, message",
    [
        ("nanochat", "layer 0 rotates its queries in another way"),
        ("stablelm", "2 cosines for the 8 dimensions of a head"),
        ("gpt_oss", "4 cosines for the 8 dimensions of a head"),
        ("qwen3_next", "2 cosines for the 8 dimensions of a head"),
    ],
)
def test_a_query_that_cannot_be_turned_back_is_refused(family, message):
    model = tiny_enabled(family=family)
    with pytest.raises(SettingsError, match=message):
        add_look_ahead(model)
    assert not look_ahead_modules(model) and simulated(model, random_ids(1, 30), SCHEDULES["fixed"]).isfinite().all()


def test_frequencies_that_change_with_the_length_are_refused():
    model = tiny_enabled()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(SettingsError, match="dynamic"):
        add_look_ahead(model)


def test_what_does_not_follow_look_ahead_queries_is_refused():
    model, ids = with_random_look_ahead(), random_ids(1, 40)
    with pytest.raises(SettingsError, match="rectify=True does not follow look-ahead"):
        simulated(model, ids, RefreshConfig(budget=8, stride=4, rectify=True))
    for refresh, offload, message in (
        (SCHEDULES["fixed"], True, "OffloadedLayer does not follow"),
        (RefreshConfig(budget=8, stride=4, rectify=True), False, "nor by rectify=True"),
    ):
        cache = RefreshCache(config=model.config, refresh=refresh, max_cache_len=60, offload=offload)
        with pytest.raises(SettingsError, match=message):
            model(ids, past_key_values=cache)
    cache = RefreshCache(config=model.config, refresh=SCHEDULES["fixed"], max_cache_len=60)
    with pytest.raises(SettingsError, match="not followed by lossless decoding"):
        model.generate(ids, past_key_values=cache, custom_generate=decode_lossless, max_new_tokens=8, do_sample=False)
    with pytest.raises(SettingsError, match="already"):
        add_look_ahead(model)
    full = model(ids, past_key_values=FullCache(config=model.config, max_cache_len=60)).logits  # has no selection
    torch.testing.assert_close(full, model(ids, use_cache=False).logits)


def test_generation_follows_the_queries_and_goes_without_them_once_removed():
    model, ids = with_random_look_ahead(), random_ids(1, 40)
    texts = []
    for _ in range(2):
        cache = RefreshCache(config=model.config, refresh=SCHEDULES["fixed"], max_cache_len=70)
        texts.append(model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False))
        refreshkv.remove_look_ahead(model)
    assert texts[0].shape == texts[1].shape and not torch.equal(*texts)
    assert not hasattr(model.config, "refreshkv_look_ahead")
