"""Situations of a call, each in all forms in which its inputs may come: the same verdict for each form."""

import re

import pytest
import torch
from transformers import DynamicCache

from refreshkv import RefreshCache, RefreshConfig, Simulation, decode_ahead
from refreshkv.baselines.h2o import H2OCache
from tests.helpers.models import padded_positions, random_ids, tiny_enabled, tiny_model

CONFIG = RefreshConfig(budget=6, stride=4)
MODEL = tiny_enabled(CONFIG)
IDS = random_ids(2, 20)
ONES = torch.ones_like(IDS)
PADDED = ONES.clone()
PADDED[1, :5] = 0
POSITIONS = torch.arange(20).expand(2, -1)
RESTARTING = torch.arange(10).repeat(2).expand(2, -1)
CU_SEQ_LENS = {"cu_seq_lens_q": torch.arange(0, 41, 10), "cu_seq_lens_k": torch.arange(0, 41, 10)}
WHOLE = {"cu_seq_lens_q": torch.arange(0, 41, 20), "cu_seq_lens_k": torch.arange(0, 41, 20)}

ACCEPTED = {
    "one sequence a row": [
        {},
        {"attention_mask": ONES},
        {"attention_mask": ONES.bool()},
        {"attention_mask": ONES.float()},
        {"position_ids": POSITIONS},
        {"position_ids": POSITIONS[:1], "attention_mask": ONES},
        {"position_ids": POSITIONS + 7},
        WHOLE,
        {"max_length_q": 20, "max_length_k": 20, "position_ids": POSITIONS},
        {"seq_idx": torch.zeros_like(IDS)},
        {"output_attentions": False},
    ],
    "left padding": [
        {"attention_mask": PADDED},
        {"attention_mask": PADDED.bool(), "position_ids": padded_positions(PADDED)},
        {"attention_mask": PADDED, "position_ids": POSITIONS},
        {"attention_mask": PADDED, "position_ids": padded_positions(PADDED).masked_fill(PADDED == 0, 1)},
    ],
}
REFUSED = {
    "packed": [
        {"position_ids": RESTARTING},
        {"position_ids": RESTARTING[:1]},
        {"position_ids": RESTARTING, "attention_mask": ONES},
        {"position_ids": RESTARTING, "attention_mask": PADDED},
        CU_SEQ_LENS,
        {"cu_seq_lens_k": CU_SEQ_LENS["cu_seq_lens_k"], "attention_mask": ONES},
        {"max_length_q": 10, "max_length_k": 10},
        {"seq_idx": RESTARTING.diff(prepend=RESTARTING[:, :1]).lt(0).cumsum(-1)},
        {"attention_mask": (RESTARTING[:, None, :, None] == RESTARTING[:, None, None, :])},
    ],
    "lengths": [
        {"attention_mask": ONES[:, 1:]},
        {"attention_mask": torch.cat([ONES, ONES[:, :1]], dim=1)},
        {"attention_mask": PADDED[:, 1:]},
        {"attention_mask": torch.cat([PADDED[:, :1], PADDED], dim=1)},
        {"attention_mask": ONES[:1]},
        {"position_ids": POSITIONS[:, 1:]},
        {"position_ids": torch.cat([POSITIONS, POSITIONS[:, -1:] + 1], dim=1), "attention_mask": ONES},
        {"position_ids": POSITIONS[:1].repeat(3, 1)},
    ],
    "not returned": [
        {"output_attentions": True},
        {"output_attentions": True, "attention_mask": ONES},
        {"head_mask": torch.ones(2, 4)},
    ],
}
USES = ("plain", "no cache", "simulation", "RefreshCache", "offloaded", "H2O")


