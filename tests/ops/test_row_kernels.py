"""The Triton kernels against the naive form, values and gradients: on a GPU, or under Triton's interpreter."""

import math
import random

import pytest
import torch

from refreshkv import NEVER, RefreshConfig, Simulation, enable, ops
from refreshkv.ops import choice, naive, tiles
from refreshkv.ops.choice import CHOICE, Choice
from refreshkv.ops.schedule import position_flags
from tests.helpers.marks import slow_tuples_unless, slow_unless
from tests.helpers.models import random_ids, tiny_model

pytest.importorskip("triton")

from refreshkv.ops.naive.rows import selections as naive_selections
from refreshkv.ops.rows import after_prompt, block_steps, cudnn, key_lists, partial_steps, short_block, whole_sequence
from refreshkv.ops.rows.segments import longest_interval, segments_of
from refreshkv.ops.selection import ranking


@pytest.fixture(autouse=True)
def small_searches(monkeypatch):
    """Sizes of the search for short rows, so that the sampled way is taken, and quickly in the interpreter."""
    monkeypatch.setattr(ranking, "SAMPLE", 32)
    monkeypatch.setattr(ranking, "CANDIDATES", 128)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = {
    "fixed": (2, 63, 20, 2, 2, 16, RefreshConfig(budget=8, stride=5), 0),
    "every step full": (1, 40, 17, 2, 1, 16, RefreshConfig(budget=8, stride=1), 0),
    "seven heads to a group": (1, 50, 21, 7, 1, 16, RefreshConfig(budget=9, stride=7), 0),
    "odd head size": (1, 50, 21, 1, 2, 24, RefreshConfig(budget=9, stride=2), 3),
    "one key": (1, 40, 9, 2, 2, 16, RefreshConfig(budget=1, stride=10), 0),
    "a budget beyond the row": (2, 45, 12, 2, 2, 16, RefreshConfig(budget=1000, stride=7), 4),
    "a fraction of padded rows": (2, 63, 30, 2, 2, 16, RefreshConfig(budget=0.3, stride=6), 13),
    "never refreshed": (1, 70, 31, 4, 1, 16, RefreshConfig(budget=12, stride=NEVER), 0),
    "the paper's recipe": (1, 70, 50, 4, 1, 16, RefreshConfig(budget=12, stride=20), 0),
    "similarity": (2, 90, 20, 2, 2, 16, RefreshConfig(budget=10, stride=3, threshold=0.3), 5),
    "similarity, long intervals": (2, 150, 20, 4, 1, 16, RefreshConfig(budget=10, stride=20, threshold=0.3), 5),
    "observers and windows": (
        2,
        63,
        20,
        2,
        2,
        16,
        RefreshConfig(budget=9, stride=5, observation_window=4, recent_window=3, sink_tokens=2, pool_kernel=3),
        5,
    ),
    "short prompt, many observers": (1, 40, 3, 2, 1, 16, RefreshConfig(budget=9, stride=5, observation_window=9), 0),
    "windows beyond the budget": (1, 40, 21, 2, 1, 16, RefreshConfig(budget=4, stride=5, recent_window=9), 0),
    "selecting": (2, 31, 12, 2, 1, 16, RefreshConfig(budget=8, stride=NEVER, select_stride=3), 5),
    "selecting by 4 bits, pooling ahead": (
        1, 26, 11, 3, 2, 16,
        RefreshConfig(budget=6, stride=NEVER, select_stride=2, score_bits=4, pool_ahead=True, pool_kernel=4), 0,
    ),
    "selecting between full steps": (
        2, 33, 14, 2, 1, 24,
        RefreshConfig(
            budget=0.4, stride=6, select_stride=4, score_bits=4, observation_window=2, sink_tokens=1, pool_ahead=True
        ), 5,
    ),
    "heads of 256": (
        2, 63, 20, 2, 1, 256, RefreshConfig(budget=8, stride=10, select_stride=3, score_bits=4), 5,
    ),
    "selecting at every step by 8 bits": (
        1, 40, 17, 2, 1, 16, RefreshConfig(budget=5, stride=NEVER, select_stride=1, score_bits=8, pool_kernel=1), 0,
    ),
    "selecting beside similarity": (
        2, 60, 20, 2, 2, 16, RefreshConfig(budget=10, stride=3, threshold=0.3, select_stride=2, score_bits=8), 5,
    ),
    "selecting, a budget beyond the row": (2, 45, 12, 2, 2, 16, RefreshConfig(budget=1000, select_stride=7), 4),
    "selecting with one key": (1, 40, 9, 2, 2, 16, RefreshConfig(budget=1, stride=NEVER, select_stride=5), 0),
    "selecting beyond the row": (1, 40, 21, 2, 1, 16, RefreshConfig(budget=6, stride=7, select_stride=50), 0),
    "selecting in segments longer than the budget": (
        1, 70, 21, 2, 1, 16, RefreshConfig(budget=5, stride=NEVER, select_stride=23, score_bits=4), 0,
    ),
}  # fmt: skip


