"""What enable() and the attention refuse, other attentions for the prompt, and gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, modeling_flash_attention_utils
from transformers.integrations import flash_attention

import refreshkv
from refreshkv import RefreshCache, RefreshConfig, Simulation, Trace
from refreshkv.attention import function as attention
from refreshkv.attention.function import refresh_attention
from refreshkv.cache.keyword import CACHE_NAME
from refreshkv.ops import naive
from refreshkv.settings import SettingsError
from tests.helpers import literal
from tests.helpers.models import decode_logits, padded_positions, random_ids, tiny_enabled, tiny_model

FIXED = RefreshConfig(budget=6, stride=4)
SIMILAR = RefreshConfig(budget=0.4, stride=2, threshold=0.1, observation_window=3, recent_window=2, sink_tokens=1)
SELECTING = RefreshConfig(budget=5, stride=6, select_stride=2, score_bits=4, pool_ahead=True)
SLIDING = {
    "family": "qwen3",
    "layers": 3,
    "sliding_window": 9,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}


# ---- enable()


def test_enable_writes_the_config_and_returns_the_model():
    model = tiny_model()
    assert refreshkv.enable(model, SIMILAR) is model
    assert RefreshConfig.from_dict(model.config.refreshkv) == SIMILAR
    assert model.config._attn_implementation == "refreshkv"


def test_enabling_again_changes_the_settings_and_nothing_else():
    model, ids = tiny_enabled(SIMILAR), random_ids(2, 30)
    refreshkv.enable(model, FIXED)
    refreshkv.enable(model)
    assert RefreshConfig.from_dict(model.config.refreshkv) == FIXED
    hooks = [len(layer.self_attn._forward_pre_hooks) for layer in model.model.layers]
    assert hooks == [1, 1]
    once, _ = decode_logits(tiny_enabled(FIXED), ids, 15, None)
    twice, _ = decode_logits(model, ids, 15, None)
    assert torch.equal(once, twice)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "mistral", "sliding_window": 4096}, r"every layer .* sliding window \(4096 tokens\)"),
        ({"attention_dropout": 0.1}, "set attention_dropout=0"),
        (
            {"family": "qwen2", "layer_types": ["full_attention", "chunked_attention"]},
            "layers of type chunked_attention",
        ),
    ],
)
def test_models_that_cannot_be_refreshed_are_refused(settings, message):
    model = tiny_model(**settings)
    with pytest.raises(SettingsError, match=message):
        refreshkv.enable(model, FIXED)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "refreshkv")


def test_without_a_saved_config_one_must_be_given():
    model = tiny_model()
    with pytest.raises(SettingsError, match='no "refreshkv" in its config.json: pass config='):
        refreshkv.enable(model)
    with pytest.raises(SettingsError, match="pass refresh="):
        RefreshCache(model.config, 30)


def test_a_saved_config_is_checked():
    model = tiny_model()
    model.config.refreshkv = {"budget": 8, "strides": 5}
    with pytest.raises(SettingsError, match=r"unknown setting refreshkv\.strides; did you mean refreshkv\.stride\?"):
        refreshkv.enable(model)


@pytest.mark.parametrize("name", ["eager", "flash_attention", None])
def test_unknown_prompt_attentions_are_refused(name):
    with pytest.raises(SettingsError, match="prompt_attention must be one of sdpa, flash_attention_2"):
        refreshkv.enable(tiny_model(), FIXED, prompt_attention=name)


# ---- inputs that would be silently wrong


def mask_with(rows, columns, *holes):
    mask = torch.ones(rows, columns, dtype=torch.int64)
    for row, start, end in holes:
        mask[row, start:end] = 0
    return mask


@pytest.mark.parametrize("way", ["plain", "simulation", "cache"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mask_with(2, 20, (1, 17, 20)), 'set tokenizer.padding_side = "left"'),
        (mask_with(2, 20, (0, 5, 8)), "only left padding"),
        (mask_with(2, 20, (0, 0, 3), (0, 8, 9)), "only left padding"),
        (mask_with(2, 20, (1, 0, 20)), "a batch row is padding only"),
        (mask_with(2, 19), "attention_mask has 19 columns for 20 tokens"),
        (mask_with(1, 20)[None].expand(2, 1, 20, 20).bool().tril(), "not a prepared 4D mask"),
        (mask_with(1, 20)[None].expand(2, 1, 20, 20).double(), "not a prepared 4D mask"),
    ],
    ids=["right", "middle", "left and middle", "only", "short", "4D bool", "4D float"],
)
def test_masks_other_than_left_padding_are_refused(mask, message, way):
    model, ids = tiny_enabled(FIXED), random_ids(2, 20)
    extra = {
        "plain": {},
        "simulation": {"simulation": Simulation(10, FIXED)},
        "cache": {"past_key_values": RefreshCache(model.config, 30)},
    }[way]
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=mask, **extra)


def test_masks_that_change_while_decoding_are_refused():
    model, ids = tiny_enabled(FIXED), random_ids(2, 20)
    for cache in (RefreshCache(model.config, 30), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(ids[:, :19], past_key_values=cache)
            with pytest.raises(ValueError, match="only left padding"):
                model(ids[:, 19:], attention_mask=mask_with(2, 20, (0, 5, 6)), past_key_values=cache)


def test_a_prompt_of_padding_only_is_refused():
    model, ids = tiny_enabled(FIXED), random_ids(2, 20)
    with pytest.raises(SettingsError, match="prompt_length=10: a row of the batch has only padding there"):
        model(ids, attention_mask=mask_with(2, 20, (1, 0, 10)), simulation=Simulation(10, FIXED))


def test_packed_rows_are_refused():
    model, ids = tiny_enabled(FIXED), random_ids(2, 20)
    packed = torch.arange(10).repeat(2).expand(2, -1)
    for extra in ({}, {"simulation": Simulation(10, FIXED)}):
        with pytest.raises(ValueError, match="packed sequences and custom masks are not supported"):
            model(ids, position_ids=packed, use_cache=False, **extra)


def test_a_static_cache_is_refused():
    with pytest.raises(ValueError, match=f"no use for a static cache: pass {CACHE_NAME}=RefreshCache"):
        tiny_enabled(FIXED).generate(random_ids(1, 20), max_new_tokens=3, cache_implementation="static")


def test_a_simulation_takes_whole_rows():
    model, ids = tiny_enabled(FIXED), random_ids(2, 20)
    simulation = Simulation(10, FIXED)
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids, simulation=simulation, past_key_values=RefreshCache(model.config, 30))
    past = model(ids).past_key_values
    with pytest.raises(ValueError, match="takes whole rows: pass use_cache=False"):
        model(ids, simulation=simulation, past_key_values=past)
    with pytest.raises(SettingsError, match="prompt_length=21 is outside the row of 20 tokens"):
        model(ids, simulation=Simulation(21, FIXED))
    with torch.no_grad():
        assert torch.equal(model(ids, simulation=Simulation(20, FIXED)).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 0.1}, r"attention dropout \(0.1\) is not simulated"),
        ({"position_bias": torch.zeros(1)}, "uses position_bias"),
    ],
)
def test_other_kinds_of_softmax_are_refused(settings, message):
    module = tiny_enabled().model.layers[0].self_attn
    query, key = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    with pytest.raises(ValueError, match=message):
        refresh_attention(module, query, key, key, None, simulation=Simulation(10, FIXED), **settings)


# ---- flash attention for the prompt, with SDPA in the place of its two functions


def dense(query, key, value, softmax_scale, causal, window_size=None, **kwargs):
    """query (B, n, H, D), key and value (B, m, Hkv, D), the queries last: flash_attn_func's interface."""
    rows, columns = query.shape[1], key.shape[1]
    distance = torch.arange(columns - rows, columns).unsqueeze(-1) - torch.arange(columns)
    visible = distance >= 0 if causal else torch.ones(rows, columns, dtype=torch.bool)
    if window_size is not None:
        visible &= distance <= window_size[0]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, visible, scale=softmax_scale, enable_gqa=True)
    return output.transpose(1, 2)


