"""decode_ahead against transformers' own loop: the same tokens, scores and caches.

`run_ahead=True` forces on a CPU what is the default on a GPU: the end is read one step late, and the step that was too
many is taken back.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    MaxTimeCriteria,
    StaticCache,
    StoppingCriteria,
    StopStringCriteria,
)

from refreshkv import NEVER, RefreshCache, RefreshConfig, decode_ahead
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.h2o import H2OCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from tests.generation.test_generate import SLIDING, Collector, left_padded, letters_tokenizer
from tests.helpers.marks import slow_unless
from tests.helpers.models import random_ids, tiny_enabled, tiny_model

FIXED = RefreshConfig(budget=6, stride=4)
SIMILAR = RefreshConfig(budget=0.3, stride=3, threshold=0.1, observation_window=4, recent_window=2)
CACHES = {
    "fixed": lambda config: RefreshCache(config, 90, FIXED),
    "every step": lambda config: RefreshCache(config, 90, RefreshConfig(budget=6, stride=1, observation_window=3)),
    "similarity": lambda config: RefreshCache(config, 90, SIMILAR),
    "never": lambda config: RefreshCache(config, 90, RefreshConfig(budget=6, stride=NEVER)),
    "offloaded": lambda config: RefreshCache(config, 90, FIXED, offload=True),
    "full": lambda config: FullCache(config, 90),
    "streaming": lambda config: StreamingCache(config, 90, 8),
    "h2o": lambda config: H2OCache(config, 90, 8),
    "snapkv": lambda config: SnapKVCache(config, 90, 8),
}
OURS = {"custom_generate": decode_ahead, "run_ahead": True}


def generate(model, ids, cache, **settings):
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 16} | settings
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)


def both(model, ids, make_cache, **settings):
    """Whole outputs of transformers' loop and of ours, with scores and logits, each with a cache of its own."""
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True} | settings
    outputs = []
    for loop in ({}, OURS):
        torch.manual_seed(5)
        outputs.append(generate(model, ids, make_cache(model.config), **settings, **loop))
    return outputs


def assert_same(expected, found):
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name])
        assert all(map(torch.equal, found[name], expected[name])), name
    assert_same_cache(expected.past_key_values, found.past_key_values)


def assert_same_cache(expected, found):
    assert found.get_seq_length() == expected.get_seq_length()
    for theirs, ours in zip(expected.layers, found.layers, strict=True):
        for name in ("row_state", "selected", "mean_query", "slots", "scores", "positions", "full_steps"):
            if hasattr(theirs, name):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    if isinstance(expected, RefreshCache):
        assert torch.equal(found.full_steps, expected.full_steps)


def end_after(tokens, model, ids, make_cache, **settings):
    """A token that first comes as the n-th new one of the first row, as the token that ends a text."""
    settings = {"max_new_tokens": tokens + 3} | settings
    free = generate(model, ids, make_cache(model.config), **settings)[0, ids.shape[1] :].tolist()
    places = [place for place, token in enumerate(free) if free.index(token) == place]
    return free[min(places, key=lambda place: abs(place - (tokens - 1)))]


ENDS = {
    "fixed": (None, 1, 2, 4, 5, 6, 9),
    "every step": (1, 4),
    "similarity": (None, 4, 6),
    "never": (2, 5),
    "offloaded": (None, 4, 5),
    "full": (None, 4),
    "streaming": (1, 5),
    "h2o": (None, 5, 9),
    "snapkv": (2, 6),
}


@pytest.mark.parametrize(
    "case",
    slow_unless(
        [*(("fixed", tokens) for tokens in ENDS["fixed"]), *((name, tokens[-1]) for name, tokens in ENDS.items())],
        [(name, tokens) for name in CACHES for tokens in ENDS[name]],
    ),
)
def test_one_row_that_ends(case):
    """At the first token, before, at and after decision steps: the step that is taken back is full, or partial."""
    name, tokens = case
    model, ids = tiny_enabled(), random_ids(1, 20)
    end = None if tokens is None else end_after(tokens, model, ids, CACHES[name])
    expected, found = both(model, ids, CACHES[name], eos_token_id=end)
    assert_same(expected, found)
    assert (found.sequences.shape[1] == 36) == (tokens is None)


@pytest.mark.parametrize("name", CACHES)
def test_padded_rows_that_end_at_different_times(name):
    model, (ids, mask) = tiny_enabled(), left_padded(random_ids(3, 20, seed=1), [0, 5, 9])
    end = end_after(4, model, ids, CACHES[name], attention_mask=mask)
    expected, found = both(model, ids, CACHES[name], attention_mask=mask, eos_token_id=[end, 7])
    assert_same(expected, found)
    assert (found.sequences[:, 20:] == 0).any(), "all rows end together: the test shows nothing"


