"""Tiny random models of every decoder family of the installed transformers, by one rule for their sizes.

The families are those of transformers' own tables of causal language models and of models that read images and text.
A configuration's fields get small values by their names, in nested configurations too; what a family needs besides
stands in `OVERRIDES`.
"""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from refreshkv.layers import layer_kinds
from refreshkv.settings import SettingsError

VOCABULARY = 61
WINDOW = 12
"""Tokens of sliding windows, far fewer than a trial's texts have."""
LARGEST = 5_000_000
"""Parameters of a model that is still tiny."""
LAYERS = (2, 3, 4, 6, 8)
"""Numbers of layers that are tried, until one of the layers has full attention."""


def _named(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_named("hidden_size d_model n_embd dim embed_dim word_embed_dim embedding_size emb_dim out_hidden_size", 32),
    **_named("vocab_size vocab_size_per_layer_input text_vocab_size unpadded_vocab_size", VOCABULARY),
    **_named("intermediate_size ffn_dim n_inner ffn_hidden_size mlp_dim d_ff decoder_ffn_dim encoder_ffn_dim", 48),
    **_named("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    **_named("num_key_value_heads num_kv_heads swa_num_key_value_heads num_global_key_value_heads", 2),
    **_named("head_dim global_head_dim swa_head_dim attention_head_dim kv_channels d_kv", 8),
    **_named("max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length", 256),
    **_named("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_named("num_experts_per_tok num_experts_per_token moe_topk top_k_experts moe_k", 2),
    **_named("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size", 16),
    **_named("shared_intermediate_size moe_shared_expert_intermediate_size", 16),
    **_named("n_group topk_group num_expert_group first_k_dense_replace n_shared_experts", 1),
    **_named("kv_lora_rank qk_nope_head_dim", 8),
    **_named("q_lora_rank mamba_dt_rank router_hidden_size o_lora_rank", 16),
    **_named("v_head_dim", 12),
    **_named("qk_rope_head_dim", 8),
    **_named("linear_num_key_heads linear_num_value_heads", 2),
    **_named("linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
    **_named("linear_num_heads", 4),
    **_named("mamba_d_state mamba_d_head mamba_head_dim mamba_headdim mamba_chunk_size ssm_state_size state_size", 8),
    **_named("mamba_n_heads mamba_num_heads n_mamba_heads", 8),
    **_named("mamba_n_groups mamba_ngroups n_groups", 1),
    **_named("hidden_size_per_layer_input laurel_rank projection_dim adapter_rank", 8),
    **_named("sliding_window attention_window local_attention local_attention_window", WINDOW),
    **_named("depth encoder_layers decoder_layers num_encoder_layers", 2),
    **_named("attn_layer_period full_attention_interval sliding_window_pattern global_attn_every_n_layers", 2),
    **_named("attn_layer_offset", 1),
    **_named("is_decoder", True),
    **_named("rotary_dim", 4),
    **_named("image_size", 16),
    **_named("patch_size output_channels", 8),
    **_named("hidden_size_global text_hidden_size vision_hidden_size projector_hidden_size", 32),
    **_named("alignment_intermediate_size projection_intermediate_size", 32),
}
"""Names of a configuration's fields -> tiny values. A field that is None by default stays so, but for `NEEDED`."""
NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
"""Fields that some families have no default for."""

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WITHOUT_WINDOWS = {"sliding_window": None}
"""For families whose layers all have a window by default, and whose checkpoints often have none."""
NO_DROPOUT = _named(
    "attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout dropout activation_dropout layerdrop "
    "attention_probs_dropout_prob hidden_dropout_prob attn_dropout ffn_dropout dropout_rate embedding_dropout",
    0.0,
)
LARGE_WEIGHTS = _named("initializer_range init_std", 0.2)
"""Large enough that each position gets scores of its own."""

EXPERTS: dict[str, Any] = {"experts_implementation": "eager"}
"""Experts one by one: the fast forms know no float64."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TWO_ROPES = {"full_attention": ROPE, "sliding_attention": ROPE}
ROTARY_SECTIONS = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
"""Time, height and width of a token's position, in heads of 8."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "chameleon": {"vocabulary_map": {"<image>": 5}, "image_token_id": 5},
    "chameleon_vqgan": {"base_channels": 32, "latent_channels": 32, "channel_multiplier": (1,), "num_res_blocks": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "rope_parameters": TWO_ROPES,
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [8, 32]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16], **ROTARY_SECTIONS},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "glm4v_moe_text": {"rope_parameters": {**ROTARY_SECTIONS["rope_parameters"], "partial_rotary_factor": 1.0}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global"], 2]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}},
    "janus_vqgan": {
        "base_channels": 32, "latent_channels": 32, "channel_multiplier": (1,), "num_res_blocks": 1,
        "num_embeddings": 16, "image_token_embed_dim": 32, "num_patches": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "molmo2_vision": {"image_size": [16, 16], "num_position_embeddings": 4},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 8, 8), "depths": (1, 1, 1, 1)},
    "muse_spark_text": {"moe_hidden_size": 16},
    "phi4_multimodal_audio": {
        "num_blocks": 1, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
    },
    "phi4_multimodal_vision": {"crop_size": 16},
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), {"vision_start_token_id": VOCABULARY - 1}),
    "qwen4_exp_text": {
        "num_hidden_layers": 4, "hc_lowrank": 8, "ple_embed_dim": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 32},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16)},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "siglip_vision_model": {"vision_use_head": False},
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2, "sliding_window": WINDOW,
        "rope_parameters": TWO_ROPES, "mlp_layer_types": ["dense", "sparse"], "share_expert_dim": 16,
        "num_sliding_attention_heads": 4,
    },
    "unlimited_ocr_sam_vision_model": {"downsample_channels": (8, 32)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 2,
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2, "hybrid_layer_ids": [1],
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "num_query_groups": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(
        (
            "cosmos3_edge_text", "glm46v_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text",
            "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_omni_moe_text",
        ),
        ROTARY_SECTIONS,
    ),
}  # fmt: skip
"""Families whose sizes hang together in their own way; nested configurations by their own model types."""


