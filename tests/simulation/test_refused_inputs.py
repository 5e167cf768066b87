"""What simulate() cannot simulate is refused in one line, in simulated steps and in plain ones alike."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from refreshkv import RefreshConfig, SimulationConfig, simulate
from tests.helpers.models import random_ids, tiny_model

REFRESH = RefreshConfig(budget=6, stride=3)
LENGTH = 40
IDS = random_ids(2, LENGTH)


def right_padded():
    mask = torch.ones_like(IDS)
    mask[1, -4:] = 0
    return {"attention_mask": mask}


def flattened(**options):
    """Two sequences in one row, as transformers' own collator packs them."""
    rows = [{"input_ids": IDS[0, :25].tolist()}, {"input_ids": IDS[1, :15].tolist()}]
    return dict(DataCollatorWithFlattening(return_tensors="pt", **options)(rows))


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
REFUSED = {
    "right padding": (right_padded, 'only left padding is supported: set tokenizer.padding_side = "left"'),
    "packed positions": (flattened, "packed sequences .*: give each .* one sequence"),
    "packed lengths": (lambda: flattened(return_flash_attn_kwargs=True), "packed sequences .*: give each .* one seq"),
    "4D of booleans": (lambda: {"attention_mask": CAUSAL}, "left padding, not a prepared 4D mask"),
    "4D of numbers": (lambda: {"attention_mask": (~CAUSAL).double() * -1e9}, "left padding, not a prepared 4D mask"),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind, plain):
    make, words = REFUSED[kind]
    model = tiny_model().train()
    settings = SimulationConfig("off") if plain else SimulationConfig(stride=3, prompt_length=10)
    inputs = {"input_ids": IDS, **make()}
    inputs["labels"] = inputs["input_ids"]
    with simulate(model, settings, refresh=REFRESH) as simulation:
        assert (simulation.draw(LENGTH) is None) == plain
        with pytest.raises(ValueError, match=words) as caught:
            model(**inputs)
        assert "\n" not in str(caught.value) and simulation.report() == {}
        assert model(input_ids=IDS).past_key_values is None  # ordinary rows go on, without a cache


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_takes_no_part_is_refused(checkpointing):
    model = tiny_model(layers=3).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with simulate(model, SimulationConfig(stride=3), refresh=REFRESH):
        with pytest.raises(RuntimeError, match=r"layers \[1\] of LlamaModel took no part in") as caught:
            model(input_ids=IDS)
        assert "\n" not in str(caught.value)
