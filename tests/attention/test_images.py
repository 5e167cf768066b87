"""Prompts with images: the text decoders of vision-language models, their images in the full block.

Tiny random models of several families. With a budget of at least the text's length, generation is the model's own; with
a small one it equals the simulated pass over the same tokens, image and rotary positions of images included.
"""

import pytest
import torch
import transformers

from refreshkv import RefreshCache, RefreshConfig, Simulation, enable

IMAGE, VIDEO, BEFORE, BEHIND, VOCABULARY = 90, 91, 92, 93, 96
PROMPT, NEW = 24, 10
TEXT = {
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


def build(family, **settings):
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).double().eval()


def qwen(family):
    """Each token has three positions: time, height and width."""
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
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


def llava():
    vision = {**VISION, "model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16}
    text = {**TEXT, "model_type": "llama"}
    settings = {"image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_layer": -1}
    return build("Llava", text_config=text, vision_config=vision, **settings)


def idefics(family):
    text, vision = {**TEXT, "model_type": "llama"}, {**VISION, "image_size": 16}
    settings = {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0}
    return build(family, text_config=text, vision_config=vision, **settings)


def gemma3():
    vision, text = {**VISION, "image_size": 16}, {**TEXT, "sliding_window": 12, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["full_attention", "sliding_attention"]
    settings = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": BEFORE}
    return build("Gemma3", text_config=text, vision_config=vision, eoi_token_index=BEHIND, **settings)


FAMILIES = {
    "qwen2_vl": lambda: qwen("Qwen2VL"),
    "llava": llava,
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL"),
    "smolvlm": lambda: idefics("SmolVLM"),
    "idefics3": lambda: idefics("Idefics3"),
}
FAST = ("qwen2_vl", "llava")


def prompt_of(name, rows=2):
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


def generate(model, name, **settings):
    ids, kinds, image = prompt_of(name)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **kinds, **image, **settings, do_sample=False, max_new_tokens=NEW,
        min_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
        suppress_tokens=[IMAGE, VIDEO, BEFORE, BEHIND],  # an image's token without an image would be refused
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]
)
@torch.no_grad()
def test_generation_after_an_image(name):
    model = FAMILIES[name]()
    own_tokens, own_logits = generate(model, name)
    encoder = model.config.vision_config._attn_implementation
    enable(model, RefreshConfig(budget=6, stride=4))
    assert model.config.vision_config._attn_implementation == encoder != "refreshkv"
    for budget in (64, 6):
        config = RefreshConfig(budget=budget, stride=4)
        cache = RefreshCache(model.config, PROMPT + NEW, config)
        tokens, logits = generate(model, name, past_key_values=cache)
        _, kinds, image = prompt_of(name)
        kinds = {key: torch.nn.functional.pad(value, (0, NEW)) for key, value in kinds.items()}
        simulated = model(tokens, simulation=Simulation(PROMPT, config), use_cache=False, **kinds, **image).logits
        # generate() hands out logits in float32
        torch.testing.assert_close(logits, simulated[:, PROMPT - 1 : -1].float(), rtol=0, atol=2e-6)
        is_own = torch.allclose(logits, own_logits, rtol=0, atol=2e-6)
        assert is_own == (budget == 64)
        if is_own:
            assert torch.equal(tokens, own_tokens)


@torch.no_grad()
def test_the_image_and_its_positions_count():
    model, name = FAMILIES["qwen2_vl"](), "qwen2_vl"
    enable(model, RefreshConfig(budget=6, stride=4))
    ids, kinds, image = prompt_of(name)
    simulation = Simulation(PROMPT - 8, RefreshConfig(budget=6, stride=4))
    given = model(ids, simulation=simulation, use_cache=False, **kinds, **image).logits
    other = {**image, "pixel_values": -image["pixel_values"]}
    assert (model(ids, simulation=simulation, use_cache=False, **kinds, **other).logits - given).abs().max() > 1e-3
    counted = torch.arange(PROMPT).expand(3, 2, -1)
    moved = model(ids, simulation=simulation, use_cache=False, position_ids=counted, **kinds, **image).logits
    assert (moved - given).abs().max() > 1e-3


@torch.no_grad()
def test_images_that_attend_in_both_directions_are_refused():
    model = enable(gemma3(), RefreshConfig(budget=6, stride=4))
    with pytest.raises(ValueError, match="images whose tokens attend to later ones .Gemma 3. are not supported"):
        generate(model, "gemma3", past_key_values=RefreshCache(model.config, PROMPT + NEW))