def call(inputs, use):
    uses = {
        "plain": dict,
        "no cache": lambda: {"use_cache": False},
        "simulation": lambda: {"simulation": Simulation(10, CONFIG)},
        "RefreshCache": lambda: {"past_key_values": RefreshCache(MODEL.config, 30)},
        "offloaded": lambda: {"past_key_values": RefreshCache(MODEL.config, 30, offload=True)},
        "H2O": lambda: {"past_key_values": H2OCache(MODEL.config, 30, 9)},
    }
    with torch.no_grad():
        return MODEL(IDS, **inputs, **uses[use]()).logits


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("situation", ACCEPTED)
def test_accepted_in_each_form(situation, use):
    first, *others = ACCEPTED[situation]
    real = PADDED.bool() if situation == "left padding" else ONES.bool()
    expected = call(first, use)
    for inputs in others:
        is_shifted = not torch.equal(inputs.get("position_ids", POSITIONS).expand(2, -1)[real], POSITIONS[real])
        tolerance = 1e-4 if is_shifted else 1e-9  # transformers turns by angles in float32
        torch.testing.assert_close(call(inputs, use)[real], expected[real], rtol=0, atol=tolerance)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("situation", REFUSED)
def test_refused_in_each_form(situation, use):
    for inputs in REFUSED[situation]:
        with pytest.raises(ValueError) as caught:
            call(inputs, use)
        assert "\n" not in str(caught.value), inputs


@pytest.mark.parametrize("make", [lambda: RefreshCache(MODEL.config, 60), lambda: H2OCache(MODEL.config, 60, 9)])
def test_steps_whose_inputs_disagree_with_the_cache_are_refused(make):
    """And the right step, in each form, is taken afterwards."""
    with torch.no_grad():
        for mask in (ONES, PADDED):
            cache, grown = make(), torch.cat([mask, ONES[:, :1]], dim=1)
            positions = padded_positions(grown)[:, 20:]
            MODEL(IDS, attention_mask=mask, position_ids=padded_positions(mask), past_key_values=cache)
            other = grown.clone()
            other[:, :7] = 0
            wrong = [
                {"attention_mask": mask},
                {"attention_mask": ONES[:, :1]},
                {"attention_mask": other, "position_ids": positions},
                {"position_ids": positions - 20, "attention_mask": grown},
                {"position_ids": positions + 1},
                {"position_ids": positions - positions},
                {"output_attentions": True},
                {"use_cache": False},
            ]
            wrong += [{}] if mask is PADDED else []  # positions that count the padding too
            for inputs in wrong:
                with pytest.raises(ValueError) as caught:
                    MODEL(IDS[:, :1], past_key_values=cache, **inputs)
                assert "\n" not in str(caught.value), inputs
            right = [{"position_ids": positions}, {"position_ids": positions, "attention_mask": grown}]
            for inputs in right + ([{}] if mask is ONES else []):
                inputs = {**inputs}
                if "attention_mask" in inputs:
                    inputs["attention_mask"] = torch.cat([mask, ONES[:, : cache.length - 19]], dim=1)
                if "position_ids" in inputs:
                    inputs["position_ids"] = positions + cache.length - 20
                assert MODEL(IDS[:, :1], past_key_values=cache, **inputs).logits.isfinite().all()


GENERATE = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
FORMS = {
    "ids": {},
    "mask": {"attention_mask": True},
    "chunks": {"prefill_chunk_size": 6},
    "beams": {"num_beams": 2},
    "ahead": {"custom_generate": decode_ahead},
}


def generate(ids, cache, form, padding=0):
    settings = {**GENERATE, **FORMS[form]}
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    if padding or settings.pop("attention_mask", False):
        settings["attention_mask"] = mask
    return MODEL.generate(ids, past_key_values=cache, **settings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("length", [10, 23, 24, 40], ids=["shorter", "as long", "by one", "longer"])
def test_another_text_without_a_reset_is_refused(form, padding, length):
    cache = RefreshCache(MODEL.config, 60)
    generate(IDS, cache, form, padding)
    other = random_ids(2, length, seed=5)
    with pytest.raises(ValueError, match=r"call reset\(\) first") as caught:
        generate(other, cache, form, padding)
    assert "\n" not in str(caught.value)
    cache.reset()
    found = generate(other, cache, form, padding)
    assert torch.equal(found, generate(other, RefreshCache(MODEL.config, 60), form, padding))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "beams"])