def ragged(query, key, value, cu_seqlens_q, cu_seqlens_k, **kwargs):
    """The rows one after the other, without padding: flash_attn_varlen_func's interface."""
    bounds = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
    rows = [dense(query[None, a:b], key[None, c:d], value[None, c:d], **kwargs)[0] for a, b, c, d in bounds]
    return torch.cat(rows)


@pytest.fixture
def flash_calls(monkeypatch):
    """Lets transformers' flash path run here; gives the arguments it was called with."""
    utils, calls = modeling_flash_attention_utils, []
    functions = (dense, ragged, None, utils._pad_input, utils._unpad_input)
    keywords = utils._lazy_define_process_function(dense)
    original = flash_attention._flash_attention_forward

    def recorded(query, key, value, attention_mask, **kwargs):
        calls.append({"query": query, "key": key, "attention_mask": attention_mask, **kwargs})
        return original(query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda name: (functions, (keywords, keywords)))
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", recorded)
    return calls


@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flash_attention_for_the_prompt(flash_calls, settings, padding, dtype):
    model, expected_model = (
        refreshkv.enable(tiny_model(dtype=dtype, **settings), FIXED, prompt_attention=name)
        for name in ("flash_attention_2", "sdpa")
    )
    ids, mask = random_ids(2, 30), mask_with(2, 30, (1, 0, padding))
    extra = {"attention_mask": mask, "position_ids": padded_positions(mask)}
    tolerance = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-4}
    with torch.no_grad():
        for refresh in (None, Simulation(15, FIXED)):
            expected = expected_model(ids, simulation=refresh, **extra).logits
            assert not flash_calls
            found = model(ids, simulation=refresh, **extra).logits
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **tolerance)
            check_flash_calls(flash_calls, model, padding, prompt=30 if refresh is None else 15)
            flash_calls.clear()
        expected, _ = decode_logits(expected_model, ids, 15, FIXED, mask)
        found, _ = decode_logits(model, ids, 15, FIXED, mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **tolerance)
    turn(model, expected_model, ids, mask, tolerance)


