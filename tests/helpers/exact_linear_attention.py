"""Linear attention of transformers' hybrids token by token, in whole passes too.

transformers computes parts of it in float32, and a whole pass in another order than steps: differences of ours below
1e-5 would stay hidden. One token at a time, whole passes and steps do the same arithmetic to the last bit.
"""

import torch
from transformers import DynamicCache


def use_exact_linear_attention(monkeypatch, model):
    """Lets the linear layers of `model` take one token at a time."""
    layers = [module.linear_attn for module in model.modules() if hasattr(module, "linear_attn")]
    forward = type(layers[0]).forward

    def token_by_token(layer, hidden_states, cache_params=None, cache=None, attention_mask=None, **kwargs):
        cache = cache_params if cache is None else cache  # its name up to transformers 5.23
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        cache = DynamicCache(config=model.config) if cache is None else cache
        return torch.cat([forward(layer, token, cache, None) for token in hidden_states.split(1, dim=1)], dim=1)

    monkeypatch.setattr(type(layers[0]), "forward", token_by_token)
