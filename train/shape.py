"""The model of a run without its weights: its transformers configuration, and its shape."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from refreshkv.loading import PLAIN, Origin, load_configuration, own_class, validate_sizes
from refreshkv.settings import SettingsError
from refreshkv.train.adapter_config import AdapterConfig
from refreshkv.train.adapter_shape import AdapterShape, adapter_shape
from refreshkv.train.config import ModelConfig
from refreshkv.train.experts import active_parameters, chosen_experts
from refreshkv.train.flops import Work, model_work


def model_configuration(model: ModelConfig) -> PretrainedConfig:
    """The transformers configuration of the model; `SettingsError` if there is none."""
    if model.path is not None:
        return load_configuration(model.path, "model.path", model.origin)
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
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each configuration has checks of its own
        raise SettingsError(f"model.scratch: {model_type} takes no such settings: {one_line(error)}") from error
    validate_sizes(config, "model.scratch: the model")
    return config


def one_line(error: Exception) -> str:
    """The text of an error without line breaks, and its type if that says more."""
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text[:300]}"


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that decide its memory and its time."""

    parameters: int
    active: int
    """Parameters that a token passes through: all, but for experts that it is not sent to."""
    experts: int
    """Routed experts of a layer that a token is sent to; 0 without any."""
    layers: int
    hidden: int
    """Hidden size."""
    mlp: int
    """Hidden size of the MLP, or of all experts together that a token is sent to."""
    heads: int
    kv_heads: int
    head: int
    """Size of a head."""
    vocabulary: int
    work: Work
    packable: int
    """Weights of the linear layers without the output layer, which 4-bit models keep packed."""
    adapters: AdapterShape | None = None

    @property
    def trained(self) -> int:
        """Parameters that are trained: all, or those of the adapters."""
        return self.parameters if self.adapters is None else self.adapters.trained


def _mlp_size(model_config: PretrainedConfig) -> int:
    """Hidden size of the MLP, or of the experts that a token is sent to, shared ones included."""
    decoder, chosen = model_config.get_text_config(decoder=True), chosen_experts(model_config)
    if not chosen:
        return decoder.intermediate_size
    own = getattr(decoder, "moe_intermediate_size", None) or decoder.intermediate_size
    shared = (getattr(decoder, "n_shared_experts", None) or 0) * own
    return chosen * own + (getattr(decoder, "shared_expert_intermediate_size", None) or shared)


def model_shape(model_config: PretrainedConfig, adapter: AdapterConfig | None = None, origin: Origin = PLAIN) -> Shape:
    """The shape of a configuration's model, which is built without weights for it.

    Raises `SettingsError` if there is no such model, or if it lacks layers that `adapter` names.
    """
    decoder = model_config.get_text_config(decoder=True)
    lacking = [name for name in ("num_key_value_heads", "intermediate_size") if not hasattr(decoder, name)]
    if lacking:
        raise SettingsError(
            f"model: a {model_config.model_type} model has no {lacking[0]}; choose a decoder such as llama"
        )
    try:
        with torch.device("meta"):
            own = own_class(model_config, model_config.name_or_path or "", origin)
            model = own._from_config(model_config) if own else AutoModelForCausalLM.from_config(model_config)
    except Exception as error:  # what a model makes of its settings differs from family to family
        raise SettingsError(
            f"model: no {model_config.model_type} model can be built with these settings (model.scratch, or the "
            f"config.json of model.path): {one_line(error)}"
        ) from error
    head = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    adapters = adapter_shape(model, adapter)
    return Shape(
        parameters=model.num_parameters(),
        active=active_parameters(model),
        experts=chosen_experts(model_config),
        layers=decoder.num_hidden_layers,
        hidden=decoder.hidden_size,
        mlp=_mlp_size(model_config),
        heads=decoder.num_attention_heads,
        kv_heads=decoder.num_key_value_heads,
        head=head,
        vocabulary=decoder.vocab_size,
        work=model_work(model, adapters),
        packable=sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
        ),
        adapters=adapters,
    )