def check_flash_calls(calls, model, padding, prompt):
    """Each layer gave the prompt's part of the row, the padding as a (B, P) mask, and flash attention's own name."""
    assert [call["layer_idx"] for call in calls] == list(range(len(model.model.layers)))
    for call in calls:
        columns = 30 if call["sliding_window"] else prompt
        assert call["query"].shape == (2, columns, 4, 8) and call["key"].shape == (2, columns, 2, 8)
        assert call["attn_implementation"] == "flash_attention_2" and call["is_causal"]
        if padding == 0:
            assert call["attention_mask"] is None
        else:
            assert call["attention_mask"].shape == (2, columns)
            assert (~call["attention_mask"]).sum(-1).tolist() == [0, padding]
    assert model.config._attn_implementation == "refreshkv"


@torch.no_grad()
def turn(model, expected_model, ids, mask, tolerance):
    """A second turn: fewer queries than keys."""
    logits = []
    for each in (model, expected_model):
        cache = RefreshCache(each.config, 30)
        for start, end in ((0, 15), (15, 16), (16, 17), (17, 24), (24, 30)):
            position_ids = padded_positions(mask)[:, start:end]
            output = each(
                ids[:, start:end], past_key_values=cache, attention_mask=mask[:, :end], position_ids=position_ids
            )
        logits.append(output.logits)
    torch.testing.assert_close(*logits, **tolerance)


# ---- gradients


def gradients(model, ids, **settings):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **settings).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            gradient, expected[1][name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("config", [FIXED, SIMILAR], ids=["fixed", "similarity"])
@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
def test_activation_checkpointing_gives_the_same_gradients(settings, config):
    model, ids = tiny_enabled(**settings).train(), random_ids(2, 40)
    mask = mask_with(2, 40, (1, 0, 6))
    extra = {"attention_mask": mask, "position_ids": padded_positions(mask), "simulation": Simulation(15, config)}
    expected = gradients(model, ids, **extra)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        assert_same_gradients(gradients(model, ids, **extra), expected, 1e-12)


@pytest.mark.parametrize("config", [FIXED, SIMILAR, SELECTING], ids=["fixed", "similarity", "selecting"])
@pytest.mark.parametrize("padding", [0, 4])
def test_gradients_are_those_of_the_paper_algorithm(config, padding):
    model, reference, ids = tiny_enabled(), tiny_model(), random_ids(2, 26)
    reference.set_attn_implementation(literal.NAME)
    mask = mask_with(2, 26, (1, 0, padding))
    extra = {"attention_mask": mask, "position_ids": padded_positions(mask)}
    found = gradients(model, ids, simulation=Simulation(11, config), **extra)
    expected = gradients(reference, ids, blocks=[(0, 11)], config=config, **extra)
    assert_same_gradients(found, expected, 1e-10)


@pytest.mark.parametrize("recurring", [False, True])
def test_only_recurring_shapes_may_go_to_cudnn(monkeypatch, recurring):
    """The simulation says so, alike for all layers of a pass and for those that are recomputed."""
    seen = []

    def refresh_rows(query, key, value, plan, options, scaling, terms):
        seen.append(plan.recurring)
        return naive.refresh_rows(query, key, value, plan, options, scaling, terms)

    monkeypatch.setattr(attention.ops, "refresh_rows", refresh_rows)
    model, ids = tiny_enabled().train(), random_ids(2, 40)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    simulation = Simulation(21, FIXED, recurring=recurring)
    model(ids, labels=ids, simulation=simulation, use_cache=False).loss.backward()
    assert seen == [recurring] * 4


@pytest.mark.parametrize("padding", [0, 7])
def test_a_prompt_computed_beyond_its_end(monkeypatch, padding):
    """As on GPUs, up to a length that comes more often: the further rows leave no trace."""
    model, ids, mask = tiny_enabled(), random_ids(2, 40), mask_with(2, 40, (1, 0, padding))
    extra = {"attention_mask": mask, "position_ids": padded_positions(mask), "simulation": Simulation(21, SIMILAR)}
    expected = gradients(model, ids, **extra)
    monkeypatch.setattr(attention, "computed_length", lambda query, prompt: 32)
    assert_same_gradients(gradients(model, ids, **extra), expected, 1e-12)


def test_a_trace_is_the_same_after_recomputation():
    model, ids, trace = tiny_enabled().train(), random_ids(2, 40), Trace()
    model.gradient_checkpointing_enable()
    loss = model(ids, labels=ids, simulation=Simulation(15, SIMILAR), trace=trace, use_cache=False).loss
    before = {layer: flags.clone() for layer, flags in trace.full_steps.items()}
    loss.backward()
    assert before.keys() == {0, 1}
    assert all(torch.equal(flags, trace.full_steps[layer]) for layer, flags in before.items())