def inputs(rows, length, groups, kv_heads, head_dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        # as a model lays them out: (B, T, H, D) in memory
        tensor = torch.randn(rows, length, heads, head_dim, generator=generator)
        return tensor.to(DEVICE, dtype).transpose(1, 2).requires_grad_()

    return draw(groups * kv_heads), draw(kv_heads), draw(kv_heads)


def plan_of(query, prompt, config, left_padding=None):
    """The plan of a shape that comes again, and the selection's options."""
    is_padded = left_padding is not None and bool(left_padding.any())
    plan = config.plan(query, prompt, left_padding if is_padded else None, recurring=True)
    return plan, config.selection_options()


def compare(case, dtype=torch.float32, tolerance=1e-4, seed=0):
    rows, length, prompt, groups, kv_heads, head_dim, config, padding = case
    tensors = inputs(rows, length, groups, kv_heads, head_dim, seed, dtype)
    left_padding = torch.tensor([0, padding][-rows:], device=DEVICE)
    scaling = head_dim**-0.5
    plan, options = plan_of(tensors[0], prompt, config, left_padding)
    upstream = torch.randn(rows, length - prompt, groups * kv_heads, head_dim).to(DEVICE, dtype)

    query, key, value = tensors
    late = query[:, :, max(0, prompt - config.observation_window) :]  # what is asked for at least
    output = after_prompt.refresh_rows(late, key, value, plan, options, scaling)
    gradients = torch.autograd.grad(output, tensors, upstream)
    expected = naive.refresh_rows(*tensors, plan, options, scaling)
    expected_gradients = torch.autograd.grad(expected, tensors, upstream)
    pairs = {"output": (output, expected)}
    pairs |= {
        f"gradient of {name}": pair
        for name, pair in zip(("query", "key", "value"), zip(gradients, expected_gradients, strict=True), strict=True)
    }
    for name, (found, wanted) in pairs.items():
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < tolerance, f"{name}: {error:.2e}"


QUICK = ("fixed", "a fraction of padded rows", "never refreshed", "observers and windows")
QUICK += ("selecting between full steps",)


@pytest.mark.parametrize("name", slow_unless(QUICK, CASES))
def test_values_and_gradients(name):
    compare(CASES[name])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "limited"),
    [
        (torch.bfloat16, 128, (9, 0), True),
        (torch.float16, 96, (9, 0), True),
        (torch.float32, 128, (9, 0), False),
        (torch.bfloat16, 64, (9, 0), False),
        (torch.bfloat16, 256, (9, 0), False),
        (torch.bfloat16, 128, (8, 0), False),
    ],
)
def test_where_registers_are_limited(monkeypatch, dtype, head_dim, capability, limited):
    """The forward pass of partial steps: the tiles and the GPUs that were looked at."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    limit = {"maxnreg": 128} if limited else {}
    assert tiles.register_limit(dtype, head_dim, torch.device("cuda")) == limit
    assert tiles.register_limit(dtype, head_dim, torch.device("cpu")) == {}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert tiles.register_limit(dtype, head_dim, torch.device("cuda")) == {}


@pytest.mark.slow
@pytest.mark.parametrize("fewest", [1, 1000])
@pytest.mark.parametrize("name", ["a fraction of padded rows", "selecting", "selecting by 4 bits, pooling ahead"])
def test_short_segments_in_blocks_and_alone(monkeypatch, name, fewest):
    """Blocks of few positions, whose lists are made a few at a time."""
    monkeypatch.setattr(block_steps, "FEWEST_SEGMENTS", fewest)
    monkeypatch.setattr(block_steps, "LARGEST_BLOCK", 10)
    monkeypatch.setattr(key_lists, "MAX_MASKS", 600)
    compare(CASES[name])


SHORT = [name for name, case in CASES.items() if min(case[6].stride, case[6].select_stride or NEVER) <= 10]


@pytest.mark.parametrize(
    ("name", "positions"),
    slow_tuples_unless(
        [("fixed", 15), ("selecting between full steps", 4), ("similarity", 6)],
        [(name, n) for name in SHORT for n in (1, 3)] + [("fixed", 15), ("similarity", 6)],
    ),
)
def test_lists_name_the_visible_keys(monkeypatch, name, positions):
    """Every key once, with the positions that see it; nothing for full steps. positions: of a block, or segments."""
    monkeypatch.setattr(key_lists, "MAX_MASKS", 300)
    rows, length, prompt, groups, kv_heads, head_dim, config, padding = CASES[name]
    query, key, _ = inputs(rows, length, groups, kv_heads, head_dim)
    plan, options = plan_of(query, prompt, config, torch.tensor([0, padding][-rows:], device=DEVICE))
    longest = longest_interval(plan, length)
    positions = positions if positions % longest == 0 else positions * longest
    selected = naive_selections(query.detach(), key.detach(), plan, options, 0.25)
    visible = naive.visible_keys(plan, selected, length).transpose(0, 1)  # (Hkv, B, R, T)
    full = position_flags(plan.full_positions, length)[:, prompt:]
    visible = visible.masked_fill(full[None, :, :, None], False).transpose(0, 1)
    lists = key_lists.key_lists(plan, segments_of(plan, length), selected.int(), length, positions)
    found = torch.zeros_like(visible)
    for place in torch.cartesian_prod(*map(torch.arange, lists.counts.shape)).tolist():
        row, head, block = place
        tokens, masks = lists.entries[row, head, block][:, : lists.counts[row, head, block]].tolist()
        assert tokens == sorted(set(tokens)) and 0 not in masks
        for token, mask in zip(tokens, masks, strict=True):
            for bit in range(positions):
                if mask >> bit & 1:
                    found[row, head, block * positions + bit - 1, token] = True
    assert torch.equal(found, visible)


def dense_logits(query, key, causal, scaling):
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * scaling
    return logits.masked_fill(torch.ones_like(logits[0, 0]).triu(1).bool() & causal, -math.inf)


def dense_attend(query, key, value, causal, scaling):
    """The readable form of `cudnn.attend`, which needs cuDNN."""
    logits = dense_logits(query, key, causal, scaling)
    return logits.softmax(-1) @ value.repeat_interleave(query.shape[1] // key.shape[1], 1), logits.logsumexp(-1)


def dense_attend_backward(upstream, query, key, value, output, lse, causal, scaling):
    """The readable form of `cudnn.attend_backward`."""
    weights = (dense_logits(query, key, causal, scaling) - lse.unsqueeze(-1)).exp()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    delta = (upstream * output).sum(-1, keepdim=True)
    logit_grad = weights * (upstream @ value.transpose(2, 3) - delta) * scaling
    grads = (logit_grad.transpose(2, 3) @ query, weights.transpose(2, 3) @ upstream)
    return logit_grad @ key, *(grad.unflatten(1, (-1, groups)).sum(2) for grad in grads)


@pytest.mark.parametrize(
    "name", slow_unless(("fixed", "the paper's recipe"), [name for name, case in CASES.items() if case[-1] == 0])
)
def test_full_steps_as_dense_attention(monkeypatch, name):
    monkeypatch.setattr(partial_steps, "MANY_PROGRAMS", 1)  # large tiles, keys not shared, though there are few
    monkeypatch.setattr(choice, "cudnn_takes", lambda *tensors: True)
    monkeypatch.setattr(cudnn, "attend", dense_attend)
    monkeypatch.setattr(cudnn, "attend_backward", dense_attend_backward)
    compare(CASES[name])


def test_cudnn_gets_several_full_steps(monkeypatch):
    """It refuses a single one."""
    monkeypatch.setattr(choice, "cudnn_takes", lambda *tensors: True)
    query, key, value = inputs(1, 90, 2, 2, 16)
    several, single = (plan_of(query, prompt, RefreshConfig(stride=10))[0] for prompt in (70, 71))
    assert CHOICE.takes_full_steps_by_cudnn(query, key, value, several)
    assert not CHOICE.takes_full_steps_by_cudnn(query, key, value, single)
    assert not CHOICE.takes_full_steps_by_cudnn(query, key, value, several._replace(recurring=False))


@pytest.mark.parametrize(
    ("count", "before"), [(50, 0), (64, 0), (1, 49), (20, 30), (30, 20), (49, 1), (40, 160), (3, 77)]
)
def test_blocks_of_prompts_as_dense_attention(monkeypatch, count, before):
    """Of rounded sizes, which differ less than the blocks do."""
    monkeypatch.setattr(cudnn, "TILE", 8)
    shapes = []

    def attend(query, key, value, causal, scaling):
        shapes.append((query.shape[2], key.shape[2]))
        return dense_attend(query, key, value, causal, scaling)

    monkeypatch.setattr(cudnn, "attend", attend)
    query, key, value = inputs(2, count + before, 4, 2, 24)
    whole = dense_attend(query, key, value, True, 0.3)[0]
    found = cudnn.prompt_block(query[:, :, before:], key, value, 0.3)
    torch.testing.assert_close(found, whole[:, :, before:], rtol=1e-4, atol=1e-5)
    assert all(length % 8 == 0 for shape in shapes for length in shape)
    assert len(shapes) == (2 if before >= 8 else 1) and shapes[0][0] < 1.2 * (count + 16) + 8


def test_which_blocks_are_dense(monkeypatch):
    monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor: True)
    monkeypatch.setattr(choice, "cudnn_takes", lambda *tensors: True)
    query, key, value = inputs(1, 300, 1, 1, 16)
    assert not CHOICE.takes_prompt_block(query[:, :, -256:], key, value), "it has no gradient"
    with torch.no_grad():
        assert CHOICE.takes_prompt_block(query[:, :, -256:], key, value)
        assert not CHOICE.takes_prompt_block(query[:, :, -255:], key, value)


SHORT_TAILS = {
    "the paper's recipe": (2, 100, 50, 4, 1, 16, RefreshConfig(budget=12, stride=NEVER), 0),
    "full steps in the tail": (1, 90, 60, 2, 2, 16, RefreshConfig(budget=9, stride=7), 0),
    "every step full": (1, 40, 17, 2, 1, 16, RefreshConfig(budget=8, stride=1), 0),
    "observers and windows": (
        2, 63, 40, 2, 2, 16, RefreshConfig(budget=9, stride=5, observation_window=4, recent_window=3, sink_tokens=2), 0,
    ),
    "more observers than the prompt has tokens": (
        1, 30, 3, 2, 1, 16, RefreshConfig(budget=6, stride=5, observation_window=9), 0,
    ),
    "a single row": (1, 41, 40, 1, 2, 24, RefreshConfig(budget=0.3, stride=5), 0),
    "selecting between full steps": (
        1, 60, 40, 2, 2, 16, RefreshConfig(budget=9, stride=7, select_stride=2, score_bits=4), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "heads_first"),
    slow_tuples_unless(
        [("the paper's recipe", False), ("full steps in the tail", True)],
        [(name, heads_first) for name in SHORT_TAILS for heads_first in (False, True)],
    ),
)
def test_whole_sequences_with_a_short_tail(monkeypatch, name, heads_first):
    """By the stand-in for cuDNN; the upstream gradient in the output's layout, and in another."""
    monkeypatch.setattr(cudnn, "attend", dense_attend)
    monkeypatch.setattr(cudnn, "attend_backward", dense_attend_backward)
    rows, length, prompt, groups, kv_heads, head_dim, config, _ = SHORT_TAILS[name]
    tensors = inputs(rows, length, groups, kv_heads, head_dim)
    plan, options = plan_of(tensors[0], prompt, config)
    upstream = torch.randn(rows, length, groups * kv_heads, head_dim).to(DEVICE)
    if heads_first:
        upstream = upstream.transpose(1, 2).contiguous().transpose(1, 2)
    output = whole_sequence.whole_sequence(*tensors, plan, options, head_dim**-0.5)
    expected = naive.whole_sequence(*tensors, plan, options, head_dim**-0.5)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output, tensors, upstream)
    wanted = torch.autograd.grad(expected, tensors, upstream)
    for found, gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_which_sequences_are_computed_whole(monkeypatch):
    monkeypatch.setattr(choice, "cudnn_takes", lambda *tensors: True)
    query, key, value = inputs(1, 128, 1, 1, 16)
    monkeypatch.setattr(Choice, "uses_kernels", lambda choice, tensor: True)
    few, more = (plan_of(query, prompt, RefreshConfig())[0] for prompt in (126, 125))
    assert CHOICE.takes_whole_sequence(query, key, value, few)
    assert not CHOICE.takes_whole_sequence(query, key, value, more)
    assert not CHOICE.takes_whole_sequence(query, key, value, few._replace(uniform=False))


