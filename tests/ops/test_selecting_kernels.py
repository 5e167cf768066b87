"""How the kernels of a selecting step find the threshold: ties, and rows with too many finalists for their list.

`test_step_kernels.py` compares whole steps with the naive form.
"""

import math
from contextlib import nullcontext

import pytest
import torch

from refreshkv import NEVER, RefreshConfig

pytest.importorskip("triton")

import triton
import triton.language as tl

from refreshkv.ops.naive import score_keys
from refreshkv.ops.state import SelectionScratch
from refreshkv.ops.step import launches
from refreshkv.ops.step.selecting import launches as stages
from refreshkv.ops.step.selecting import shares, threshold
from refreshkv.ops.step.selecting import state as selecting_state
from refreshkv.ops.step.selecting.state import Selecting, SelectingScratch
from tests.helpers.interpreter import all_at_once
from tests.helpers.marks import slow_tuples_unless, slow_unless
from tests.ops import test_step_kernels
from tests.ops.test_step_kernels import DEVICE, compare, drawn, prompted_layer

# value of all keys, room for finalists, budget
TIES = [(0.0, 1024, 5), (1.0, 1024, 5), (0.0, 16, 5), (1.0, 16, 5), (0.0, 16, 37), (1.0, 16, 37)]


@pytest.mark.parametrize(("value", "finalists", "budget"), slow_tuples_unless([(1.0, 1024, 5), (1.0, 16, 37)], TIES))
def test_ties_go_to_the_lower_position(value, finalists, budget, monkeypatch):
    """Equal keys all tie; the limit is found among the finalists, or in the whole row if there are too many."""
    monkeypatch.setattr(threshold, "MOST_FINALISTS", finalists)
    key = torch.full((2, 1, 60, 16), value, device=DEVICE)
    query = key.repeat(1, 2, 1, 1)
    config = RefreshConfig(budget=budget, stride=NEVER, select_stride=1, score_bits=4)
    layer = prompted_layer(query, key, key, torch.tensor([0, 9], device=DEVICE), config, 70)
    token = (query[:, :, :1], key[:, :, :1], key[:, :, :1])
    launches.decode_step(*token, layer.state(), config.step_options(), 0.25, layer.selecting_state())
    for row, first in enumerate([0, 9]):
        expected = [*range(first, first + budget - 1), 60]
        assert layer.selected[row, 0].sort().values.tolist() == expected


@pytest.mark.parametrize(
    ("dtype", "bits", "head_dim", "group", "observers", "scale"),
    slow_tuples_unless(
        [(torch.bfloat16, 4, 128, 4, 1, 1.0), (torch.float16, 8, 48, 3, 3, 100.0)],
        [
            (torch.bfloat16, 4, 128, 4, 1, 1.0),
            (torch.bfloat16, 4, 64, 3, 2, 1e-20),
            (torch.bfloat16, 8, 128, 7, 1, 1e20),
            (torch.float16, 8, 48, 3, 3, 100.0),
            (torch.float16, 4, 256, 1, 1, 1.0),
        ],
    ),
)
@pytest.mark.parametrize("narrow", [False, True])
def test_logits_of_bytes(dtype, bits, head_dim, group, observers, scale, narrow, monkeypatch):
    """Products of whole numbers are those of the queries, but for a ten-thousandth of the logits' spread or two; logits
    of 16 bits are rounded besides."""
    monkeypatch.setattr(selecting_state, "l2_bytes", lambda device: 0 if narrow else 2**30)
    tolerance = 1e-4 if dtype == torch.bfloat16 else 2e-4
    generator = torch.Generator().manual_seed(0)
    kept = {"score_bits": bits, "observation_window": observers, "pool_kernel": 1}
    config = RefreshConfig(budget=9, stride=NEVER, select_stride=1, **kept)
    block = [drawn(generator, heads, 300, head_dim, dtype) for heads in (2 * group, 2, 2)]
    padding = torch.tensor([0, 5], device=DEVICE)
    block[0] = block[0] * scale
    layer = prompted_layer(*block, padding, config, 310)
    token = [drawn(generator, heads, 1, head_dim, dtype) for heads in (2 * group, 2, 2)]
    token[0] = token[0] * scale
    options = config.step_options()
    scratch = SelectingScratch.empty(layer.keys, layer.observers, options)
    selecting = Selecting(layer.selecting_state(), scratch, options)
    step = SelectionScratch.empty((2,), 2, 310, head_dim, layer.keys.device)
    launches.attend(*token, layer.state(), 1 / scale, options=options, scratch=step, selecting=selecting)
    queries = torch.cat([block[0], token[0]], 2)[:, :, -observers:].double()
    keys = score_keys.dequantize(layer.score_codes, layer.score_scales).double()[:, :, :301]
    expected = queries.unflatten(1, (2, group)) @ keys.unsqueeze(2).mT / scale / math.log(2)
    assert scratch.logits.dtype == (torch.float16 if narrow else torch.float32)
    middle = scratch.middle.unsqueeze(-1).double() if narrow else torch.zeros(2, 2, observers * group, 1, device=DEVICE)
    found = scratch.logits[..., :301].double() + middle
    found, middle = (x.unflatten(2, (observers, group)).transpose(2, 3) for x in (found, middle))
    for number in range(observers):
        sees = 301 - observers + number + 1
        for row, first in enumerate(padding.tolist()):
            wanted, ours = (x[row, :, :, number, first:sees] for x in (expected, found))
            rounded = (wanted - middle[row, :, :, number]).abs() * 2**-11 if narrow else 0.0
            assert ((ours - wanted).abs() <= tolerance * wanted.std() + rounded).all()
            assert not narrow or (middle[row, :, :, number, 0] - wanted.mean(-1)).abs().max() < wanted.std() / 2
            assert (found[row, :, :, number, sees:] == -math.inf).all()


