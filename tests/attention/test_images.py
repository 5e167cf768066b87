"""Prompts with images: the text decoders of vision-language models, their images in the full block.

The trials of `refreshkv/families/images.py`: with a budget of at least the text's length, generation is the model's
own; with a small one it equals the simulated pass over the same tokens, image and rotary positions of images included.
"""

import pytest
import torch
import transformers

from refreshkv import RefreshCache, RefreshConfig, Simulation, enable
from refreshkv.families.images import MODELS, NEW, PROMPT, gemma3, generate, prompt_of, try_images
from refreshkv.families.record import load_record, outcomes_of

RECORD = load_record()
FAST = ("qwen2_vl", "llava")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in MODELS]
)
def test_generation_after_an_image(name):
    outcome = try_images(name)
    assert outcome.result in ("passes", "refused") and "\n" not in outcome.reason
    assert outcome.result == "passes" or name not in FAST
    if RECORD["transformers"] == transformers.__version__:
        assert outcome == outcomes_of(RECORD, "images")[name], "record it: refreshkv models --try all --record"


@torch.no_grad()
def test_the_image_and_its_positions_count():
    model, name = MODELS["qwen2_vl"](), "qwen2_vl"
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