@pytest.mark.parametrize(("name", "end"), [("similarity", False), ("similarity", True), ("h2o", True), ("full", False)])
def test_sampling_draws_the_same_tokens_and_numbers(name, end):
    model, ids = tiny_enabled(dtype=torch.float32), random_ids(2, 20)
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "num_return_sequences": 2}
    settings["eos_token_id"] = list(range(3, 40)) if end else None
    expected, found = both(model, ids, CACHES[name], **settings)
    assert_same(expected, found)
    assert found.sequences.shape[0] == 4 and (found.sequences.shape[1] < 36) == end
    after = []
    for loop in ({}, OURS):
        torch.manual_seed(5)
        generate(model, ids, CACHES[name](model.config), **settings, **loop)
        after.append(torch.rand(1))
    assert torch.equal(*after), "the step that was taken back left its random numbers taken"


def test_probabilities_that_are_no_numbers_are_refused():
    class Spoil(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores if input_ids.shape[1] < 24 else scores * torch.nan

    model, ids = tiny_enabled(), random_ids(1, 20)
    with pytest.raises(RuntimeError, match="probabilities to sample from are not numbers"):
        generate(model, ids, RefreshCache(model.config, 90, FIXED), do_sample=True, logits_processor=[Spoil()], **OURS)


QUESTIONS = {
    "fixed": (0, 1, 5),
    "every step": (5,),
    "similarity": (0, 5),
    "never": (1,),
    "offloaded": (0, 5),
    "full": (1,),
    "streaming": (0,),  # a compact cache takes no further turn
    "h2o": (0,),
    "snapkv": (0,),
}


@pytest.mark.parametrize(("name", "question"), [(name, length) for name in CACHES for length in QUESTIONS[name]])
def test_turns_after_an_early_end(name, question):
    """A further turn, or one token more, which is a decoding step from the very selection that was there."""
    model, ids = tiny_enabled(), random_ids(1, 14)
    wanted, cache = CACHES[name](model.config), CACHES[name](model.config)
    for turn, tokens in enumerate((3, 4, 5, 6)):
        end = end_after(tokens, model, ids, lambda config: copy.deepcopy(wanted))
        expected = generate(model, ids, wanted, eos_token_id=end)
        found = generate(model, ids, cache, eos_token_id=end, **OURS)
        assert torch.equal(found, expected)
        ids = torch.cat([expected, random_ids(1, question, seed=turn)], dim=1)
    assert_same_cache(wanted, cache)


class Calls(StoppingCriteria):
    """Notes what it is given, and ends the text at a length."""

    def __init__(self, length):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.clone(), None if scores is None else len(scores)))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("run_ahead", [None, False, True])
def test_the_end_is_read_one_step_late(run_ahead):
    """One call more than transformers', in the step that is taken back; none where running ahead is not asked for, and
    none after `max_new_tokens`."""
    model, ids = tiny_enabled(), random_ids(2, 20)
    for length, new, ahead in ((26, 16, 1), (26, 6, 0), (27, 6, 0), (26, 7, 1), (21, 16, 0)):
        theirs, ours = Calls(length), Calls(length)
        settings = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": new}
        cache = RefreshCache(model.config, 90, FIXED)
        expected = generate(model, ids, cache, stopping_criteria=[theirs], **settings)
        settings |= {"custom_generate": decode_ahead, "run_ahead": run_ahead}
        cache = RefreshCache(model.config, 90, FIXED)
        found = generate(model, ids, cache, stopping_criteria=[ours], **settings)
        assert torch.equal(found.sequences, expected.sequences) and len(found.scores) == len(expected.scores)
        assert len(ours.seen) - len(theirs.seen) == (ahead if run_ahead else 0), (length, new)
        for (left, count), (right, wanted) in zip(ours.seen, theirs.seen, strict=False):
            assert torch.equal(left, right) and count == wanted


def test_processors_and_criteria_of_transformers():
    model, ids, tokenizer = tiny_enabled(), random_ids(1, 20), letters_tokenizer(size=75)
    free = generate(model, ids, RefreshCache(model.config, 90, FIXED))[0, 20:].tolist()
    stop = "".join(chr(32 + token) for token in free[4:6])
    for settings in (
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 8, "eos_token_id": end_after(3, model, ids, CACHES["fixed"])},
        {"stopping_criteria": [StopStringCriteria(tokenizer, [stop])]},
        {"stopping_criteria": [MaxTimeCriteria(1000.0)]},
        {"max_time": 0.0},
        {"prefill_chunk_size": 7},
    ):
        expected, found = both(model, ids, CACHES["fixed"], **settings)
        assert_same(expected, found)


