"""What the tests of the prefix store share: caches of all strategies, and runs with and without a store."""

import torch
from transformers import DynamicCache

from refreshkv import RefreshCache, RefreshConfig
from refreshkv.baselines.cascading import CascadingCache
from refreshkv.baselines.full import FullCache
from refreshkv.baselines.snapkv import SnapKVCache
from refreshkv.baselines.streaming import StreamingCache
from refreshkv.prefix.prompt_cache import PromptCache
from tests.helpers.models import VOCABULARY

ROOM = 400
FIXED = RefreshConfig(budget=6, stride=4)
SIMILAR = RefreshConfig(
    budget=0.3, stride=3, threshold=0.1, observation_window=4, recent_window=2, sink_tokens=1, pool_kernel=3
)
SELECTING = RefreshConfig(budget=6, stride=9, select_stride=2, score_bits=4)
STRATEGIES = {
    "full": lambda config: DynamicCache(config=config),
    "full, buffers": lambda config: FullCache(config, ROOM),
    "fixed": lambda config: RefreshCache(config, ROOM, FIXED),
    "similarity": lambda config: RefreshCache(config, ROOM, SIMILAR),
    "selecting": lambda config: RefreshCache(config, ROOM, SELECTING),
    "streaming": lambda config: StreamingCache(config, ROOM, 0.3),
    "cascading": lambda config: CascadingCache(config, ROOM, 0.3, 2),
    "snapkv": lambda config: SnapKVCache(config, ROOM, 0.3),
    "snapkv, the authors'": lambda config: SnapKVCache(config, ROOM, 0.3, 8, 5, "average"),
}


def ids_of(generator, length):
    return torch.randint(3, VOCABULARY, (1, length), generator=generator)


def overlapping(generator, length, overlap, other):
    """A prompt (1, length), and one of `other` tokens of which the first `overlap` and no more are the same."""
    first, second = ids_of(generator, length), ids_of(generator, other)
    second[:, :overlap] = first[:, :overlap]
    if overlap < min(length, other) and second[0, overlap] == first[0, overlap]:
        second[0, overlap] = 3 + (first[0, overlap] - 2) % (VOCABULARY - 3)
    return first, second


@torch.no_grad()
def remember(model, store, ids):
    """Computes a prompt (1, P) and stores it, with a cache that has nothing to do with the store's other entries."""
    cache = PromptCache(model.config, ids.shape[1])
    model(ids, past_key_values=cache)
    return store.put(ids, cache)


@torch.no_grad()
def known_tokens(model, cache, ids, prompt, mask=None):
    """Logits (B, n, V) of the columns that the cache lacks: the rest of the prompt at once, then token by token."""
    start, parts = int(cache.get_seq_length()), []
    for end in range(prompt, ids.shape[1] + 1):
        extra = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            extra = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        parts.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **extra).logits)
        start = end
    return torch.cat(parts, dim=1)


def greedy(model, cache, ids, new=6, **settings):
    """Sequences (B, P + new), and the logits (B, new, V) that chose them."""
    output = model.generate(
        ids,
        attention_mask=settings.pop("attention_mask", torch.ones_like(ids)),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return output.sequences, torch.stack(output.logits, dim=1)
