"""On a GPU: copies run on a stream of their own, from page-locked memory, and are complete before they are used."""

import pytest
import torch

from refreshkv.attention.dense import DenseAttention
from refreshkv.baselines.full import FullCache
from refreshkv.prefix.recycling import recycle, store_prompts
from refreshkv.prefix.store import PrefixStore
from tests.helpers.models import random_ids, tiny_enabled
from tests.helpers.prefix_stores import STRATEGIES, greedy

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False


def big_model(dtype):
    settings = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "layers": 6, "initializer_range": 0.06}
    return tiny_enabled(dtype=dtype, **settings).cuda()


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "folder"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_recycled_prompts_equal_fresh_ones(name, folder, tmp_path):
    model = big_model(torch.float32)
    store = PrefixStore(tmp_path if folder else None, 10**9, model)
    ids = random_ids(2, 390).cuda()
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    store_prompts(store, ids, mask)
    for rows in (slice(0, 1), slice(0, 2)):
        new = ids[rows].clone()
        new[:, 300:] = random_ids(2, 90, seed=1).cuda()[rows]
        settings = {"attention_mask": mask[rows], "new": 5, "disable_compile": True}
        cache = STRATEGIES[name](model.config)
        assert recycle(store, cache, new, mask[rows]).tokens >= 300 - 30
        found = greedy(model, cache, new, **settings)
        expected = greedy(model, STRATEGIES[name](model.config), new, **settings)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


def test_a_compiled_step_goes_on_from_a_recycled_prompt():
    """A CUDA graph keeps the addresses of buffers, so a cache that is emptied and filled again keeps its buffers."""
    model = big_model(torch.float32)
    store, ids = PrefixStore(None, 10**9, model), random_ids(1, 300).cuda()
    store_prompts(store, ids, torch.ones_like(ids))
    expected, _ = greedy(model, STRATEGIES["fixed"](model.config), ids, new=30)
    cache = STRATEGIES["fixed"](model.config)
    for _ in range(3):
        assert recycle(store, cache, ids).tokens == 298
        assert torch.equal(greedy(model, cache, ids, new=30)[0], expected)
        cache.reset()


def test_memory_of_gpu_tensors_is_page_locked():
    model = big_model(torch.bfloat16)
    store, ids = PrefixStore(None, 10**9, model), random_ids(1, 300).cuda()
    store_prompts(store, ids, torch.ones_like(ids))
    (entry,) = store.entries
    assert all(tensor.is_pinned() for tensor in entry.tensors.values())


@torch.no_grad()
def test_copies_arrive_in_time():
    """Thirty reuses one after the other, in new and in emptied caches, while the GPU is busy with other work."""
    model = big_model(torch.float32)
    store, ids = PrefixStore(None, 10**9, model), random_ids(1, 20000).cuda()
    store_prompts(store, ids, torch.ones_like(ids))
    busy, expected = torch.randn(4096, 4096, device="cuda"), None
    for number in range(30):
        if number % 3 == 0:
            cache = FullCache(model.config, 20010)
        cache.reset()
        busy = (busy @ busy).clamp(-1, 1)
        assert recycle(store, cache, ids).tokens == 19998
        logits = model(ids[:, 19998:], past_key_values=cache, logits_to_keep=1).logits
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected), f"reuse {number}"


@torch.no_grad()
def test_unused_copies_do_not_overwrite_the_next_ones():
    model = big_model(torch.float32)
    store = PrefixStore(None, 10**9, model)
    prompts = [random_ids(1, 20000, seed=seed).cuda() for seed in range(2)]
    for ids in prompts:
        store_prompts(store, ids, torch.ones_like(ids))
    cache, fresh = FullCache(model.config, 20010), FullCache(model.config, 20010)
    for ids in [*prompts * 4, prompts[0]]:
        cache.reset()
        recycle(store, cache, ids)
    recycle(store, fresh, prompts[0])
    logits = [model(prompts[0][:, 19998:], past_key_values=each, logits_to_keep=1).logits for each in (cache, fresh)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [2, 63, 700])
def test_a_later_block_equals_the_mask_in_full(rows, dtype):
    torch.manual_seed(rows)
    query, key, value = (
        torch.randn(2, heads, length, 64, device="cuda", dtype=dtype)
        for heads, length in ((8, rows), (2, 1000), (2, 1000))
    )
    module = big_model(dtype).model.layers[0].self_attn
    module.num_key_value_groups = 4

    def attend(left_padding):
        return DenseAttention(module, left_padding, 0.125, 0.0, None, "sdpa", {})(query, key, value)

    masked = attend(torch.zeros(2, dtype=torch.int64, device="cuda"))  # no padding, but a mask
    torch.testing.assert_close(attend(None), masked, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)
