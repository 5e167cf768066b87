"""generate() with a RefreshCache, the cache itself, and launch/generate.py."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.generation import BaseStreamer

import refreshkv
from refreshkv import NEVER, RefreshCache, RefreshConfig, Simulation, decode_ahead
from refreshkv.settings import SettingsError
from tests.helpers import literal
from tests.helpers.models import (
    FAMILIES,
    VOCABULARY,
    decode_logits,
    padded_positions,
    random_ids,
    tiny_enabled,
    tiny_model,
)
from tests.helpers.scripts import load_script

FIXED = RefreshConfig(budget=6, stride=4)
SIMILAR = RefreshConfig(
    budget=0.3, stride=3, threshold=0.1, observation_window=4, recent_window=2, sink_tokens=1, pool_kernel=3
)
SELECTING = RefreshConfig(budget=6, stride=NEVER, select_stride=2, score_bits=4, pool_ahead=True)
BOTH = RefreshConfig(budget=0.3, stride=3, threshold=0.1, observation_window=4, select_stride=2, score_bits=8)
BESIDE = RefreshConfig(budget=6, stride=4, select_stride=3, score_bits=4)
BEYOND = RefreshConfig(budget=1000, stride=4)
SLIDING = {
    "family": "qwen2",
    "layers": 3,
    "sliding_window": 12,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}


def generate(model, ids, config=None, new=12, cache=None, **settings):
    """Sequences, or generate()'s whole output where `settings` ask for it. No token ends a text unless told."""
    if cache is None and config is not None:
        cache = RefreshCache(model.config, 200, config)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": new, "past_key_values": cache} | settings
    return model.generate(ids, attention_mask=settings.pop("attention_mask", torch.ones_like(ids)), **settings)


def left_padded(ids, paddings):
    mask = torch.ones_like(ids)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def simulated_logits(model, ids, prompt, config, mask=None):
    """Logits that chose the tokens after the prompt: (B, T-P, V) by the parallel form."""
    extra = {} if mask is None else {"attention_mask": mask, "position_ids": padded_positions(mask)}
    return model(ids, simulation=Simulation(prompt, config), use_cache=False, **extra).logits[:, prompt - 1 : -1]


def grown(mask, columns):
    return torch.nn.functional.pad(mask, (0, columns - mask.shape[1]), value=1)


# ---- what generate() returns


@pytest.mark.parametrize("config", [FIXED, SIMILAR], ids=["fixed", "similarity"])
@pytest.mark.parametrize("settings", [*({"family": family} for family in FAMILIES), SLIDING])
def test_greedy_search_takes_the_likeliest_token_of_the_parallel_form(settings, config):
    model, ids = tiny_enabled(**settings), random_ids(2, 20)
    by_hand = ids
    for _ in range(12):
        placeholder = by_hand[:, -1:]
        logits = simulated_logits(model, torch.cat([by_hand, placeholder], dim=1), 20, config)
        by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, ids, config), by_hand)
    assert not torch.equal(by_hand, generate(model, ids)), "full attention says the same: the test shows nothing"


@pytest.mark.parametrize("config", [FIXED, SIMILAR], ids=["fixed", "similarity"])
def test_sampling_draws_from_the_logits_of_the_parallel_form(config):
    model, ids = tiny_enabled(), random_ids(2, 20)
    torch.manual_seed(1)
    output = generate(
        model, ids, config, do_sample=True, num_return_sequences=2, return_dict_in_generate=True, output_logits=True
    )
    assert output.sequences.shape == (4, 32)
    expected = simulated_logits(model, output.sequences, 20, config)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected.float(), rtol=0, atol=1e-5)


def test_a_seed_gives_the_same_tokens_as_the_plain_model():
    plain, model, ids = tiny_model(), tiny_enabled(), random_ids(2, 20)
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 3}
    torch.manual_seed(2)
    expected = generate(plain, ids, **settings)
    torch.manual_seed(2)
    assert torch.equal(generate(model, ids, BEYOND, **settings), expected)