@pytest.mark.parametrize(("tokens", "run_ahead"), [(None, True), (1, True), (5, True), (5, False)])
def test_a_streamer_gets_each_token_once(tokens, run_ahead):
    model, ids, streamer = tiny_enabled(), random_ids(1, 20), Collector()
    end = None if tokens is None else end_after(tokens, model, ids, CACHES["fixed"])
    cache, settings = CACHES["fixed"](model.config), {"custom_generate": decode_ahead, "run_ahead": run_ahead}
    sequences = generate(model, ids, cache, stream_to=streamer, eos_token_id=end, **settings)
    assert torch.equal(torch.cat(streamer.parts), sequences[0])
    assert [len(part) for part in streamer.parts] == [20] + [1] * (sequences.shape[1] - 20) and streamer.ended == 1


def test_a_cache_without_room_for_a_step_too_many():
    """The text ends where the cache is full: the step after would have been too many."""
    model, ids = tiny_enabled(), random_ids(1, 20)
    end = end_after(5, model, ids, CACHES["fixed"])
    length = generate(model, ids, CACHES["fixed"](model.config), eos_token_id=end).shape[1]
    expected, found = both(model, ids, lambda config: RefreshCache(config, length - 1, FIXED), eos_token_id=end)
    assert_same(expected, found)
    for loop in ({}, OURS):
        with pytest.raises(ValueError, match="RefreshCache is full: 25 tokens, but max_cache_len=24"):
            generate(model, ids, RefreshCache(model.config, 24, FIXED), **loop)


@pytest.mark.parametrize(
    "settings", [{"family": "qwen2"}, {"family": "qwen3"}, {"family": "mistral"}, SLIDING], ids=lambda s: s["family"]
)
def test_other_models(settings):
    model, (ids, mask) = tiny_enabled(**settings), left_padded(random_ids(2, 20), [0, 7])
    end = end_after(5, model, ids, CACHES["fixed"], attention_mask=mask)
    assert_same(*both(model, ids, CACHES["fixed"], attention_mask=mask, eos_token_id=end))


@pytest.mark.parametrize("name", ["dynamic", "static", "none"])
def test_caches_of_transformers(name):
    model, ids = tiny_model(), random_ids(2, 20)
    end = end_after(5, model, ids, lambda config: None)
    outputs = []
    for loop in ({}, OURS):
        cache = {"dynamic": DynamicCache(), "static": StaticCache(model.config, 60), "none": None}[name]
        outputs.append(generate(model, ids, cache, eos_token_id=end, use_cache=name != "none", **loop))
    assert torch.equal(*outputs)


def test_prompts_given_as_embeddings():
    model, ids = tiny_enabled(), random_ids(2, 20)
    embeddings, outputs = model.get_input_embeddings()(ids).detach(), []
    for loop in ({}, OURS):
        cache = RefreshCache(model.config, 40, SIMILAR)
        settings = {"max_new_tokens": 12, "eos_token_id": [7, 9, 11], "pad_token_id": 0, "do_sample": False}
        outputs.append(model.generate(inputs_embeds=embeddings, past_key_values=cache, **settings, **loop))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "case", slow_unless([("fixed", 0), ("h2o", 7)], [("fixed", 0), ("similarity", 7), ("full", 0), ("h2o", 7)])
)
def test_compiled(case):
    name, padding = case
    torch._dynamo.reset()
    counters.clear()
    model, (ids, mask) = tiny_enabled(), left_padded(random_ids(2, 20), [0, padding])
    end = end_after(9, model, ids, CACHES[name], attention_mask=mask)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    settings = {"attention_mask": mask, "eos_token_id": end}
    cache = CACHES[name](model.config)
    expected = generate(model, ids, cache, **settings)
    ours = CACHES[name](model.config)
    found = generate(model, ids, ours, compile_config=compile_config, **settings, **OURS)
    assert torch.equal(found, expected)
    assert_same_cache(cache, ours)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_beams": 2}, ValueError, "greedy search and sampling, not beam_search"),
        ({"prompt_lookup_num_tokens": 3}, ValueError, "not assisted_generation"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(settings, error, message):
    model, ids = tiny_enabled(), random_ids(1, 20)
    with pytest.raises(error, match=message) as found:
        generate(model, ids, RefreshCache(model.config, 90, FIXED), custom_generate=decode_ahead, **settings)
    assert "\n" not in str(found.value)
