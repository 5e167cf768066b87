"""Prompts with an image, in tiny random models of some families that read images (`refreshkv models --try`).

1. With a budget of at least the text's length, tokens and logits are those of the model's own attention.
2. With a small budget they are those of the simulated pass over the same tokens, image and positions included.
3. The image's encoder keeps its own attention.

Shapes: `B` batch rows, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from refreshkv.attention.enable import enable
from refreshkv.cache.keyword import as_keyword
from refreshkv.cache.refresh import RefreshCache
from refreshkv.config import RefreshConfig, Simulation
from refreshkv.families.trial import Failed, Outcome, layers_of, outcome_of_error, quiet

IMAGE, VIDEO, BEFORE, BEHIND, VOCABULARY = 90, 91, 92, 93, 96
PROMPT, NEW = 24, 10
ROUNDING = 2e-6
"""Largest difference of logits in float32."""
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.35,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}


def build(family: str, **settings: Any) -> Any:
    """A random model in float64, in evaluation mode."""
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).double().eval()


def qwen(family: str) -> Any:
    """Each token has three positions: time, height and width."""
    vision: dict[str, Any] = {
        "depth": 1,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family == "Qwen2VL":
        vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16}
        vision["fullatt_block_indexes"] = [0]
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    return build(
        family, text_config={**TEXT, "rope_parameters": rotary}, vision_config=vision, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=BEFORE, vision_end_token_id=BEHIND,
    )  # fmt: skip


def llava() -> Any:
    vision = {**VISION, "model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16}
    text = {**TEXT, "model_type": "llama"}
    settings = {"image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_layer": -1}
    return build("Llava", text_config=text, vision_config=vision, **settings)


def idefics(family: str) -> Any:
    text, vision = {**TEXT, "model_type": "llama"}, {**VISION, "image_size": 16}
    settings = {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0}
    return build(family, text_config=text, vision_config=vision, **settings)


def gemma3() -> Any:
    vision, text = {**VISION, "image_size": 16}, {**TEXT, "sliding_window": 12, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["full_attention", "sliding_attention"]
    settings = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": BEFORE}
    return build("Gemma3", text_config=text, vision_config=vision, eoi_token_index=BEHIND, **settings)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: qwen("Qwen2VL"),
    "llava": llava,
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL"),
    "smolvlm": lambda: idefics("SmolVLM"),
    "idefics3": lambda: idefics("Idefics3"),
    "gemma3": gemma3,
}
"""Families whose image prompts are tried: model type -> its tiny model."""


def prompt_of(name: str, rows: int = 2) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Token ids (rows, PROMPT) with four tokens of an image, the same keywords for all tokens, and the image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (rows, PROMPT), generator=generator)
    ids[:, 4], ids[:, 5:9], ids[:, 9] = BEFORE, IMAGE, BEHIND
    sizes = {"llava": (3, 8, 8), "gemma3": (3, 16, 16)}.get(name, (1, 3, 16, 16))
    pixels = torch.randn(rows, *sizes, dtype=torch.float64, generator=generator)
    if name.startswith("qwen"):
        pixels = torch.randn(rows * 16, 3 * 2 * 4 * 4, dtype=torch.float64, generator=generator)
        image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}
        return ids, {"mm_token_type_ids": (ids == IMAGE).int()}, image
    kinds = {"token_type_ids": (ids == IMAGE).int()} if name == "gemma3" else {}
    return ids, kinds, {"pixel_values": pixels}


def generate(model: Any, name: str, **settings: Any) -> tuple[Tensor, Tensor]:
    """Tokens (B, PROMPT + NEW) after the prompt with an image, and the new ones' logits (B, NEW, V)."""
    ids, kinds, image = prompt_of(name)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **kinds, **image, **settings, do_sample=False, max_new_tokens=NEW,
        min_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
        suppress_tokens=[IMAGE, VIDEO, BEFORE, BEHIND],  # an image's token without an image would be refused
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1)


def try_images(name: str) -> Outcome:
    """Puts a family of `MODELS` through the checks."""
    with quiet():
        model = MODELS[name]()
        try:
            _check(model, name)
        except Exception as error:
            return outcome_of_error(error, layers_of(model))
        return Outcome("passes", "", layers_of(model))


@torch.no_grad()
def _check(model: Any, name: str) -> None:
    """Raises `Failed`, or what this package or transformers raise."""
    own_tokens, own_logits = generate(model, name)
    encoder = model.config.vision_config._attn_implementation
    enable(model, RefreshConfig(budget=6, stride=4))
    if model.config.vision_config._attn_implementation != encoder:
        raise Failed("the image's encoder has lost its own attention")
    for budget in (PROMPT + NEW, 6):
        config = RefreshConfig(budget=budget, stride=4)
        tokens, logits = generate(model, name, **as_keyword(RefreshCache(model.config, PROMPT + NEW, config)))
        _, kinds, image = prompt_of(name)
        kinds = {key: F.pad(value, (0, NEW)) for key, value in kinds.items()}
        simulated = model(tokens, simulation=Simulation(PROMPT, config), use_cache=False, **kinds, **image).logits
        # generate() hands out logits in float32
        _compare(logits, simulated[:, PROMPT - 1 : -1].float(), f"generation with a budget of {budget} and simulation")
        if budget == 6 and bool((logits - own_logits).abs().max() <= ROUNDING):
            raise Failed("a small budget changes nothing: it is not followed")
        if budget > 6:
            _compare(logits, own_logits, "generation with a budget beyond the text and the model's own")
            if not torch.equal(tokens, own_tokens):
                raise Failed("a budget beyond the text gives other tokens than the model's own attention")


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max())
    if not difference <= ROUNDING:
        raise Failed(f"{what}: logits differ by {difference:.1e}, more than {ROUNDING:.1e}")