@pytest.mark.parametrize("recomputed", slow_unless((None,), (None, False, True)))
def test_a_model_takes_short_tails_whole(monkeypatch, recomputed):
    """The attention's own way there gives the same logits and gradients as the parts put together; with activation
    checkpointing of both kinds too."""
    config, model = RefreshConfig(budget=9, stride=5), tiny_model(dtype=torch.float32)
    model, ids = enable(model, config).to(DEVICE).train(), random_ids(2, 40).to(DEVICE)
    if recomputed is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recomputed})

    def loss_and_gradients():
        model.zero_grad()
        loss = model(ids, labels=ids, refresh=Simulation(28, config), use_cache=False).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected, calls = loss_and_gradients(), []
    monkeypatch.setattr(cudnn, "attend", dense_attend)
    monkeypatch.setattr(cudnn, "attend_backward", dense_attend_backward)
    monkeypatch.setattr(Choice, "takes_whole_sequence", lambda *arguments: calls.append(arguments) or True)
    torch.testing.assert_close(loss_and_gradients(), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == model.config.num_hidden_layers * (1 if recomputed is None else 2)


def assert_same_selection(found, wanted, positions, droppable):
    """The same positions in the same order, but for the ranks that no segment drops: those in any order."""
    for row, step in (positions >= 0).nonzero().tolist():
        for ours, theirs in zip(found[row, :, step].tolist(), wanted[row, :, step].tolist(), strict=True):
            size = sum(position >= 0 for position in theirs)
            safe = max(0, size - droppable)
            assert sorted(ours[:safe]) == sorted(theirs[:safe])
            assert ours[safe:] == theirs[safe:]


def assert_naive_selection(query, key, plan, options, scaling):
    with torch.no_grad():
        wanted = naive_selections(query, key, plan, options, scaling)
        found = ranking.select_all(query, key, plan, options, scaling)
    positions = [part for part in (plan.full_positions, plan.selecting_positions) if part is not None]
    assert_same_selection(found, wanted, torch.cat(positions, dim=1), plan.droppable)


@pytest.mark.parametrize("name", slow_unless(("a fraction of padded rows", "selecting between full steps"), CASES))
def test_selection(name):
    """Exactly the naive form's positions, rank by rank as far as the ranks are told apart."""
    rows, length, prompt, groups, kv_heads, head_dim, config, padding = CASES[name]
    query, key, _ = inputs(rows, length, groups, kv_heads, head_dim)
    left_padding = torch.tensor([0, padding][-rows:], device=DEVICE)
    assert_naive_selection(query, key, *plan_of(query, prompt, config, left_padding), head_dim**-0.5)


def test_kernels_run_where_their_tensors_are(monkeypatch):
    """Not on the current device, which models that are spread over several leave as it is."""
    entered = []

    class Recorded(torch.cuda.device_of):
        def __init__(self, tensor):
            super().__init__(tensor)
            entered.append(tensor.data_ptr())

    monkeypatch.setattr(torch.cuda, "device_of", Recorded)
    query, key, value = inputs(1, 40, 2, 1, 16)
    plan, options = plan_of(query, 20, RefreshConfig(budget=8, stride=5))
    with torch.no_grad():
        ranking.select(query, key, plan.steps, options, 0.25)
    assert entered == [query.data_ptr()]
    output = after_prompt.refresh_rows(query, key, value, plan, options, 0.25)
    before = len(entered)
    output.sum().backward()
    assert 1 < before < len(entered)


@pytest.mark.slow
def test_selection_in_chunks_and_with_the_other_sort(monkeypatch):
    query, key, _ = inputs(2, 63, 2, 2, 16)
    config, padding = RefreshConfig(budget=9, stride=5, observation_window=3), torch.tensor([0, 4], device=DEVICE)
    plan, options = plan_of(query, 20, config, padding)
    with torch.no_grad():
        whole = ranking.select(query, key, plan.steps, options, 0.25)
        monkeypatch.setattr(ranking, "MAX_SCORES", 1)
        monkeypatch.setattr(ranking, "BLOCK", 16)
        monkeypatch.setattr(ranking, "LARGEST_SORT", 1)
        found = ranking.select(query, key, plan.steps, options, 0.25)
    assert_same_selection(found, whole, plan.full_positions, plan.droppable)


@pytest.mark.parametrize(
    "sizes", slow_unless([{"BLOCK": 16}], [{"BLOCK": 16}, {"BLOCK": 64, "SAMPLE": 16}, {"BLOCK": 16, "CANDIDATES": 4}])
)
def test_ties_go_to_the_lower_position(monkeypatch, sizes):
    """Keys of two kinds only: almost everything is a tie, within a block and across."""
    for name, size in sizes.items():
        monkeypatch.setattr(ranking, name, size)
    query, _, _ = inputs(1, 90, 2, 1, 16)
    kinds = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    # eighths, whose products add up exactly: in another order NumPy, as the interpreter's, could give another last bit
    query, kinds = ((tensor.detach() * 8).round() / 8 for tensor in (query, kinds))
    draw = random.Random(2)
    key = kinds[[draw.randint(0, 1) for _ in range(90)]][None, None]
    assert_naive_selection(query, key, *plan_of(query, 30, RefreshConfig(budget=20, stride=6)), 0.25)


@pytest.mark.parametrize("candidates", [1, 32, 256])
def test_a_threshold_among_candidates_or_searched_everywhere(monkeypatch, candidates):
    """Few positions are sampled: with room for few candidates the whole row is searched, with much room it is not."""
    monkeypatch.setattr(ranking, "SAMPLE", 32)
    monkeypatch.setattr(ranking, "CANDIDATES", candidates)
    query, key, _ = inputs(2, 300, 2, 1, 16)
    config, padding = RefreshConfig(budget=40, stride=60, recent_window=9, sink_tokens=3), torch.tensor([0, 7])
    padding = padding.to(DEVICE)
    assert_naive_selection(query, key, *plan_of(query, 170, config, padding), 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.3}, {"select_stride": 2, "score_bits": 4}])