@pytest.mark.parametrize("dtype", slow_unless([torch.bfloat16], [torch.bfloat16, torch.float16]))
@pytest.mark.parametrize(("sinks", "narrow"), slow_tuples_unless([(3, True)], [(0, False), (0, True), (3, True)]))
def test_choices_of_16_bit_caches(dtype, sinks, narrow, monkeypatch):
    """What a step chooses scores as high as what it leaves, but for half a percent; with logits of 32 bits but for a
    thousandth."""
    monkeypatch.setattr(selecting_state, "l2_bytes", lambda device: 0 if narrow else 2**30)
    generator = torch.Generator().manual_seed(1)
    settings = {"score_bits": 4, "pool_kernel": 2, "pool_ahead": True, "sink_tokens": sinks}
    config = RefreshConfig(budget=90, stride=NEVER, select_stride=1, **settings)
    block = [drawn(generator, heads, 700, 64, dtype) for heads in (6, 2, 2)]
    block[1] += 3.0  # logits are far from 0, and alike for all positions
    padding = [0, 5]
    layer = prompted_layer(*block, torch.tensor(padding, device=DEVICE), config, 703)
    for position in range(700, 702):
        query, key, value = (drawn(generator, heads, 1, 64, dtype) for heads in (6, 2, 2))
        launches.decode_step(query, key, value, layer.state(), config.step_options(), 0.125, layer.selecting_state())
        keys = score_keys.dequantize(layer.score_codes, layer.score_scales).double()[:, :, : position + 1]
        logits = (query.double().unflatten(1, (2, 3)) @ keys.unsqueeze(2).mT).squeeze(3) * 0.125
        for row, first in enumerate(padding):
            scores = logits[row, ..., first:].softmax(-1).amax(1)
            scores[:, 1:] = torch.maximum(scores[:, 1:], scores[:, :-1].clone())
            scores[:, :sinks], scores[:, -1] = 1.0, 1.0
            kept = layer.selected[row, :, :90].long() - first
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)
            assert (chosen.sum(1) == 90).all()
            least = scores.masked_fill(~chosen, 1.0).amin(1)
            assert (scores.masked_fill(chosen, 0.0).amax(1) < least * (1.005 if narrow else 1.001)).all()


@pytest.mark.parametrize(
    ("budget", "towering"),
    slow_tuples_unless([(400, False), (9, True)], [(400, False), (400, True), (9, False), (9, True)]),
)
def test_whatever_the_memory_holds(budget, towering, monkeypatch):
    """Positions that do not exist are not chosen, whatever was in memory; nor do logits of 16 bits that are far above
    the others keep sinks and the step's own position out."""
    empty = SelectingScratch.empty

    def filled(*args):
        scratch = empty(*args)
        for tensor in scratch:
            tensor.fill_(math.nan if tensor.is_floating_point() else 0x7FFFFFF0)
        return scratch

    monkeypatch.setattr(SelectingScratch, "empty", filled)
    monkeypatch.setattr(selecting_state, "l2_bytes", lambda device: 0)
    generator = torch.Generator().manual_seed(2)
    settings = {"score_bits": 8, "pool_kernel": 1, "sink_tokens": 2}
    config = RefreshConfig(budget=budget, stride=NEVER, select_stride=1, **settings)
    query, key, value = (drawn(generator, heads, 300, 64, torch.float16) for heads in (4, 2, 2))
    padding = torch.tensor([0, 37], device=DEVICE)
    token = [drawn(generator, heads, 1, 64, torch.float16) for heads in (4, 2, 2)]
    if towering:
        key[:, :, [0, 37, 38, 200]], token[0] = 300.0, token[0].abs() * 60
    layer = prompted_layer(query, key, value, padding, config, 310)
    launches.decode_step(*token, layer.state(), config.step_options(), 0.125, layer.selecting_state())
    for row, first in enumerate(padding.tolist()):
        size = min(budget, 301 - first)
        for head in layer.selected[row, :, :size].tolist():
            assert len(set(head)) == size and {first, first + 1, 300} <= set(head)
            assert first <= min(head) and max(head) == 300
            assert not towering or 200 in head


