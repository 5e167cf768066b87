"""On a GPU: lossless decoding whose blocks are CUDA graphs gives the tokens of the blocks that the host launches."""

import pytest
import torch

from refreshkv import NEVER, DraftCounts, RefreshCache, RefreshConfig, decode_lossless
from tests.generation.test_generate import left_padded
from tests.helpers.models import random_ids, tiny_enabled, tiny_model

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CONFIGS = {
    "4 bits": RefreshConfig(budget=6, stride=NEVER, select_stride=2, score_bits=4, observation_window=4),
    "16 bits": RefreshConfig(budget=12, stride=NEVER, select_stride=3),
}


@pytest.fixture(autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False


def generate(model, cache, ids, mask, **settings):
    own = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 60, "attention_mask": mask}
    cache.reset()
    return model.generate(ids, past_key_values=cache, custom_generate=decode_lossless, **own | settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_blocks_give_the_same_tokens(name, dtype, monkeypatch):
    """Two texts from one cache; in bfloat16 the blocks attend by the kernel for a few tokens behind many."""
    model = tiny_enabled(layers=2, dtype=dtype, head_dim=16).cuda()
    monkeypatch.setattr(model, "get_compiled_call", lambda config: model.__call__, raising=False)
    cache, other = (RefreshCache(model.config, 200, CONFIGS[name]) for _ in range(2))
    for seed in (1, 2):
        ids, mask = (part.cuda() for part in left_padded(random_ids(4, 100, seed=seed), [0, 3, 0, 40]))
        found = generate(model, cache, ids, mask, draft_length=3, drafts=(counts := DraftCounts()))
        assert torch.equal(found, generate(model, other, ids, mask, draft_length=3, disable_compile=True))
        assert 0 < counts.accepted < counts.judged and other.graphs is None
        assert {("block", 4), ("accept", 4)} <= set(cache.graphs.captured())


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_compiled_steps_and_captured_blocks_give_full_attention_s_tokens(compile_blocks):
    plain, model = (make(layers=2, dtype=torch.float32, head_dim=16).cuda() for make in (tiny_model, tiny_enabled))
    ids, mask = (part.cuda() for part in left_padded(random_ids(4, 100), [0, 3, 0, 40]))
    own = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 60}
    expected = plain.generate(ids, attention_mask=mask, **own)
    cache = RefreshCache(model.config, 200, CONFIGS["4 bits"])
    for _ in range(2):
        assert torch.equal(generate(model, cache, ids, mask, compile_blocks=compile_blocks), expected)
    assert {name.startswith("compiled") for name, _ in cache.graphs.captured()} == {compile_blocks}
    # all texts end while the next round's first step is queued
    own["eos_token_id"] = [int(row[20 + number]) for number, row in enumerate(expected[:, 100:])]
    expected = plain.generate(ids, attention_mask=mask, **own)
    settings = {"eos_token_id": own["eos_token_id"], "compile_blocks": compile_blocks}
    assert torch.equal(generate(model, cache, ids, mask, **settings), expected)
    text = torch.cat([expected, random_ids(4, 3, seed=3).cuda()], dim=1)
    mask = torch.cat([mask, mask.new_ones(4, text.shape[1] - 100)], dim=1)
    own |= {"max_new_tokens": 20, "eos_token_id": None, "attention_mask": mask}
    found = model.generate(text, past_key_values=cache, custom_generate=decode_lossless, **own)
    assert torch.equal(found, plain.generate(text, **own))