def test_torch_compile_takes_a_model_with_the_kernels_whole(monkeypatch, settings):
    """No graph break inside, and the same loss and gradients as without."""
    monkeypatch.setattr(ops, "refresh_rows", lambda *arguments: after_prompt.refresh_rows(*arguments[:6]))
    config = RefreshConfig(budget=9, stride=5, **settings)
    model = enable(tiny_model(dtype=torch.float32), config).to(DEVICE).train()
    ids = random_ids(2, 27).to(DEVICE)

    def loss_and_gradients(model):
        model.zero_grad()
        loss = model(ids, labels=ids, refresh=Simulation(14, config), use_cache=False).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradients(compiled), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "heads",
    slow_unless([(6, 2, 24, 7)], [(6, 2, 24, 7), (6, 2, 24, 1), (4, 4, 16, 17), (8, 2, 32, 16), (2, 1, 144, 5)]),
)
def test_a_short_block_equals_the_grouped_attention(heads, monkeypatch):
    """Shares of the keys without any, in the padding, and at the block's end; queries of several tiles."""
    monkeypatch.setattr(short_block, "MOST_ROWS", 16)
    query_heads, kv_heads, head_dim, count = heads
    generator = torch.Generator().manual_seed(0)
    sizes = ((query_heads, count), (kv_heads, 181), (kv_heads, 181))
    query, key, value = (torch.randn(2, *size, head_dim, generator=generator).to(DEVICE) for size in sizes)
    key, value = (torch.cat([part, part[:, :, :9]], dim=2)[:, :, :181] for part in (key, value))  # a part of a buffer
    for padding in (None, torch.tensor([0, 113])):
        columns, first = torch.arange(181), torch.zeros(2, dtype=torch.int64) if padding is None else padding
        visible = (columns <= torch.arange(181 - count, 181)[:, None]) & (columns >= first[:, None, None])
        expected = naive.grouped_attention(query, key, value, visible[:, None].to(DEVICE), 0.3)
        padding = None if padding is None else padding.to(DEVICE)
        found = short_block.short_block(query, key, value, padding, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # the whole buffer, of which only the device knows how much is filled
        buffers = (torch.cat([part, torch.full_like(part[:, :, :9], 1e4)], dim=2) for part in (key, value))
        columns = torch.arange(181 - count, 181, device=DEVICE)
        found = short_block.short_block(query, *buffers, padding, 0.3, columns)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
