"""How far decoding and simulation differ: the largest difference of a logit."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreshkv.cache.keyword import as_keyword
from refreshkv.cache.refresh import RefreshCache
from refreshkv.config import RefreshConfig, Simulation


@torch.no_grad()
def decoding_difference(
    model: PreTrainedModel, ids: Tensor, prompt_length: int, refresh: RefreshConfig
) -> tuple[Tensor, Tensor]:
    """Decodes `ids` (B, T) token by token after a prompt, and compares the logits with those of one simulated pass.

    Returns the largest difference of a logit in each batch row (B,), NaN if one is NaN, and the largest logit ().
    """
    simulated = model(ids, simulation=Simulation(prompt_length, refresh), use_cache=False).logits
    cache = RefreshCache(config=model.config, refresh=refresh, max_cache_len=ids.shape[1])
    blocks = [ids[:, :prompt_length], *ids[:, prompt_length:].split(1, dim=1)]
    decoded = [model(block, **as_keyword(cache), use_cache=True).logits for block in blocks]
    return (torch.cat(decoded, dim=1) - simulated).abs().flatten(1).amax(dim=1), simulated.abs().max()
