"""decode_lossless: greedy tokens are full attention's, one for one; samples are distributed as full attention's."""

import itertools

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StopStringCriteria

from refreshkv import NEVER, DraftCounts, RefreshCache, RefreshConfig, decode_lossless
from refreshkv.baselines.full import FullCache
from refreshkv.cache.keyword import CACHE_NAME
from refreshkv.cache.preallocated_layer import Phase
from refreshkv.cache.row_lengths import RowLengths
from refreshkv.generation import lossless
from refreshkv.generation.compiled_block import block_inputs, compiled_block
from refreshkv.generation.lossless import Rules
from refreshkv.ops.choice import Choice
from refreshkv.ops.state import PADDING
from tests.generation.test_generate import SLIDING, left_padded, letters_tokenizer
from tests.helpers.marks import slow_unless
from tests.helpers.models import FAMILIES, padded_positions, random_ids, tiny_enabled, tiny_model

DRAFTS = RefreshConfig(budget=6, stride=NEVER, select_stride=2, score_bits=4, pool_ahead=True, observation_window=4)
CONFIGS = {
    "selecting": DRAFTS,
    "paper": RefreshConfig(budget=6, stride=4),
    "similarity": RefreshConfig(budget=0.3, stride=3, threshold=0.1, observation_window=3, recent_window=2),
    "one kept": RefreshConfig(budget=2, stride=NEVER, pool_kernel=1),
}
PADDINGS = [0, 3, 0, 7, 1, 0, 11, 2]


