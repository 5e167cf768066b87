"""Hybrids: recurrent layers keep transformers' own cache layer, full-attention layers refresh."""

import pytest
import torch

from refreshkv import RefreshCache, RefreshConfig, SettingsError, Simulation, decode_ahead
from refreshkv.attention.sequence_parallel import check_sequence
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.prefix.store import PrefixStore
from tests.helpers import literal
from tests.helpers.exact_linear_attention import use_exact_linear_attention
from tests.helpers.models import decode_logits, padded_positions, random_ids, tiny_enabled

CONFIG = RefreshConfig(budget=6, stride=4)
FAMILY = "qwen3_next"
IDS = random_ids(3, 30, seed=2)


@pytest.fixture(scope="module")
def model():
    return tiny_enabled(CONFIG, family=FAMILY)


def decoded(model, cache, ids, start=0):
    """Logits of ids[:, start:], of which the first 12 come in one block."""
    bounds = [start, *range(start + 12, ids.shape[1] + 1)]
    with torch.no_grad():
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.cat(parts, dim=1)


def test_several_turns_equal_the_literal_form(monkeypatch):
    model, ids = tiny_enabled(CONFIG, family=FAMILY), IDS[:2]
    use_exact_linear_attention(monkeypatch, model)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache, parts = RefreshCache(model.config, 30), []
    for a, b in [(0, 9), *((t, t + 1) for t in range(9, 16)), (16, 20), *((t, t + 1) for t in range(20, 30))]:
        positions = padded_positions(mask)[:, a:b]
        with torch.no_grad():
            call = model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions, past_key_values=cache)
        parts.append(call.logits)
    model.set_attn_implementation(literal.NAME)
    with torch.no_grad():
        expected = model(
            ids,
            attention_mask=mask,
            position_ids=padded_positions(mask),
            use_cache=False,
            blocks=[(0, 9), (16, 20)],
            config=CONFIG,
        ).logits
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-10)


def test_batch_rows_are_selected_repeated_and_forgotten(model):
    expected = decode_logits(model, IDS, 12, CONFIG)[0]
    cache = RefreshCache(model.config, 30)
    decoded(model, cache, IDS[:, :20])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0]
    with torch.no_grad():
        found = [model(IDS[rows, t : t + 1], past_key_values=cache).logits for t in range(20, 30)]
    torch.testing.assert_close(torch.cat(found, 1), expected[rows, 20:], rtol=0, atol=1e-4)
    cache.reset()  # now with another number of rows
    torch.testing.assert_close(decoded(model, cache, IDS), expected, rtol=0, atol=1e-4)
    cache.reset()
    assert torch.equal(decoded(model, cache, IDS), decoded(model, RefreshCache(model.config, 30), IDS))


@pytest.mark.parametrize("make", [FullCache, lambda config, length: StreamingCache(config, length, 12)])
def test_baselines_take_recurrent_layers(model, make):
    assert decoded(model, make(model.config, 30), IDS).isfinite().all()


def test_full_attention_through_a_cache_is_the_models_own(model):
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(decoded(model, FullCache(model.config, 30), IDS), expected, rtol=0, atol=1e-4)


def test_steps_cannot_be_taken_back_and_decode_ahead_waits(model):
    cache = RefreshCache(model.config, 40)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="cannot take tokens back"):
        cache.activate_past_recording()
    ids = IDS[:, :15]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(ids, past_key_values=cache, **settings)
    found = model.generate(
        ids, past_key_values=RefreshCache(model.config, 40), custom_generate=decode_ahead, run_ahead=True, **settings
    )
    assert torch.equal(found, expected)


def test_a_pass_that_breaks_off_leaves_a_cache_that_says_so():
    model = tiny_enabled(CONFIG, family=FAMILY)
    cache = RefreshCache(model.config, 30)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(IDS, past_key_values=cache)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"an error broke off the last pass .*: call reset\(\) first") as caught:
        model(IDS, past_key_values=cache)
    assert "\n" not in str(caught.value)
    cache.reset()
    assert decoded(model, cache, IDS).isfinite().all()


def test_another_number_of_rows_is_refused(model):
    cache = RefreshCache(model.config, 30)
    decoded(model, cache, IDS[:, :14])
    with torch.no_grad(), pytest.raises(ValueError, match=r"holds 3 rows and was given 2: call reset\(\) first"):
        model(IDS[:2, :1], past_key_values=cache)


def test_gradients_reach_the_recurrent_layers(model):
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False, simulation=Simulation(12, CONFIG)).loss.backward()
    weight = model.model.layers[0].linear_attn.out_proj.weight
    assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0
    model.zero_grad()


def test_what_recurrent_layers_exclude_is_refused_in_one_line(model):
    with pytest.raises(SettingsError, match="recurrent layers.*leave out the prefix store") as store:
        PrefixStore(None, 10**6, model)
    with pytest.raises(SettingsError, match="parallel.sequence=2: a recurrent layer.*parallel.sequence=1") as parallel:
        check_sequence(2, 2, 30, model.config)
    assert all("\n" not in str(caught.value) for caught in (store, parallel))
    check_sequence(1, 2, 30, model.config)
