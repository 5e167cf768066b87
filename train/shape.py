"""The model of a run without its weights: its transformers configuration, and its shape."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from refreshkv.loading import CODE, load_configuration
from refreshkv.settings import SettingsError
from refreshkv.train.config import ModelConfig
from refreshkv.train.flops import Work, model_work


def model_configuration(model: ModelConfig) -> PretrainedConfig:
    """The transformers configuration of the model; `SettingsError` if there is none."""
    if model.path is not None:
        return load_configuration(model.path, "model.path")
    assert model.scratch is not None  # `ModelConfig` has one of the two
    fields = dict(model.scratch)
    model_type = fields.pop("model_type")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        raise SettingsError(f"model.scratch.model_type: transformers knows no {model_type!r}") from None
    for name in fields:
        if not hasattr(default, name):
            raise SettingsError(f"unknown setting model.scratch.{name}: a {model_type} configuration has no such field")
    return AutoConfig.for_model(model_type, **fields)


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that decide its memory and its time."""

    parameters: int
    layers: int
    hidden: int
    """Hidden size."""
    mlp: int
    """Hidden size of the MLP."""
    heads: int
    kv_heads: int
    head: int
    """Size of a head."""
    vocabulary: int
    work: Work


def model_shape(model_config: PretrainedConfig) -> Shape:
    """The shape of a configuration's model, which is built without weights for it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, **CODE)
    decoder = model_config.get_text_config(decoder=True)
    head = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    return Shape(
        parameters=model.num_parameters(),
        layers=decoder.num_hidden_layers,
        hidden=decoder.hidden_size,
        mlp=decoder.intermediate_size,
        heads=decoder.num_attention_heads,
        kv_heads=decoder.num_key_value_heads,
        head=head,
        vocabulary=decoder.vocab_size,
        work=model_work(model),
    )
