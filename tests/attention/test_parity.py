"""The heart of the project: one teacher-forced pass equals decoding the same tokens one by one."""

import pytest
import torch

from refreshkv import NEVER, RefreshConfig, Simulation, Trace
from tests.helpers.marks import slow_unless
from tests.helpers.models import (
    FAMILIES,
    decode_chunks,
    decode_logits,
    padded_positions,
    random_ids,
    tiny_enabled,
    tiny_model,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

# strides from 1 to 50, budgets from 1 to more than the row, both schedules, every option of the selection
CASES = [
    (17, RefreshConfig(budget=8, stride=1)),
    (17, RefreshConfig(budget=8, stride=2)),
    (17, RefreshConfig(budget=8, stride=5)),
    (1, RefreshConfig(budget=8, stride=10)),
    (17, RefreshConfig(budget=1, stride=4)),
    (17, RefreshConfig(budget=2, stride=7)),
    (17, RefreshConfig(budget=16, stride=50)),
    (9, RefreshConfig(budget=20, stride=6)),
    (9, RefreshConfig(budget=12, stride=10)),
    (17, RefreshConfig(budget=5, stride=10)),
    (30, RefreshConfig(budget=1000, stride=3)),
    (40, RefreshConfig(budget=0.125, stride=5)),
    (40, RefreshConfig(budget=1.0, stride=5)),
    (69, RefreshConfig(budget=8, stride=10)),
    (70, RefreshConfig(budget=8, stride=10)),
    (20, RefreshConfig(budget=8, stride=NEVER)),
    (20, RefreshConfig(budget=8, stride=3, threshold=0.0)),
    (20, RefreshConfig(budget=8, stride=1, threshold=-0.2)),
    (20, RefreshConfig(budget=0.3, stride=5, threshold=0.2)),
    (20, RefreshConfig(budget=8, stride=5, threshold=-2.0)),
    (20, RefreshConfig(budget=8, stride=5, threshold=2.0)),
    (20, RefreshConfig(budget=8, stride=5, pool_kernel=1)),
    (20, RefreshConfig(budget=8, stride=5, pool_kernel=13)),
    (20, RefreshConfig(budget=8, stride=5, observation_window=4)),
    (3, RefreshConfig(budget=8, stride=5, observation_window=16)),
    (20, RefreshConfig(budget=8, stride=5, recent_window=3)),
    (20, RefreshConfig(budget=8, stride=5, recent_window=30)),
    (20, RefreshConfig(budget=8, stride=5, sink_tokens=2)),
    (20, RefreshConfig(budget=8, stride=5, sink_tokens=30)),
    (20, RefreshConfig(budget=9, stride=4, observation_window=5, recent_window=3, sink_tokens=2, pool_kernel=3)),
    (20, RefreshConfig(budget=0.4, stride=4, threshold=0.1, observation_window=5, recent_window=3, sink_tokens=2)),
]

# steps that choose again: each select stride, each number of bits, both poolings, each schedule
SCHEDULES = {"never": {"stride": NEVER}, "fixed": {"stride": 5}, "similarity": {"stride": 3, "threshold": 0.0}}
SELECTING = [
    (17, RefreshConfig(budget=8, select_stride=1, score_bits=4, pool_kernel=10, pool_ahead=True, stride=NEVER)),
    (17, RefreshConfig(budget=2, select_stride=7, score_bits=16, stride=NEVER)),
    (1, RefreshConfig(budget=0.9, select_stride=2, score_bits=8, stride=5)),
    (9, RefreshConfig(budget=6, select_stride=2, score_bits=4, stride=7)),
    (17, RefreshConfig.recommended(budget=6)),
    (17, RefreshConfig.recommended(budget=6, select_stride=3, stride=7)),
    (
        20,
        RefreshConfig(
            budget=0.4, select_stride=3, score_bits=8, stride=4, threshold=0.1, pool_ahead=True,
            observation_window=5, recent_window=3, sink_tokens=2,
        ),
    ),
]  # fmt: skip
EVERY_SELECTING = [
    (17, RefreshConfig(budget=8, select_stride=select_stride, score_bits=bits, pool_ahead=ahead, **schedule))
    for select_stride in (1, 2, 3, 7)
    for bits in (16, 8, 4)
    for ahead in (False, True)
    for schedule in SCHEDULES.values()
]


def assert_parity(model, ids, prompt, config, attention_mask=None, offload=False):
    extra = {}
    if attention_mask is not None:
        extra = {"attention_mask": attention_mask, "position_ids": padded_positions(attention_mask)}
    trace = Trace()
    with torch.no_grad():
        parallel = model(ids, simulation=Simulation(prompt, config), trace=trace, use_cache=False, **extra).logits
    sequential, cache = decode_logits(model, ids, prompt, config, attention_mask, offload)
    real = slice(None) if attention_mask is None else attention_mask.bool()
    torch.testing.assert_close(parallel[real], sequential[real], rtol=0, atol=TOLERANCE[model.dtype])
    for layer, flags in trace.full_steps.items():
        assert torch.equal(flags, cache.full_steps[layer]), f"layer {layer} took other full steps"
    for layer, flags in trace.selecting_steps.items():
        assert torch.equal(flags, cache.selecting_steps[layer]), f"layer {layer} took other selecting steps"
    return trace, parallel


# data type and query heads per key/value head, without and with padding: each of them, and the other pairs if slow
PLAIN = [(torch.float64, 1), (torch.float32, 4)]
PADDED = [(torch.float64, 2)]
PAIRS = [(dtype, groups) for dtype in TOLERANCE for groups in (1, 2, 4)]


@pytest.mark.parametrize(
    ("pair", "cases"),
    [
        *((pair, CASES[number :: len(PLAIN)]) for number, pair in enumerate(PLAIN)),  # each case once
        *(pytest.param(pair, CASES, marks=pytest.mark.slow) for pair in PAIRS),
    ],
)
def test_all_cases(pair, cases):
    dtype, groups = pair
    model = tiny_enabled(dtype=dtype, groups=groups)
    ids = random_ids(2, 70)
    for prompt, config in cases:
        assert_parity(model, ids, prompt, config)


@pytest.mark.parametrize("pair", slow_unless(PADDED, PAIRS))
def test_all_cases_with_left_padding(pair):
    dtype, groups = pair
    model = tiny_enabled(dtype=dtype, groups=groups, seed=3)
    ids = random_ids(3, 70, seed=4)
    for prompt, config in CASES:
        assert_parity(model, ids, prompt, config, with_left_padding(ids, prompt))


def with_left_padding(ids, prompt):
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, prompt // 3, prompt - 1]):
        mask[row, :padding] = 0
    return mask


@pytest.mark.parametrize("case", range(len(SELECTING)))
def test_selecting_steps(case):
    prompt, config = SELECTING[case]
    ids = random_ids(3, 45, seed=case)
    assert_parity(tiny_enabled(dtype=torch.float32, groups=4), ids, prompt, config)
    trace, _ = assert_parity(tiny_enabled(seed=3), ids, prompt, config, with_left_padding(ids, prompt))
    assert all(flags.any() for flags in trace.selecting_steps.values())


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_every_selecting_step(pair):
    """Row 0 has no padding; `test_selecting_steps` passes no mask at all."""
    dtype, groups = pair
    model, ids = tiny_enabled(dtype=dtype, groups=groups, seed=3), random_ids(3, 55, seed=4)
    for prompt, config in EVERY_SELECTING + SELECTING:
        assert_parity(model, ids, prompt, config, with_left_padding(ids, prompt))


# a full step computes the steps since the last one again
RECTIFIED = [
    (17, RefreshConfig(budget=8, stride=1, rectify=True)),
    (17, RefreshConfig(budget=3, stride=5, rectify=True)),
    (1, RefreshConfig(budget=8, stride=10, rectify=True)),
    (20, RefreshConfig(budget=8, stride=NEVER, select_stride=3, rectify=True)),
    (20, RefreshConfig(budget=0.4, stride=4, observation_window=7, recent_window=3, sink_tokens=2, rectify=True)),
    (
        20,
        RefreshConfig(
            budget=0.3, stride=7, select_stride=2, score_bits=4, pool_ahead=True, observation_window=3, rectify=True
        ),
    ),
    (44, RefreshConfig(budget=8, stride=3, rectify=True)),
    (45, RefreshConfig(budget=8, stride=3, rectify=True)),
]


@pytest.mark.parametrize("case", range(len(RECTIFIED)))
def test_rectified_full_steps(case):
    prompt, config = RECTIFIED[case]
    ids = random_ids(3, 45, seed=case)
    assert_parity(tiny_enabled(dtype=torch.float32, groups=4), ids, prompt, config)
    assert_parity(tiny_enabled(seed=3), ids, prompt, config, with_left_padding(ids, prompt))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", range(len(RECTIFIED)))
def test_rectified_full_steps_of_every_family(family, case):
    prompt, config = RECTIFIED[case]
    model, ids = tiny_enabled(family=family, layers=3), random_ids(3, 45, seed=case)
    assert_parity(model, ids, prompt, config)
    assert_parity(model, ids, prompt, config, with_left_padding(ids, prompt))


# prompts in chunks: chunks of one token, sinks across chunks, each schedule
CHUNKED = [
    ((5, 6, 17, 30), RefreshConfig(budget=8, stride=5)),
    ((1, 29, 30), RefreshConfig(budget=0.3, stride=3, threshold=0.0)),
    ((3, 9, 20, 30), RefreshConfig(budget=9, stride=7, sink_tokens=5, observation_window=4, recent_window=2)),
    ((10, 20, 30), RefreshConfig(budget=8, select_stride=2, score_bits=4, stride=NEVER, pool_ahead=True)),
    ((30,), RefreshConfig(budget=8, stride=4)),
]


@pytest.mark.parametrize("case", slow_unless([1, 2, 3], range(len(CHUNKED))))
def test_prompts_in_chunks(case):
    """All rows alike; then each row with chunks of its own, some of them within its padding."""
    ends, config = CHUNKED[case]
    model, ids = tiny_enabled(seed=3), random_ids(3, 45, seed=case)
    with torch.no_grad():
        found = model(ids, simulation=Simulation(30, config, chunks=ends)).logits
    for row in range(3):
        torch.testing.assert_close(found[row], decode_chunks(model, ids[row : row + 1], ends, config)[0])
    mask = with_left_padding(ids, 23)  # 0, 7 and 22 columns
    rows = [ends, (12, 30), (23, 25, 30)]
    with torch.no_grad():
        simulation = Simulation(30, config, chunks=rows)
        found = model(
            ids, attention_mask=mask, position_ids=padded_positions(mask), simulation=simulation, use_cache=False
        ).logits
    for row, padding in enumerate((45 - mask.sum(dim=1)).tolist()):
        own = tuple(end - padding for end in rows[row] if end > padding)
        expected = decode_chunks(model, ids[row : row + 1, padding:], own, config)[0]
        torch.testing.assert_close(found[row, padding:], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", slow_unless(["stablelm"], FAMILIES))
def test_prompts_in_chunks_of_every_family(family):
    (ends, config), ids = CHUNKED[2], random_ids(1, 45, seed=5)
    model = tiny_enabled(family=family, layers=3)
    with torch.no_grad():
        found = model(ids, simulation=Simulation(30, config, chunks=ends)).logits
        whole = model(ids, simulation=Simulation(30, config)).logits
    torch.testing.assert_close(found, decode_chunks(model, ids, ends, config), rtol=0, atol=1e-10)
    assert (found - whole)[:, 9:].abs().max() > 1e-3


def test_selecting_steps_of_each_schedule():
    """Which steps select: multiples of the select stride that are not full; layers decide for themselves."""
    model, ids = tiny_enabled(layers=3), random_ids(2, 50)
    for name, schedule in SCHEDULES.items():
        trace = Trace()
        config = RefreshConfig(budget=8, select_stride=3, **schedule)
        with torch.no_grad():
            model(ids, simulation=Simulation(20, config), trace=trace)
        step = torch.arange(50) - 19
        for layer, flags in trace.selecting_steps.items():
            full = trace.full_steps[layer]
            assert torch.equal(flags, (step > 0) & (step % 3 == 0) & ~full)
            assert flags.any()
            if name == "similarity":
                assert full[:, 20:].any()


@pytest.mark.parametrize("score_bits", [16, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_selecting_with_a_budget_beyond_the_row_is_full_attention(schedule, score_bits):
    plain, model, ids = tiny_model(), tiny_enabled(), random_ids(2, 50, seed=7)
    config = RefreshConfig(budget=50, select_stride=2, score_bits=score_bits, **SCHEDULES[schedule])
    with torch.no_grad():
        found = model(ids, simulation=Simulation(11, config)).logits
        torch.testing.assert_close(found, plain(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = tiny_enabled(family=family, layers=3)
    ids = random_ids(2, 45, seed=5)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for prompt, config in (CASES[4], CASES[18], CASES[-2]):
        assert_parity(model, ids, prompt, config)
    assert_parity(model, ids, *CASES[-1], mask)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_layers_keep_their_own_attention(family):
    settings = {
        "layers": 3,
        "sliding_window": 12,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    }
    model, ids = tiny_enabled(family=family, **settings), random_ids(2, 60, seed=6)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    config = RefreshConfig(budget=6, stride=5, threshold=0.0)
    trace, _ = assert_parity(model, ids, 20, config)
    assert set(trace.full_steps) == {0, 2}
    assert_parity(model, ids, 20, config, mask)
    whole = RefreshConfig(budget=100)
    plain = tiny_model(family=family, **settings)
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(model(ids, simulation=Simulation(20, whole)).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_budget_beyond_the_row_is_full_attention(family):
    plain, model = tiny_model(family=family), tiny_enabled(family=family)
    ids = random_ids(2, 50, seed=7)
    with torch.no_grad():
        expected = plain(ids).logits
        for stride in (1, 7, NEVER):
            simulation = Simulation(11, RefreshConfig(budget=50, stride=stride))
            torch.testing.assert_close(model(ids, simulation=simulation).logits, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-10)


def test_left_padded_rows_equal_the_same_rows_alone():
    model, ids = tiny_enabled(), random_ids(2, 60, seed=8)
    config = RefreshConfig(budget=0.3, stride=5, threshold=0.1, observation_window=4, recent_window=3, sink_tokens=2)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    _, batch = assert_parity(model, ids, 30, config, mask)
    with torch.no_grad():
        alone = model(ids[1:, 13:], simulation=Simulation(30 - 13, config)).logits
    torch.testing.assert_close(batch[1:, 13:], alone, rtol=0, atol=1e-10)


def test_rows_and_layers_decide_for_themselves():
    """The similarity cases above would prove little if all rows and layers refreshed together."""
    model = tiny_enabled(layers=3)
    trace, _ = assert_parity(model, random_ids(3, 90), 20, RefreshConfig(budget=8, stride=3, threshold=0.0))
    counts = torch.stack([flags.sum(-1) for flags in trace.full_steps.values()])
    assert len(counts.unique()) > 2
    assert counts.min() > 1 and counts.max() < 24


def test_refreshing_changes_the_numbers():
    """Parity of two paths that both ignored the budget would pass unseen."""
    model, ids = tiny_enabled(), random_ids(2, 70)
    with torch.no_grad():
        full = model(ids).logits
        refreshed, never = (
            model(ids, simulation=Simulation(17, RefreshConfig(budget=8, stride=stride))).logits
            for stride in (5, NEVER)
        )
    assert torch.equal(full[:, :17], refreshed[:, :17])
    assert (full - refreshed)[:, 17:].abs().max() > 1e-3
    assert (never - refreshed)[:, 22:].abs().max() > 1e-3
