"""Tiny random models of the supported families, and decoding one token at a time, for the tests."""

import torch
import transformers
from transformers import DynamicCache

import refreshkv
from refreshkv import RefreshCache, RefreshConfig

CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "stablelm": "StableLm",  # its layers drop keywords that they do not know
    "nemotron": "Nemotron",  # likewise
    "olmo3": "Olmo3",  # passes its layers no use_cache
    "nanochat": "NanoChat",  # likewise
}
FAMILIES = {
    family: (getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM"))
    for family, name in CLASSES.items()
    if hasattr(transformers, f"{name}Config")
}
OWN_SETTINGS = {
    "mistral": {"sliding_window": None},
    "gpt_oss": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma2": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 12,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "mlp_only_layers": [0, 1, 2],  # its router computes in float32
    },
    "mimo_v2_flash": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 12,
        "v_head_dim": 12,
        "mlp_layer_types": ["dense"] * 3,  # its router computes in float32
    },
}
CHANGED = {"gpt_oss": "GptOss", "gemma2": "Gemma2", "qwen3_next": "Qwen3Next", "mimo_v2_flash": "MiMoV2Flash"}
"""Families whose attention or cache is another: sinks, a softcap, recurrent layers, values of another size."""
VOCABULARY = 61


def classes_of(family):
    """The configuration's and the model's class."""
    if family in FAMILIES:
        return FAMILIES[family]
    return tuple(getattr(transformers, f"{CHANGED[family]}{kind}") for kind in ("Config", "ForCausalLM"))


def tiny_model(family="llama", dtype=torch.float64, groups=2, layers=2, seed=0, **settings):
    """A model with 4 query heads and `4 / groups` key/value heads, weights large enough to tell positions apart."""
    config_class, model_class = classes_of(family)
    layers = len(OWN_SETTINGS.get(family, {}).get("layer_types", range(layers)))
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 // groups,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.35,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in CHANGED:
        base["experts_implementation"] = "eager"  # the fast forms know no float64
    if family == "olmo3":
        base["layer_types"] = ["full_attention"] * layers
    base |= OWN_SETTINGS.get(family, {})
    torch.manual_seed(seed)
    return model_class(config_class(**{**base, **settings})).to(dtype).eval()


def tiny_enabled(config=None, **settings):
    return refreshkv.enable(tiny_model(**settings), config or RefreshConfig())


def random_ids(rows, length, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded_positions(attention_mask):
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def decode_logits(model, ids, prompt_length, config, attention_mask=None, offload=False):
    """Logits (B, T, V) of the prompt in one call and then of one known token at a time, and the cache."""
    cache = RefreshCache(model.config, ids.shape[1], config, offload=offload)
    parts = []
    bounds = [0, *range(prompt_length, ids.shape[1] + 1)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        if start >= prompt_length:
            start = end - cache.begin_step()  # a rectified full step takes the tokens since the last one again
        extra = {}
        if attention_mask is not None:
            extra = {
                "attention_mask": attention_mask[:, :end],
                "position_ids": padded_positions(attention_mask)[:, start:end],
            }
        logits = model(ids[:, start:end], past_key_values=cache, use_cache=True, **extra).logits
        parts.append(logits if end == prompt_length else logits[:, -1:])
    return torch.cat(parts, dim=1), cache


@torch.no_grad()
def decode_chunks(model, ids, ends, config):
    """Logits (1, T, V) of one row (1, T) without padding: each chunk of the prompt by itself where it stands, behind
    the sinks, the last one in a cache that holds them all, then one token at a time."""
    sinks, states, parts = DynamicCache(), [], []
    for start, end in zip([0, *ends], ends[:-1], strict=False):
        cache, known = DynamicCache(), min(start, config.sink_tokens)
        for number, layer in enumerate(sinks.layers if known else ()):
            cache.update(layer.keys[:, :, :known], layer.values[:, :, :known], number)
        positions = torch.arange(start, end).unsqueeze(0)
        parts.append(model(ids[:, start:end], past_key_values=cache, position_ids=positions).logits)
        states.append([(layer.keys[:, :, known:], layer.values[:, :, known:]) for layer in cache.layers])
        for number, layer in enumerate(states[-1]):
            sinks.update(*layer, number)
    cache, done = RefreshCache(model.config, ids.shape[1], config), ends[-2] if len(ends) > 1 else 0
    if done:
        for number, layer in enumerate(cache.layers):
            layer.load_prefix(*(torch.cat(blocks, dim=2) for blocks in zip(*(s[number] for s in states), strict=True)))
    for end in range(ends[-1], ids.shape[1] + 1):
        parts.append(model(ids[:, done:end], past_key_values=cache, use_cache=True).logits)
        done = end
    return torch.cat(parts, dim=1)