@triton.jit
def resolve(finalists, numbers, choice, MOST: tl.constexpr, FEW: tl.constexpr):
    count, keep, low, high = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    if count <= FEW:
        least, limit = threshold.resolve_few(finalists, count, keep, MOST, FEW)
    else:
        least, limit = threshold.resolve(finalists, count, keep, low, high, tl.load(numbers + 4), MOST)
    tl.store(choice, least)
    tl.store(choice + 1, limit)


@pytest.mark.parametrize("spread", [1, 2, 3, 5, 40, 2**20, 2**24])
@pytest.mark.parametrize("few", [1, 64])
def test_finalists_are_resolved_exactly(spread, few):
    """Rankings of which few or many differ, against a sort."""
    generator, low, places = torch.Generator().manual_seed(spread), 1000, 500
    for count, keep in ((1, 1), (2, 1), (40, 7), (40, 40), (64, 63)):
        rankings = torch.randint(low, low + spread, (64,), generator=generator)
        positions = torch.randperm(places, generator=generator)[:64]
        numbers = torch.tensor([count, keep, low, low + spread, places], dtype=torch.int32, device=DEVICE)
        finalists, choice = torch.cat([positions, rankings]).int().to(DEVICE), torch.zeros_like(numbers)
        resolve[1,](finalists, numbers, choice, MOST=64, FEW=few)
        least, limit = choice[:2].tolist()
        pairs = list(zip((-rankings[:count]).tolist(), positions[:count].tolist(), strict=True))
        expected = {position for _, position in sorted(pairs)[:keep]}
        assert {p for ranking, p in pairs if -ranking > least or (-ranking == least and p <= limit)} == expected


@pytest.mark.slow
@pytest.mark.parametrize("windows", [{}, {"sink_tokens": 70}])
def test_search_equals_resolving(monkeypatch, windows):
    """With little room for finalists, the whole row is searched."""
    monkeypatch.setattr(threshold, "MOST_FINALISTS", 1)
    monkeypatch.setattr(shares, "RANKED", 64)
    config = RefreshConfig(budget=60, stride=NEVER, select_stride=1, score_bits=4, **windows)
    compare((300, 2, 2, 2, 16, 33, config))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", [{}, {"pool_ahead": True, "pool_kernel": 2}])
def test_several_blocks_and_programs(pooling):
    config = RefreshConfig(budget=300, stride=NEVER, select_stride=1, score_bits=4, **pooling)
    compare((2200, 2, 2, 1, 16, 33, config))


WINDOWS = {
    "as recommended": {"pool_ahead": True, "pool_kernel": 2},
    "a wide window": {"sink_tokens": 3, "recent_window": 5},
    "observers": {"observation_window": 3, "pool_kernel": 1},
    "search": {"sink_tokens": 40},
}


@pytest.mark.parametrize("name", slow_unless(["as recommended"], WINDOWS))
def test_one_launch_does_all_stages(name, monkeypatch):
    """Programs that wait for each other, several to a row, as on a GPU that runs them all at once."""
    monkeypatch.setattr(stages, "run_at_once", lambda *_: True)
    if name == "search":
        monkeypatch.setattr(threshold, "MOST_FINALISTS", 1)
    config = RefreshConfig(budget=30, stride=NEVER, select_stride=2, score_bits=4, **WINDOWS[name])
    with nullcontext() if DEVICE == "cuda" else all_at_once():
        compare((150, 4, 2, 1, 16, 33, config))


@pytest.mark.parametrize("scale", slow_unless([3.0], [1.0, 2.0, 3.0]))
@pytest.mark.parametrize("budget", slow_unless([30], [6, 30, 120]))
def test_thresholds_in_wide_bins(scale, budget, monkeypatch):
    """Logits spread so far that the threshold lies many powers of two below the highest possible one."""
    monkeypatch.setattr(test_step_kernels, "drawn", lambda *shape: scale * drawn(*shape))
    config = RefreshConfig(budget=budget, stride=NEVER, select_stride=1, score_bits=4, pool_kernel=1)
    compare((150, 3, 2, 1, 16, 33, config))