def test_the_same_text_without_a_reset_goes_on(form):
    cache = RefreshCache(MODEL.config, 60)
    longer = generate(IDS, cache, form)
    assert generate(torch.cat([longer, random_ids(2, 3)], dim=1), cache, form).shape == (2, 31)


def test_a_static_or_a_second_cache_is_refused():
    for settings in ({"cache_implementation": "static"}, {"assistant_model": tiny_model(seed=1)}):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            generate_with = {**GENERATE, **settings}
            MODEL.generate(IDS[:1], past_key_values=RefreshCache(MODEL.config, 60), **generate_with)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cache", [None, "ours"])
def test_attention_weights_are_refused_by_generate(cache):
    cache = None if cache is None else RefreshCache(MODEL.config, 60)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        MODEL.generate(
            IDS, past_key_values=cache, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2
        )
    model = tiny_enabled(CONFIG)
    model.config._attn_implementation = "eager"
    assert len(model(IDS, output_attentions=True).attentions) == 2
    model = tiny_enabled(CONFIG)
    with pytest.raises(ValueError, match="output_attentions"):  # by transformers
        model.config.output_attentions = True


def test_a_plain_cache_of_transformers_still_takes_turns():
    cache = DynamicCache(config=MODEL.config)
    with torch.no_grad():
        MODEL(IDS[:, :10], past_key_values=cache)
        found = MODEL(IDS[:, 10:], past_key_values=cache, attention_mask=ONES).logits
        torch.testing.assert_close(found, MODEL(IDS).logits[:, 10:], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_compiled_simulation_takes_padding():
    torch._dynamo.reset()
    compiled = torch.compile(MODEL, backend="eager")
    inputs = {"attention_mask": PADDED, "position_ids": padded_positions(PADDED), "simulation": Simulation(10, CONFIG)}
    with torch.no_grad():
        found, expected = compiled(IDS, **inputs).logits, MODEL(IDS, **inputs).logits
        torch.testing.assert_close(found[PADDED.bool()], expected[PADDED.bool()], rtol=0, atol=1e-12)
        with pytest.raises((ValueError, RuntimeError), match="packed sequences"):
            compiled(IDS, **{**inputs, "position_ids": RESTARTING})


def hook_compiled():
    """A model whose hooks are compiled, and whose layers are not: as after torch's recompile limit."""
    torch._dynamo.reset()
    model = tiny_enabled(CONFIG)
    for layer in model.model.layers:
        layer.forward = torch.compiler.disable(layer.forward)
    return model, torch.compile(model, backend="eager")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("simulation", [None, Simulation(10, CONFIG)], ids=["plain", "simulated"])
@pytest.mark.parametrize("situation", REFUSED)
def test_refused_by_compiled_code_too(situation, simulation):
    model, compiled = hook_compiled()
    compiled(IDS, simulation=simulation, position_ids=POSITIONS)
    for inputs in REFUSED[situation]:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            compiled(IDS, simulation=simulation, **inputs)
        words = {"packed": "packed sequences|4D mask", "lengths": r"attention_mask has \d+|position_ids have shape"}
        assert re.search(words.get(situation, "is not supported by the refresh attention"), str(caught.value)), inputs
        assert not model.refreshkv_calls.running


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("simulation", [None, Simulation(10, CONFIG)], ids=["plain", "simulated"])
def test_accepted_by_compiled_code_too(simulation):
    _, compiled = hook_compiled()
    for situation, forms in ACCEPTED.items():
        real = PADDED.bool() if situation == "left padding" else ONES.bool()
        for inputs in forms:
            found, expected = (run(IDS, simulation=simulation, **inputs).logits[real] for run in (compiled, MODEL))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