class Collector(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended += 1


def test_a_streamer_gets_each_token_once():
    model, ids, streamer = tiny_enabled(), random_ids(1, 20), Collector()
    sequences = generate(model, ids, FIXED, streamer=streamer)
    assert torch.equal(torch.cat(streamer.parts), sequences[0])
    assert [len(part) for part in streamer.parts] == [20] + [1] * 12 and streamer.ended == 1


@pytest.mark.parametrize("config", [FIXED, SIMILAR], ids=["fixed", "similarity"])
@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
def test_left_padded_prompts_give_the_same_tokens_as_each_alone(settings, config):
    model, paddings = tiny_enabled(**settings), [0, 7, 19]
    ids, mask = left_padded(random_ids(3, 20), paddings)
    together = generate(model, ids, config, attention_mask=mask)
    for row, padding in enumerate(paddings):
        alone = generate(model, ids[row : row + 1, padding:], config)
        assert torch.equal(together[row, padding:], alone[0])


def test_rows_of_a_batch_end_at_different_times():
    model, (ids, mask) = tiny_enabled(), left_padded(random_ids(3, 20, seed=1), [0, 5, 9])
    free = generate(model, ids, SIMILAR, attention_mask=mask)[:, 20:]
    ends = free[0, 3].item()
    stops = [row.index(ends) if ends in row else len(row) for row in free.tolist()]
    assert len(set(stops)) > 1, "all rows end together: the test shows nothing"
    ended = generate(model, ids, SIMILAR, attention_mask=mask, eos_token_id=ends, pad_token_id=0)[:, 20:]
    for row, stop in enumerate(stops):
        assert torch.equal(ended[row, : stop + 1], free[row, : stop + 1])
        assert (ended[row, stop + 1 :] == 0).all()


@pytest.mark.parametrize(
    "config", [FIXED, RefreshConfig(budget=6, stride=3, threshold=0.1)], ids=["fixed", "similarity"]
)
def test_beam_search_follows_the_parallel_form(config):
    """The score of each beam is that of its own tokens: a cache whose rows were mixed up would have another."""
    model, ids = tiny_enabled(), random_ids(2, 20)
    output = generate(
        model,
        ids,
        config,
        num_beams=4,
        num_return_sequences=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = output.sequences[:, 20:]
    log_probabilities = simulated_logits(model, output.sequences, 20, config).log_softmax(-1)
    expected = log_probabilities.gather(-1, new.unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(output.sequences_scores, expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
def test_beam_search_beyond_the_budget_equals_the_plain_model(settings):
    plain, model = tiny_model(**settings), tiny_enabled(**settings)
    ids, mask = left_padded(random_ids(2, 20), [0, 6])
    expected = generate(plain, ids, attention_mask=mask, num_beams=3)
    assert torch.equal(generate(model, ids, BEYOND, attention_mask=mask, num_beams=3), expected)


def test_a_prompt_of_one_token():
    model, ids = tiny_enabled(), random_ids(2, 1)
    output = generate(model, ids, FIXED, return_dict_in_generate=True, output_logits=True)
    expected = simulated_logits(model, output.sequences, 1, FIXED)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected.float(), rtol=0, atol=1e-5)


def test_prompts_given_as_embeddings():
    model, ids = tiny_enabled(), random_ids(2, 20)
    embeddings = model.get_input_embeddings()(ids).detach()
    cache = RefreshCache(model.config, 40, SIMILAR)
    new = model.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(new, generate(model, ids, SIMILAR)[:, 20:])


def test_a_padding_token_inside_a_text_needs_a_mask():
    """Without a mask, transformers takes the token for padding. A model may generate it too."""
    model, ids = tiny_enabled(), random_ids(2, 20)
    ids[0, 8] = model.generation_config.pad_token_id
    with pytest.raises(ValueError, match=r"attention_mask=torch\.ones_like\(input_ids\)"):
        generate(model, ids, FIXED, attention_mask=None)
    output = generate(model, ids, FIXED, return_dict_in_generate=True, output_logits=True)
    expected = simulated_logits(model, output.sequences, 20, FIXED)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected.float(), rtol=0, atol=1e-5)


def test_bfloat16():
    model, ids = tiny_enabled(dtype=torch.bfloat16), random_ids(2, 20)
    cache = RefreshCache(model.config, 40, SIMILAR)
    output = generate(model, ids, cache=cache, return_dict_in_generate=True, output_logits=True)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert output.sequences.shape == (2, 32) and torch.stack(output.logits).isfinite().all()


# ---- several turns, prompts in chunks, reset


@pytest.mark.parametrize(
    "config",
    [FIXED, SIMILAR, RefreshConfig(budget=5, stride=NEVER), SELECTING, BOTH],
    ids=["fixed", "sim", "never", "selecting", "both"],
)
@pytest.mark.parametrize("paddings", [(0, 0), (0, 6)], ids=["even", "padded"])
def test_a_second_and_a_third_turn_are_new_prompt_blocks(config, paddings):
    model, reference = tiny_enabled(), tiny_model()
    ids, mask = left_padded(random_ids(2, 14), paddings)
    cache, blocks, logits = RefreshCache(model.config, 60, config), [(0, 14)], []
    for turn in range(3):
        if turn > 0:
            blocks.append((cache.get_seq_length(), ids.shape[1] + 4))
            ids = torch.cat([ids, random_ids(2, 4, seed=turn)], dim=1)
        output = generate(
            model,
            ids,
            cache=cache,
            new=7,
            attention_mask=grown(mask, ids.shape[1]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits.append((ids.shape[1] - 1, torch.stack(output.logits, dim=1)))
        ids = output.sequences
    mask = grown(mask, ids.shape[1])
    reference.set_attn_implementation(literal.NAME)
    with torch.no_grad():
        expected = reference(
            ids, attention_mask=mask, position_ids=padded_positions(mask), blocks=blocks, config=config, use_cache=False
        ).logits.float()
    for start, found in logits:
        torch.testing.assert_close(found, expected[:, start : start + 7], rtol=0, atol=1e-5)


def test_turns_with_a_sliding_window_equal_the_plain_model_beyond_the_budget():
    plain, model = tiny_model(**SLIDING), tiny_enabled(**SLIDING)
    ids, cache = random_ids(2, 14), RefreshCache(model.config, 60, BEYOND)
    for turn in range(3):
        ids = torch.cat([generate(model, ids, cache=cache, new=7), random_ids(2, 4, seed=turn)], dim=1)
    with torch.no_grad():
        expected, found = plain(ids).logits, model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [2, 7, 19, 100])
@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
def test_a_prompt_in_chunks_equals_a_prompt_at_once(settings, chunk):
    model, config = tiny_enabled(**settings), RefreshConfig(budget=6, stride=4, observation_window=5)
    ids, mask = left_padded(random_ids(2, 28), [0, 1])
    expected = generate(model, ids, config, attention_mask=mask)
    assert torch.equal(generate(model, ids, config, attention_mask=mask, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("loop", [None, decode_ahead])
@pytest.mark.parametrize(
    ("length", "chunk", "padding", "settings", "offload"),
    [
        (21, 4, 0, {}, False),
        (20, 19, 3, {}, False),
        (6, 1, 0, {}, False),
        (21, 4, 3, SLIDING, False),
        (20, 19, 3, SLIDING, True),
        (21, 4, 0, {}, True),
    ],
)
def test_a_chunk_of_one_token_belongs_to_the_prompt(length, chunk, padding, settings, offload, loop):
    """It looks like a decoding step; in another turn too."""
    model, (ids, mask) = tiny_enabled(**settings), left_padded(random_ids(2, length), [0, padding])
    caches = [RefreshCache(model.config, 100, FIXED, offload=offload) for _ in range(2)]
    for turn in range(2):
        found, expected = (
            generate(model, ids, cache=cache, attention_mask=grown(mask, ids.shape[1]), custom_generate=loop, **chunks)
            for cache, chunks in zip(caches, ({"prefill_chunk_size": chunk}, {}), strict=True)
        )
        assert torch.equal(found, expected)
        steps = slice(ids.shape[1] - 1, None)  # each chunk before ends in a full step too
        assert torch.equal(caches[0].full_steps[..., steps], caches[1].full_steps[..., steps])
        if turn == 0:  # the last token is not in the cache yet
            ids = torch.cat([expected, random_ids(2, 2 * chunk, seed=turn)], dim=1)


def test_a_single_token_without_chunks_is_a_step():
    """Going on with what was generated, a call of generate() for each token."""
    model, ids = tiny_enabled(), random_ids(2, 20)
    expected, cache = generate(model, ids, FIXED), RefreshCache(model.config, 60, FIXED)
    for _ in range(12):
        ids = generate(model, ids, cache=cache, new=1)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("given", [None, (0, 0), (0, 5)])
def test_a_turn_comes_with_the_padding_of_those_before(given):
    model = tiny_enabled()
    ids, mask = left_padded(random_ids(2, 14), (0, 6))
    cache = RefreshCache(model.config, 60, FIXED)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=padded_positions(mask), past_key_values=cache)
        mask = None if given is None else left_padded(torch.ones(2, 18, dtype=torch.int64), given)[1]
        with pytest.raises(
            ValueError, match=r"hides \[0, .\] tokens .* in the RefreshCache \[0, 6\]: it covers the cached"
        ):
            model(random_ids(2, 4), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_after_a_reset_nothing_is_left(settings, rows):
    model = tiny_enabled(**settings)
    cache = RefreshCache(model.config, 60, SIMILAR)
    generate(model, random_ids(2, 10, seed=1), cache=cache, new=40)
    cache.reset()
    assert cache.get_seq_length() == 0
    ids, mask = left_padded(random_ids(rows, 20, seed=2), [4, 0, 9][:rows])
    fresh = RefreshCache(model.config, 60, SIMILAR)
    expected = generate(model, ids, cache=fresh, attention_mask=mask)
    assert torch.equal(generate(model, ids, cache=cache, attention_mask=mask), expected)
    assert torch.equal(cache.full_steps, fresh.full_steps)


@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
def test_a_cache_outlives_the_mode_it_was_first_used_in(settings):
    model, ids = tiny_enabled(**settings), random_ids(2, 20)
    expected = generate(model, ids, SIMILAR)
    cache = RefreshCache(model.config, 60, SIMILAR)
    with torch.inference_mode():
        assert torch.equal(generate(model, ids, cache=cache), expected)
    cache.reset()
    assert torch.equal(generate(model, ids, cache=cache), expected)


def test_a_reset_lets_go_of_what_led_to_the_buffers():
    model, cache = tiny_enabled(), RefreshCache(tiny_model().config, 60, FIXED)
    model(random_ids(2, 30), past_key_values=cache)
    model(random_ids(2, 1), past_key_values=cache)
    assert cache.layers[0].keys.grad_fn is not None
    cache.reset()
    states = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert not any(state.requires_grad for state in states)


def test_a_reset_keeps_buffers_that_fit():
    model = tiny_enabled()
    cache = RefreshCache(model.config, 60, FIXED)
    generate(model, random_ids(2, 30), cache=cache)
    before = cache.layers[0].keys.data_ptr()
    cache.reset()
    generate(model, random_ids(2, 20), cache=cache)
    assert cache.layers[0].keys.data_ptr() == before
    cache.reset()
    generate(model, random_ids(3, 20), cache=cache)
    assert cache.layers[0].keys.shape == (3, 2, 60, 8)


# ---- the cache


def test_full_steps_of_a_fixed_schedule():
    model = tiny_enabled(**SLIDING)
    cache = RefreshCache(model.config, 60, FIXED)
    generate(model, random_ids(2, 20), cache=cache, new=14)
    assert cache.full_steps.shape == (3, 2, 33)
    sliding, *full = cache.full_steps
    assert not sliding.any()
    for layer in full:
        assert [row.nonzero().flatten().tolist() for row in layer] == [[19, 23, 27, 31]] * 2


def test_an_empty_cache_has_no_full_steps():
    with pytest.raises(ValueError, match="full_steps: the cache is empty"):
        _ = RefreshCache(tiny_model().config, 60, FIXED).full_steps


def tensors_of(layer):
    return {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}


def test_the_cache_grows_nothing_per_token():
    """All memory is there after the prompt: key/value heads only, buffers that stay where they are, no lists."""
    config = RefreshConfig(budget=6, stride=4, observation_window=3)
    model, ids = tiny_enabled(config, groups=4), random_ids(2, 80)
    cache, seen = RefreshCache(model.config, 80), []
    with torch.no_grad():
        for start, end in [(0, 20), *((end - 1, end) for end in range(21, 81))]:
            model(ids[:, start:end], past_key_values=cache)
            layer = cache.layers[0]
            storages = {name: tensor.untyped_storage().nbytes() for name, tensor in tensors_of(layer).items()}
            seen.append((storages, layer.keys.data_ptr(), layer.values.data_ptr(), sorted(vars(layer))))
    assert all(state == seen[0] for state in seen)
    assert layer.keys.shape == layer.values.shape == (2, 1, 80, 8)
    assert layer.observers.shape == (2, 4, 3, 8)
    assert not any(isinstance(value, (list, dict, set)) for value in vars(layer).values())
    small = sum(size for name, size in seen[0][0].items() if name not in ("keys", "values"))
    assert small < 4000, "state of a layer beside the keys and values"


def test_a_full_cache_says_so():
    model = tiny_enabled()
    with pytest.raises(ValueError, match="RefreshCache is full: 26 tokens, but max_cache_len=25"):
        generate(model, random_ids(2, 20), cache=RefreshCache(model.config, 25, FIXED))


def test_another_number_of_rows_needs_a_reset():
    model, ids = tiny_enabled(), random_ids(2, 20)
    cache = RefreshCache(model.config, 60, FIXED)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds 2 rows and was given 1: call reset"):
            model(ids[:1, :1], past_key_values=cache)


@pytest.mark.parametrize("tokens", [1, 3], ids=["step", "turn"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 4}, "holds 2 key/value heads and was given 1: call reset"),
        ({"head_dim": 16}, "holds 8 numbers a head and was given 16: call reset"),
        ({"dtype": torch.float32}, "holds torch.float64 as keys and was given torch.float32: call reset"),
    ],
)
def test_another_shape_of_model_needs_a_reset(settings, message, tokens):
    model, other, ids = tiny_enabled(), tiny_enabled(**settings), random_ids(2, 20)
    cache = RefreshCache(model.config, 60, FIXED)
    expected = generate(other, ids, FIXED)
    generate(model, ids, cache=cache)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        other(ids[:, :tokens], past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(other, ids, cache=cache), expected)


@pytest.mark.parametrize("offload", [False, True])
def test_a_reset_forgets_the_types_of_autocast(offload):
    model, ids = tiny_enabled(dtype=torch.float32), random_ids(2, 20)
    caches = [RefreshCache(model.config, 100, FIXED, offload=offload) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(ids, past_key_values=caches[0])
    caches[0].reset()
    with torch.no_grad():
        found, expected = (model(ids, past_key_values=cache).logits for cache in caches)
    assert torch.equal(found, expected) and caches[0].layers[0].values.dtype == torch.float32


@pytest.mark.parametrize("decoded", [0, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_after_an_error_within_the_model_the_cache_wants_a_reset(decoded, offload):
    """As when memory runs out: the first layer has taken the tokens, the others have not."""
    model, ids = tiny_enabled(layers=3), random_ids(2, 20)
    expected = generate(model, ids, FIXED)
    cache = RefreshCache(model.config, 60, FIXED, offload=offload)
    if decoded:
        generate(model, ids, cache=cache, new=decoded)

    def fail(*args):
        raise torch.OutOfMemoryError("no memory left")

    hook = model.model.layers[0].mlp.register_forward_hook(fail)
    tokens = ids[:, :1] if decoded else ids
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        model(tokens, past_key_values=cache)
    hook.remove()
    for again in (ids[:, :1], ids):
        with pytest.raises(RuntimeError, match="some layers .* call reset"), torch.no_grad():
            model(again, past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(model, ids, cache=cache), expected)


@pytest.mark.parametrize("loop", [None, decode_ahead])
def test_a_cache_that_is_not_to_be_used_is_refused(loop):
    with pytest.raises(ValueError, match="use_cache=False and a RefreshCache exclude each other"):
        generate(tiny_enabled(), random_ids(2, 20), FIXED, use_cache=False, custom_generate=loop)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_model_that_was_not_enabled_says_so(settings):
    with pytest.raises(RuntimeError, match="call refreshkv.enable"):
        generate(tiny_model(), random_ids(1, 20), FIXED, **settings)


@pytest.mark.parametrize(
    "settings", [{"assistant_model": True}, {"prompt_lookup_num_tokens": 3}], ids=["model", "lookup"]
)
def test_assisted_generation_is_refused(settings):
    if "assistant_model" in settings:
        settings = {"assistant_model": tiny_model(seed=1)}
    with pytest.raises(NotImplementedError, match="without an assistant"):
        generate(tiny_enabled(), random_ids(1, 20), FIXED, **settings)


@pytest.mark.parametrize("length", [0, -1, 2.5, True, None])
def test_max_cache_len_must_be_a_number_of_tokens(length):
    with pytest.raises(SettingsError, match="max_cache_len must be a whole number >= 1"):
        RefreshCache(tiny_model().config, length, FIXED)


def test_the_older_spelling_of_a_cache_still_works():
    model_config = tiny_enabled(SIMILAR).config
    for arguments, settings in (
        ((model_config, 60), {"config": FIXED}),
        ((), {"model_config": model_config, "max_cache_len": 60, "config": FIXED}),
    ):
        with pytest.warns(DeprecationWarning, match=r"config=model.config, refresh=RefreshConfig"):
            assert RefreshCache(*arguments, **settings).config == FIXED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RefreshCache(model_config, 60, FIXED).config == FIXED
        assert RefreshCache(config=model_config, refresh=FIXED, max_cache_len=60).config == FIXED
        assert RefreshCache(config=model_config, max_cache_len=60).config == SIMILAR
    with pytest.raises(SettingsError, match="RefreshCache needs config=model.config"):
        RefreshCache(max_cache_len=60)


@pytest.mark.parametrize("config", [FIXED, SIMILAR, SELECTING, BOTH], ids=["fixed", "similarity", "selecting", "both"])
@torch.no_grad()
def test_the_last_step_can_be_taken_back(config):
    """By transformers' own protocol: recording, crop(0) after each accepted step, crop(-1)."""
    model, ids = tiny_enabled(), random_ids(2, 40)
    expected, wanted = decode_logits(model, ids, 20, config)
    cache = RefreshCache(model.config, 60, config)
    assert cache.is_croppable
    model(ids[:, :20], past_key_values=cache)
    for position in range(20, 40):
        cache.activate_past_recording()
        model(random_ids(2, 1, seed=position), past_key_values=cache)
        cache.crop(-1)
        cache.activate_past_recording()
        logits = model(ids[:, position : position + 1], past_key_values=cache).logits
        cache.crop(0)
        torch.testing.assert_close(logits, expected[:, position : position + 1], rtol=0, atol=1e-10)
    assert torch.equal(cache.full_steps, wanted.full_steps)
    assert torch.equal(cache.selecting_steps, wanted.selecting_steps)
    for tokens in (-2, 1):
        with pytest.raises(NotImplementedError, match="cannot take tokens back"):
            cache.crop(tokens)
    model(random_ids(2, 3), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot take tokens back"):
        cache.crop(0)
    offloaded = RefreshCache(model.config, 60, config, offload=True)
    assert not offloaded.is_croppable
    with pytest.raises(NotImplementedError, match="cannot take tokens back"):
        offloaded.activate_past_recording()


@pytest.mark.parametrize("config", [SIMILAR, BOTH], ids=["similarity", "both"])
def test_rows_of_the_cache_can_be_repeated_and_selected(config):
    model, ids = tiny_enabled(), random_ids(2, 30)
    expected, _ = decode_logits(model, ids.repeat_interleave(2, dim=0)[[3, 0]], 20, config)
    cache = RefreshCache(model.config, 60, config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        for position in range(20, 25):
            rows = ids.repeat_interleave(2, dim=0)[:, position : position + 1]
            model(rows, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([3, 0]))
        found = [
            model(ids[[1, 0], position : position + 1], past_key_values=cache).logits for position in range(25, 30)
        ]
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 25:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_a_copy_of_a_cache_with_selecting_steps_goes_on(duplicate):
    model, ids = tiny_enabled(), random_ids(2, 40)
    expected, wanted = decode_logits(model, ids, 20, BOTH)
    cache = RefreshCache(model.config, 40, BOTH)
    for start, end in [(0, 20), *((end - 1, end) for end in range(21, 30))]:
        model(ids[:, start:end], past_key_values=cache)
    cache = duplicate(cache)
    found = [model(ids[:, end - 1 : end], past_key_values=cache).logits for end in range(30, 41)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 29:], rtol=0, atol=1e-10)
    assert torch.equal(cache.selecting_steps, wanted.selecting_steps) and cache.selecting_steps.any()


@pytest.mark.parametrize(("chunk", "padding"), [(1, 0), (7, 5), (19, 5)])
@pytest.mark.parametrize("config", [SELECTING, BOTH], ids=["selecting", "both"])
def test_a_prompt_in_chunks_with_selecting_steps(config, chunk, padding):
    model, (ids, mask) = tiny_enabled(), left_padded(random_ids(2, 28), [0, padding])
    expected = generate(model, ids, config, attention_mask=mask)
    cache = RefreshCache(model.config, 200, config)
    for _ in range(2):
        found = generate(model, ids, cache=cache, attention_mask=mask, prefill_chunk_size=chunk)
        assert torch.equal(found, expected)
        cache.reset()


def test_a_cache_without_selecting_steps_has_none():
    _, cache = decode_logits(tiny_enabled(), random_ids(2, 30), 20, FIXED)
    assert cache.selecting_steps.shape == cache.full_steps.shape and not cache.selecting_steps.any()
    with pytest.raises(ValueError, match="selecting_steps: the cache is empty"):
        _ = RefreshCache(tiny_model().config, 60, SELECTING).selecting_steps


# ---- the model beside its cache


@pytest.mark.parametrize("settings", [*({"family": family} for family in FAMILIES), SLIDING])
def test_without_refresh_an_enabled_model_is_the_plain_one(settings):
    plain, model = tiny_model(**settings), tiny_enabled(**settings)
    ids, mask = left_padded(random_ids(2, 30), [0, 8])
    extra = {"attention_mask": mask, "position_ids": padded_positions(mask)}
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-12)
        found, expected = model(ids, **extra).logits, plain(ids, **extra).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-12)
    assert torch.equal(generate(model, ids, attention_mask=mask), generate(plain, ids, attention_mask=mask))
    assert torch.equal(generate(model, ids, use_cache=False), generate(plain, ids))


def test_an_enabled_model_is_saved_and_read_back(tmp_path):
    model, ids = tiny_enabled(SIMILAR), random_ids(2, 20)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = refreshkv.enable(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    cache = RefreshCache(loaded.config, 60)
    assert cache.config == SIMILAR
    assert torch.equal(generate(loaded, ids, cache=cache), generate(model, ids, SIMILAR))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_enabled_model_is_enabled(duplicate):
    model, ids = tiny_enabled(SIMILAR), random_ids(2, 20)
    duplicated = duplicate(model)
    assert torch.equal(generate(duplicated, ids, SIMILAR), generate(model, ids, SIMILAR))


# ---- launch/generate.py


@pytest.fixture(scope="module")
def script():
    return load_script("generate")


def letters_tokenizer(size=VOCABULARY):
    """Token 3 is chr(35), and so on: every letter a token; 0 to 2 are the special ones."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(32 + token): token for token in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model with its schedule, its tokenizer and a prompt file."""
    path = tmp_path_factory.mktemp("model")
    tiny_enabled(FIXED, dtype=torch.float32, **SLIDING).save_pretrained(path)
    letters_tokenizer().save_pretrained(path)
    (path / "prompt.txt").write_text("ABCDEFGHIJKLMNOPQRST")
    return path


def arguments(folder, *more):
    return ["--model", str(folder), "--prompt-file", str(folder / "prompt.txt"), "--max-new-tokens", "14", *more]


def expected_text(folder, config, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if config is not None:
        refreshkv.enable(model, config)
    ids = torch.tensor([[ord(letter) - 32 for letter in "ABCDEFGHIJKLMNOPQRST"]])
    new = generate(model, ids, config, new=14, eos_token_id=2, **settings)[0, 20:]
    return "".join(chr(32 + token) for token in new.tolist() if token > 2)


def test_the_script_uses_the_saved_schedule(script, folder, capsys):
    script.main(arguments(folder))
    text, table = capsys.readouterr().out.split("\n\n")
    assert text == expected_text(folder, FIXED)
    rows = dict(row.split("  ", 1) for row in table.strip().splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert (rows["prompt tokens"], rows["new tokens"], rows["K, tokens in the small cache"]) == ("20", "14", "6")
    assert rows["layer 0"] == "sliding window"
    assert rows["layers 1-2"] == "3 full steps of 13, effective stride 4.3"
    assert float(rows["seconds for the prompt"]) >= 0 and float(rows["tokens/s"]) > 0


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (["--budget", "3", "--stride", "2"], RefreshConfig(budget=3, stride=2)),
        (["--budget", "0.25", "--threshold", "0.5"], RefreshConfig(budget=0.25, stride=4, threshold=0.5)),
        (["--stride", "50", "--threshold", "none"], RefreshConfig(budget=6, stride=50)),
        (["--full"], None),
        (["--offload"], FIXED),
        (["refresh.stride=2", "refresh.recent_window=3"], RefreshConfig(budget=6, stride=2, recent_window=3)),
        (["refresh.select_stride=3", "refresh.score_bits=4"], BESIDE),
    ],
)
def test_the_script_takes_options(script, folder, capsys, options, config):
    script.main(arguments(folder, *options))
    text, table = capsys.readouterr().out.split("\n\n")
    assert text == expected_text(folder, config)
    assert ("never refreshed" in table) == ("50" in options)
    assert ("effective stride 4.3, 3 selecting steps" in table) == (config == BESIDE)
    assert ("K, tokens in the small cache" in table) == ("--full" not in options)


def test_the_script_samples_with_a_seed(script, folder, capsys):
    script.main(arguments(folder, "--sample", "--seed", "3", "--temperature", "2.0", "--top-p", "0.9"))
    text = capsys.readouterr().out.split("\n\n")[0]
    torch.manual_seed(3)
    assert text == expected_text(folder, FIXED, do_sample=True, temperature=2.0, top_p=0.9)


def test_the_script_reads_standard_input(script, folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ABCDEFGHIJKLMNOPQRST"))
    script.main(["--model", str(folder), "--prompt-file", "-", "--max-new-tokens", "14", "--budget", "100"])
    text, table = capsys.readouterr().out.split("\n\n")
    assert text == expected_text(folder, BEYOND)
    assert "the context never grew beyond it" in table


def test_the_script_without_a_saved_schedule_uses_the_paper_one(script, folder, tmp_path, capsys):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text("ABCDEFGHIJKLMNOPQRST")
    script.main(arguments(tmp_path))
    assert capsys.readouterr().out.split("\n\n")[0] == expected_text(tmp_path, RefreshConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-file", "nowhere.txt"], "--prompt-file: there is no file nowhere.txt"),
        (["--prompt-file", "."], "--prompt-file: . is a folder, not a file"),
        (["--prompt-file", "/dev/null"], "--prompt-file: /dev/null is a device, not a file"),
        (["--model", "./nowhere"], "--model: no tokenizer could be loaded from ./nowhere"),
        (["--max-new-tokens", "500"], "--max-new-tokens=500 and the prompt's 20 tokens .*max_position_embeddings=512"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--budget", "0"], "budget must be"),
        (["--budget", "1.5"], "budget=1.5 is a fraction"),
        (["--stride", "0"], "stride must be"),
        (["--full", "--stride", "3"], "--stride means nothing with --full"),
        (["--full", "--offload"], "--offload means nothing with --full"),
        (["--full", "--tuned"], "--tuned compiles the step, and --full does not: leave one out"),
        (["--offload", "--tuned"], "--tuned compiles the step, and --offload does not: leave one out"),
        (["--tuned", "--device", "cpu"], "--tuned compiles for a GPU, and the model is on the cpu"),
        (["--top-p", "0.5"], "--top-p needs --sample"),
        (["--sample", "--top-p", "2"], "--top-p must be"),
        (["--sample", "--temperature", "0"], "--temperature must be at least 0.0001"),
        (["--full", "refresh.stride=3"], "refresh.key=value means nothing with --full"),
        (["refresh.strid=3"], "unknown setting refresh.strid; did you mean refresh.stride?"),
    ],
)
def test_the_script_refuses_in_one_line(script, folder, options, message):
    with pytest.raises(SettingsError, match=message):
        script.main(arguments(folder, *options))


def test_the_script_refuses_a_dtype_that_there_is_not(script, folder, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments(folder, "--dtype", "float99"))
    assert "argument --dtype: invalid choice: 'float99'" in capsys.readouterr().err


def test_the_script_refuses_a_model_without_a_tokenizer_or_with_another_one(script, folder, tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text("ABC Z")
    with pytest.raises(SettingsError, match="no tokenizer could be loaded"):
        script.main(arguments(tmp_path))
    letters_tokenizer(size=70).save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text("ABC" + chr(32 + 69))
    with pytest.raises(SettingsError, match="its tokenizer gives token 69, but the model has only 61"):
        script.main(arguments(tmp_path))