def families() -> dict[str, str]:
    """transformers' tables of causal language models and of models that read images and text: model type -> name of the
    model's class, the former's where a model type is in both."""
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return {name: str(model_class) for name, model_class in sorted(names.items())}


def tiny_config(family: str) -> PretrainedConfig:
    """A tiny configuration of a family (a model type), with a layer of full attention if the family has any.

    Raises what the configuration's class raises for such sizes.
    """
    found = None
    for layers, changes in (*((layers, {}) for layers in LAYERS), (LAYERS[0], WITHOUT_WINDOWS)):
        changed = {name: value for name, value in changes.items() if hasattr(found, name)}
        last, found = found, _tiny(CONFIG_MAPPING[family], family, layers, changed)
        try:
            if any(kind.is_refreshed for kind in layer_kinds(found)):
                return found
        except SettingsError:
            return found  # `enable` says why
    assert last is not None  # there are several numbers of layers
    return last


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a family, in evaluation mode."""
    config = tiny_config(family)
    is_text = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto: Any = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    with torch.device("meta"):
        size = auto.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"its smallest model here has {size:,} parameters: OVERRIDES lacks this family's sizes")
    torch.manual_seed(seed)
    model: Any = auto.from_config(config, dtype=dtype, **EXPERTS)
    return model.eval()


def _tiny(config_class: Any, family: str, layers: int, changes: dict[str, Any]) -> PretrainedConfig:
    return config_class(**{**_values(config_class(), layers), **OVERRIDES.get(family, {}), **changes})


def _values(plain: PretrainedConfig, layers: int) -> dict[str, Any]:
    """The tiny values of a configuration's fields, by name."""
    fields, mapped = _fields(plain), set(plain.attribute_map)
    rule = {**SIZES, **SPECIAL_TOKENS, **NO_DROPOUT, **LARGE_WEIGHTS, **dict.fromkeys(LAYER_COUNTS, layers)}
    values = {
        name: value
        for name, value in rule.items()
        if name in fields and name not in mapped and (fields[name] is not None or name in (*SPECIAL_TOKENS, *NEEDED))
    }
    values |= {name: int(value) for name, value in values.items() if type(fields[name]) is int and value == 0}
    if "kv_lora_rank" in fields:  # its heads are expanded from one compressed vector: no head is shared
        values |= {name: SIZES["num_attention_heads"] for name in ("num_key_value_heads",) if name in values}
    for name in plain.sub_configs:
        nested = getattr(plain, name, None)
        if isinstance(nested, PretrainedConfig):
            changes = OVERRIDES.get(nested.model_type, {})
            values[name] = type(nested)(**{**_values(nested, layers), **changes}).to_dict()
    return values


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def is_known(model_type: str) -> bool:
    """Whether the installed transformers has a configuration of this model type."""
    try:
        AutoConfig.for_model(model_type)
    except ValueError:
        return False
    return True
