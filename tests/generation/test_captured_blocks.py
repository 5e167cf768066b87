"""Blocks of drafts that are captured once and replayed give the tokens of blocks that the host leads."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refreshkv import NEVER, DraftCounts, RefreshCache, RefreshConfig, decode_lossless
from refreshkv.generation import graphs, lossless
from refreshkv.generation.compiled_block import block_inputs
from tests.generation.test_generate import left_padded
from tests.generation.test_lossless import DRAFTS, PADDINGS
from tests.helpers.models import random_ids, tiny_enabled, tiny_model

CONFIGS = {
    "4 bits, observers": DRAFTS,
    "similarity beside": RefreshConfig(budget=0.3, stride=3, threshold=0.1, select_stride=2, score_bits=8),
    "16 bits": RefreshConfig(budget=5, stride=NEVER, select_stride=3, recent_window=2),
}
HOST_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


class Recording(TorchDispatchMode):
    """Records operations, and replays them on the same memory as a CUDA graph does: numbers and shapes that the host
    took part in stay what they were."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in HOST_READS, f"{func} would wait for the device"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Makes decode_lossless capture by `Recording` on the CPU, from a cache; returns the list of recordings."""
    recordings = []

    def install(model, cache):
        def capture(work, inputs, pool):
            states = [value for layer in cache.layers for value in vars(layer).values()]
            states = [value for value in (*states, *cache.row_tensors.values()) if isinstance(value, torch.Tensor)]
            before = [state.clone() for state in states]
            with (recording := Recording()):
                output = work(*inputs)
            for state, value in zip(states, before, strict=True):  # a capture runs nothing
                state.copy_(value)
            recordings.append(recording)
            return recording.replay, output

        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(lossless, "can_capture", lambda model, cache: True)
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda kwargs, config: True, raising=False)
        monkeypatch.setattr(model, "get_compiled_call", lambda config: model.__call__, raising=False)
        return recordings

    return install


def as_compiled(model):
    """`compiled_block` without torch.compile, which refuses to work under a recording: the same operators."""

    def run(tokens, positions, padding, columns, cache):
        return model(**block_inputs(tokens, positions, padding, cache)).logits.float()

    return run


@pytest.mark.parametrize(("name", "compiles"), [*((name, False) for name in CONFIGS), ("4 bits, observers", True)])
def test_replayed_blocks_give_the_same_tokens(name, compiles, recorded, monkeypatch):
    """In two texts from one cache, whose rows accept different numbers and end at different times."""
    monkeypatch.setattr(lossless, "compiled_block", as_compiled)
    plain, model = tiny_model(layers=2), tiny_enabled(layers=2)
    cache = RefreshCache(model.config, 130, CONFIGS[name])
    recordings = recorded(model, cache)
    own = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24}
    for seed in (1, 2):
        ids, mask = left_padded(random_ids(8, 80, seed=seed), PADDINGS)
        free = plain.generate(ids, attention_mask=mask, eos_token_id=None, **own)
        own |= {"attention_mask": mask, "eos_token_id": [int(free[0, 85]), int(free[3, 93])]}
        expected, counts = plain.generate(ids, **own), DraftCounts()
        cache.reset()
        settings = {"past_key_values": cache, "custom_generate": decode_lossless, "draft_length": 3, "drafts": counts}
        settings["compile_blocks"] = compiles
        assert torch.equal(model.generate(ids, **own, **settings), expected)
        assert counts.rounds > 6 and 0 < counts.accepted < counts.judged
        own.pop("attention_mask"), own.pop("eos_token_id")
        captured = cache.graphs.captured()
        assert len(recordings) == len(captured), "each of them once, for both texts"
        kind = "compiled " if compiles else ""
        assert {(f"{kind}block", 4), (f"{kind}accept", 4)} <= set(captured)
    assert cache.exact_length == cache.length and not cache.selecting_steps[:, :, 80:].any()


def test_another_batch_is_captured_again(recorded):
    model, found = tiny_enabled(layers=2), []
    cache = RefreshCache(model.config, 60, DRAFTS)
    recorded(model, cache)
    for batch in (2, 2, 3):
        ids = random_ids(batch, 20)
        cache.reset()
        settings = {"past_key_values": cache, "custom_generate": decode_lossless, "draft_length": 2}
        settings |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 15}
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        found.append((tokens[:2], cache.graphs))
    (first, graphs_of_two), (second, still), (third, graphs_of_three) = found
    assert graphs_of_two is still and graphs_of_three is not still
    assert torch.equal(first, second) and torch.equal(first, third[:, : first.shape[1]])
    assert copy.deepcopy(cache).graphs is None