def generate(model, ids, config=None, drafts=None, draft_length=None, **settings):
    """Tokens after the prompt, by lossless decoding if there is a config, else by transformers' own loop."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12} | settings
    settings = {"attention_mask": torch.ones_like(ids)} | settings
    if config is not None:
        cache = RefreshCache(model.config, 100, config)
        settings |= {"past_key_values": cache, "custom_generate": decode_lossless}
        settings |= {"drafts": drafts, "draft_length": draft_length}
    return model.generate(ids, **settings)


@pytest.mark.parametrize(
    "case",
    slow_unless(
        [("llama", "selecting"), ("qwen3", "similarity")],
        list(itertools.product(FAMILIES, CONFIGS)),
    ),
)
def test_greedy_tokens_are_those_of_full_attention(case):
    family, config = case
    plain, model = tiny_model(family=family), tiny_enabled(family=family)
    ids, mask = left_padded(random_ids(8, 20, seed=1), PADDINGS)
    counts = DraftCounts()
    found = generate(model, ids, CONFIGS[config], drafts=counts, attention_mask=mask)
    assert torch.equal(found, generate(plain, ids, attention_mask=mask))
    assert 0 < counts.accepted < counts.judged and counts.tokens == 12
    alone = generate(model, ids[:1], CONFIGS[config], drafts=(counts := DraftCounts()), draft_length=3)
    assert torch.equal(alone, found[:1]) and counts.rounds < 12


def test_the_draft_step_is_compiled_once():
    """Whatever the numbers of drafts and the lengths of the rows are, and for another text too."""
    model, ids = tiny_enabled(layers=1), random_ids(3, 20, seed=8)
    own = {"past_key_values": RefreshCache(model.config, 100, DRAFTS), "custom_generate": decode_lossless}
    own |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
    own["compile_config"] = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    own["compile_config"]._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    expected = generate(tiny_model(layers=1), ids)
    for length in (2, None, 7):
        own["past_key_values"].reset()
        found = model.generate(ids, draft_length=length, attention_mask=torch.ones_like(ids), **own)
        assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@torch.no_grad()
@pytest.mark.parametrize("by", ["torch", pytest.param("kernels", marks=pytest.mark.slow)])
def test_a_compiled_block_is_that_of_the_model(by, monkeypatch):
    """Logits and cache, with one compilation for all numbers of tokens and no break."""
    model, text = tiny_enabled(layers=1).float(), random_ids(3, 30, seed=7)
    if by == "kernels":
        monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor: True)
        monkeypatch.setattr(Choice, "takes_short_block", lambda choice, query, key, value: query.shape[2] < 20)
    mask = torch.ones_like(text)
    mask[1, :5] = 0

    def plain(tokens, positions, padding, columns, cache):
        return model(**block_inputs(tokens, positions, padding, cache)).logits.float()

    def blocks(call):
        cache, found = RefreshCache(model.config, 100, DRAFTS), []
        model(text, attention_mask=mask, position_ids=padded_positions(mask), past_key_values=cache)
        lengths, next_positions = RowLengths(cache), mask.sum(1)
        for count in (4, 6, 3):
            columns, positions = lengths.columns(count), next_positions[:, None] + torch.arange(count)
            cache.verify(columns, compiled=call is not plain)
            found.append(call(random_ids(3, count, seed=count), positions, lengths.padding_now, columns, cache))
            kept = torch.tensor([count, count - 1, 1])
            lengths.accept(kept)
            lengths.note(kept.tolist())
            next_positions = next_positions + kept
            layer = cache.layers[0]
            found += [layer.keys.clone(), layer.values.clone(), layer.score_codes.clone(), layer.observers.clone()]
        return found

    torch._dynamo.reset()
    counters.clear()
    expected, found = blocks(plain), blocks(compiled_block(model, backend="eager"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    captured = counters["stats"]["calls_captured"]
    assert captured > 0 and not counters["graph_break"]
    blocks(compiled_block(model, backend="eager"))
    assert counters["stats"]["calls_captured"] == captured


@pytest.mark.slow
@pytest.mark.parametrize("config", ["selecting", "paper"])
def test_greedy_tokens_by_the_kernels_are_those_of_full_attention(config, monkeypatch):
    """Steps, selections and blocks by Triton, whose layers share their state: on a GPU, or in the interpreter."""
    plain, model = tiny_model(layers=2).float(), tiny_enabled(layers=2).float()
    ids, mask = left_padded(random_ids(2, 80, seed=1), [0, 3])
    expected = generate(plain, ids, attention_mask=mask, max_new_tokens=10)
    monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor: True)
    monkeypatch.setattr(Choice, "takes_short_block", lambda choice, query, key, value: query.shape[2] < 20)
    found = generate(
        model, ids, CONFIGS[config], drafts=(counts := DraftCounts()), attention_mask=mask, max_new_tokens=10
    )
    assert torch.equal(found, expected) and 0 < counts.accepted


@pytest.mark.slow
def test_greedy_tokens_of_many_long_texts():
    """64 prompts, 512 tokens each, in batches of 8, with and without padding."""
    settings = {"layers": 2, "max_position_embeddings": 1024}
    plain, model = tiny_model(**settings), tiny_enabled(**settings)
    for batch in range(8):
        ids, mask = left_padded(random_ids(8, 40, seed=batch), PADDINGS if batch % 2 else [0] * 8)
        cache = RefreshCache(model.config, 600, RefreshConfig.recommended(budget=24, select_stride=2))
        own = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "max_new_tokens": 512}
        found = model.generate(ids, past_key_values=cache, custom_generate=decode_lossless, **own)
        assert torch.equal(found, plain.generate(ids, pad_token_id=0, **own))


def test_rows_that_end_at_different_times():
    plain, model = tiny_model(), tiny_enabled()
    ids, mask = left_padded(random_ids(8, 20, seed=2), PADDINGS)
    free = generate(plain, ids, attention_mask=mask)[:, 20:]
    ends = [int(free[0, 3]), int(free[1, 6]), int(free[5, 9])]
    expected = generate(plain, ids, attention_mask=mask, eos_token_id=ends)
    lengths = {row.tolist().index(0) if 0 in row else len(row) for row in expected[:, 20:]}
    assert len(lengths) > 2
    for length in (None, 5):
        settings = {"draft_length": length, "attention_mask": mask, "eos_token_id": ends}
        assert torch.equal(generate(model, ids, CONFIGS["paper"], **settings), expected)


def test_stop_strings_and_processors():
    plain, model, ids = tiny_model(), tiny_enabled(), random_ids(3, 20, seed=3)
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": 2}
    free = generate(plain, ids, **settings)[0, 20:].tolist()
    stop = "".join(chr(32 + token) for token in free[5:7])
    settings["stopping_criteria"] = [StopStringCriteria(letters_tokenizer(size=75), [stop])]
    assert torch.equal(generate(model, ids, DRAFTS, **settings), generate(plain, ids, **settings))


def test_the_cache_goes_on_with_a_further_turn():
    plain, model, ids = tiny_model(), tiny_enabled(), random_ids(2, 20, seed=4)
    cache = RefreshCache(model.config, 100, DRAFTS)
    own = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
    ours = {"past_key_values": cache, "custom_generate": decode_lossless}
    text = ids
    for turn in range(2):
        expected = plain.generate(text, attention_mask=torch.ones_like(text), **own)
        found = model.generate(text, attention_mask=torch.ones_like(text), return_dict_in_generate=True, **own, **ours)
        assert torch.equal(found.sequences, expected) and found.past_key_values is cache
        assert text.shape[1] - 3 <= cache.length == cache.exact_length < expected.shape[1]
        text = torch.cat([expected, random_ids(2, turn, seed=turn)], dim=1)


def state_of(cache):
    """Everything of the cache that later calls read; the next block replaces the decisions."""
    length, found = cache.length, []
    for layer in cache.layers:
        names = ("keys", "values", *layer.score_state)
        found += [getattr(layer, name)[:, :, :length] for name in names]
        found += [layer.full_steps, layer.selecting_steps, layer.row_state[:, PADDING], layer.cumulative_length]
        assert layer.known_length == layer.prompt_length == layer.prefix_length == length
        assert layer.phase is Phase.FILLED
    return [tensor.clone() for tensor in (*found, cache.tokens)], cache.row_starts


def watched(call, monkeypatch):
    """What `call()` returns, with the steps from the small cache and how many of them were queued ahead."""
    steps = {"step": 0, "queue_step": 0, "first_step": 0}

    def counted(name, original):
        def counting(*args):
            steps[name] += 1
            return original(*args)

        return counting

    with monkeypatch.context() as patch:
        for name in steps:
            patch.setattr(lossless._Passes, name, counted(name, getattr(lossless._Passes, name)))
        return call(), steps


@pytest.mark.parametrize("case", ["all end", "one row", "sampling", "room", "length"])
def test_the_step_queued_ahead_changes_nothing(case, monkeypatch):
    """Tokens, counts, random numbers and the cache are those of rounds whose report the host reads first."""
    plain, model = tiny_model(), tiny_enabled()
    ids, mask = left_padded(random_ids(4, 20, seed=2), PADDINGS[:4])
    if case == "one row":
        ids, mask = ids[:1], mask[:1]
    free = generate(plain, ids, attention_mask=mask, max_new_tokens=24)[:, 20:]
    settings = {"do_sample": case == "sampling", "temperature": 1.5, "pad_token_id": 0}
    settings |= {"max_new_tokens": 60, "eos_token_id": [int(row[9 + number]) for number, row in enumerate(free)]}
    if case in ("room", "length"):
        settings |= {"max_new_tokens": 24, "eos_token_id": None}
    capacity = 20 + 24 if case == "room" else 100

    def run():
        torch.manual_seed(4)
        cache, counts = RefreshCache(model.config, capacity, DRAFTS), DraftCounts()
        own = {"past_key_values": cache, "custom_generate": decode_lossless, "drafts": counts}
        found = model.generate(ids, attention_mask=mask, **own, **settings)
        seen = (found, torch.get_rng_state(), *state_of(cache)[0])
        return cache, counts, seen, state_of(cache)[1]

    (cache, counts, seen, starts), steps = watched(run, monkeypatch)
    surplus = 0 if case in ("room", "length") else 1
    assert steps["step"] == counts.steps + surplus and steps["first_step"] < counts.rounds + surplus
    original = lossless._round
    monkeypatch.setattr(lossless, "_round", lambda *args: original(*args[:-1], False))
    (_, expected_counts, expected, expected_starts), waiting = watched(run, monkeypatch)
    assert waiting["step"] == counts.steps
    assert counts == expected_counts and starts == expected_starts
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
    monkeypatch.undo()
    if case != "room":
        text = torch.cat([seen[0], random_ids(len(ids), 3)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(ids), text.shape[1] - 20)], dim=1)
        own = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8, "attention_mask": mask}
        found = model.generate(text, past_key_values=cache, custom_generate=decode_lossless, **own)
        assert torch.equal(found, plain.generate(text, **own))


@torch.no_grad()
def test_afterwards_the_cache_is_that_of_full_attention_in_order():
    plain, model = tiny_model(), tiny_enabled()
    ids, mask = left_padded(random_ids(4, 20, seed=6), [0, 3, 11, 0])
    cache = RefreshCache(model.config, 100, CONFIGS["one kept"])
    own = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 14}
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, custom_generate=decode_lossless, **own)
    length = cache.length
    assert 25 < length < 34 and torch.equal(cache.tokens, found[:, :length])
    whole = torch.cat([mask, mask.new_ones(4, length - 20)], dim=1)
    inputs = {"attention_mask": whole, "position_ids": padded_positions(whole), "past_key_values": DynamicCache()}
    dense = plain(found[:, :length], **inputs).past_key_values
    for layer, expected in zip(cache.layers, dense.layers, strict=True):
        for ours, theirs in ((layer.keys, expected.keys), (layer.values, expected.values)):
            difference = (ours[:, :, :length] - theirs).abs().amax(dim=(1, 3))
            assert difference.masked_fill(whole == 0, 0.0).max() < 1e-10


def test_rows_move_to_a_common_end_and_back():
    """Against lists: tails stay in order at the end, and `restore` undoes everything."""
    model, ids = tiny_enabled(), random_ids(3, 90, seed=7)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache = RefreshCache(model.config, 160, DRAFTS)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=padded_positions(mask), past_key_values=cache)
    lengths, generator = RowLengths(cache), torch.Generator().manual_seed(0)
    texts = [list(range(padding, 90)) for padding in (0, 5, 0)]
    positions = torch.tensor([90, 85, 90])
    for _ in range(12):
        counts = torch.randint(0, 6, (3,), generator=generator)
        counts[0] = counts[0].clamp(min=1)
        lengths.cache.begin_drafts()
        cache.verify()
        mask = (torch.arange(cache.length + 6) >= lengths.padding_now[:, None]).long()
        where = positions[:, None] + torch.arange(6)
        with torch.no_grad():
            model(ids[:, :6], attention_mask=mask, position_ids=where, past_key_values=cache)
        lengths.accept(counts)
        lengths.note(counts.tolist())
        positions = positions + counts
        for row, count in enumerate(counts.tolist()):
            texts[row] += range(texts[row][-1] + 1, texts[row][-1] + 1 + count)
            held = lengths.order[row, int(lengths.padding_now[row]) : cache.length].tolist()
            assert sorted(held) == texts[row] and held[-64:] == texts[row][-64:]
        assert cache.length == max(text[-1] for text in texts) + 1
    lengths.restore()
    assert cache.length == min(text[-1] for text in texts) + 1 - 3 == cache.exact_length


def tiny_vocabulary():
    settings = {"vocab_size": 4, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    return tiny_model(seed=5, **settings), tiny_enabled(seed=5, **settings)


@torch.no_grad()
def expected_shares(model, ids, new, temperature):
    """The probability of each of the 4 ** new texts after ids (1, P) under full attention."""
    texts = torch.tensor(list(itertools.product(range(4), repeat=new)))
    whole = torch.cat([ids.expand(len(texts), -1), texts], dim=1)
    logs = (model(whole).logits[:, ids.shape[1] - 1 : -1] / temperature).log_softmax(-1)
    return logs.gather(2, texts[..., None]).squeeze(2).sum(1).exp()


def chi_square(found, shares):
    """Of texts (N, new) against the texts' probabilities, cells below 5 taken together."""
    number = (found * 4 ** torch.arange(found.shape[1] - 1, -1, -1)).sum(1)
    counts, wanted = torch.bincount(number, minlength=len(shares)).double(), shares * len(found)
    small = wanted < 5
    counts, wanted = (torch.cat([each[~small], each[small].sum()[None]]) for each in (counts, wanted))
    return float(((counts - wanted) ** 2 / wanted.clamp(min=1e-9)).sum()), len(wanted) - 1


def test_samples_are_distributed_as_full_attention_s():
    """1000 texts of one prompt at once. The small cache's own distribution would be found out."""
    plain, model = tiny_vocabulary()
    ids = torch.randint(0, 4, (1, 24), generator=torch.Generator().manual_seed(0))
    many = ids.expand(1000, -1).contiguous()
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 4, "pad_token_id": None}
    shares = expected_shares(plain, ids, 4, 1.5)
    torch.manual_seed(0)
    found = generate(model, many, CONFIGS["one kept"], drafts=(counts := DraftCounts()), draft_length=3, **settings)
    value, cells = chi_square(found[:, 24:], shares)
    assert 0.3 < counts.acceptance < 0.98  # both branches of the rule are taken
    assert value < cells + 4 * (2 * cells) ** 0.5
    cache = RefreshCache(model.config, 100, CONFIGS["one kept"])
    small = model.generate(many, attention_mask=torch.ones_like(many), past_key_values=cache, **settings)
    assert chi_square(small[:, 24:], shares)[0] > cells + 8 * (2 * cells) ** 0.5


def test_the_rule_of_sampling_gives_the_wanted_distribution():
    """Averaged over all drafts and uniform numbers, exactly: a draft is kept, or drawn from what is missing."""
    generator = torch.Generator().manual_seed(3)
    drafted, wanted = (torch.rand(6, generator=generator).softmax(0) for _ in range(2))
    wanted[2] = 0.0
    wanted /= wanted.sum()
    kept = torch.minimum(drafted, wanted)
    rest = (wanted - drafted).clamp(min=0)
    torch.testing.assert_close(kept + (1 - kept.sum()) * rest / rest.sum(), wanted)
    torch.manual_seed(1)
    rows = 40000
    rules = Rules([], [], type("Config", (), {"do_sample": True})())
    draft = torch.multinomial(drafted, rows, replacement=True)
    both = torch.stack([wanted, wanted]).expand(rows, -1, -1)
    accepted, follows = rules.judge(draft[:, None], drafted.expand(rows, 1, -1), both)
    tokens = torch.where(accepted == 1, draft, follows)
    assert not (tokens == 2).any() and not (follows == 2).any()
    shares = torch.bincount(tokens, minlength=6) / rows
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.01)
    assert abs(float(accepted.float().mean()) - float(kept.sum())) < 0.01


def test_all_drafts_are_accepted_where_the_small_cache_holds_everything():
    model, ids, counts = tiny_enabled(), random_ids(2, 12), DraftCounts()
    generate(model, ids, RefreshConfig(budget=1.0, stride=NEVER), drafts=counts, max_new_tokens=20)
    assert counts.acceptance < 1.0  # the share is of the prompt
    generate(model, ids, RefreshConfig(budget=90, stride=NEVER), drafts=(counts := DraftCounts()), max_new_tokens=20)
    assert counts.acceptance == 1.0 and counts.judged == 2 * counts.steps
    assert counts.tokens_per_round == 20 / counts.rounds > 4


def test_what_lossless_decoding_cannot_do_is_refused():
    model, ids = tiny_enabled(), random_ids(1, 12)
    own = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "custom_generate": decode_lossless}

    def refused(match, **settings):
        with pytest.raises((ValueError, NotImplementedError), match=match):
            model.generate(ids, **own, max_new_tokens=4, **settings)

    def cache(config=DRAFTS, **settings):
        return RefreshCache(model.config, 40, config, **settings)

    refused(f"pass {CACHE_NAME}=RefreshCache", past_key_values=FullCache(model.config, 40))
    refused("set rectify=False", past_key_values=cache(RefreshConfig(rectify=True)))
    refused("offload=False", past_key_values=cache(offload=True))
    refused("draft_length must be a whole number", past_key_values=cache(), draft_length=0)
    refused("in CUDA graphs, and here are none", past_key_values=cache(), compile_blocks=True)
    refused("does not support output_scores", past_key_values=cache(), return_dict_in_generate=True, output_scores=True)
    refused("greedy search and sampling", past_key_values=cache(), num_beams=2)
    used = cache()
    with torch.no_grad():
        for start, end in ((0, 9), (9, 10), (10, 11)):
            model(ids[:, start:end], past_key_values=used)
    refused("decoded from the small cache", past_key_values=used)
    sliding = tiny_enabled(**SLIDING)
    with pytest.raises(NotImplementedError, match="full attention in every layer"):
        sliding.generate(ids, **own, past_key_values=RefreshCache(sliding.config, 40, DRAFTS), max_new_tokens=4)
