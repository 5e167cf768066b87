"""Which layers of a model get adapters, and how many weights they train: from the names and shapes alone."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from refreshkv.settings import SettingsError
from refreshkv.train.adapter_config import AdapterConfig

NAME = "training.adapter"


@dataclass(frozen=True)
class AdapterShape:
    """The numbers of a model's adapters that decide its memory and its time."""

    trained: int
    """Trained weights: those of the adapters, and of the modules that are trained whole."""
    products: int
    """Weights of the adapters alone, with which a token is multiplied."""
    frozen_products: int
    """Weights of linear layers that stay as they are, the output layer's included."""
    kept: float
    """Numbers that the adapters of all layers keep of a token for the backward pass."""


def adapter_shape(model: PreTrainedModel, adapter: AdapterConfig | None) -> AdapterShape | None:
    """The shape of the adapters of `model`, on any device ("meta" too); None without adapters.

    Raises `SettingsError` for names that the model does not have, and for the output layer.
    """
    if adapter is None:
        return None
    layers = adapted_layers(model, adapter)
    whole = whole_modules(model, adapter)
    parts = [part for _, module in whole for part in module.parameters()]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    products = sum(adapter.rank * (layer.in_features + layer.out_features) for layer in layers.values())
    # the result of the first matrix, and under dropout the input once more with its mask
    kept = sum(adapter.rank + (1.5 * layer.in_features if adapter.dropout else 0) for layer in layers.values())
    return AdapterShape(
        trained=products + sum({id(part): part.numel() for part in parts}.values()),
        products=products,
        frozen_products=sum(layer.in_features * layer.out_features for layer in linear),
        kept=kept,
    )


def adapted_layers(model: PreTrainedModel, adapter: AdapterConfig) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by name."""
    output = model.get_output_embeddings()
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output
    }
    if adapter.targets is None:
        return linear
    found: dict[str, nn.Linear] = {}
    for target in adapter.targets:
        chosen = {name: layer for name, layer in linear.items() if name == target or name.endswith(f".{target}")}
        if not chosen:
            _refuse_output(model, "targets", target)
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise SettingsError(f"{NAME}.targets: the model has no linear layer {target}; it has {known}")
        found |= chosen
    return found


def whole_modules(model: PreTrainedModel, adapter: AdapterConfig) -> list[tuple[str, nn.Module]]:
    """The modules whose own weights are trained, by name."""
    found = []
    for ending in adapter.also_train:
        chosen = [(name, module) for name, module in model.named_modules() if name.endswith(ending)]
        if not any(True for _, module in chosen for _ in module.parameters()):
            raise SettingsError(f"{NAME}.also_train: the model has no module with weights whose name ends in {ending}")
        _refuse_output(model, "also_train", ending)
        if any(isinstance(part, nn.Linear) for _, module in chosen for part in module.modules()):
            raise SettingsError(
                f"{NAME}.also_train: {ending} has linear layers, which get adapters (training.adapter.targets): name "
                "embeddings or norms, or train all weights without training.adapter"
            )
        if _is_tied(model) and any(module is model.get_input_embeddings() for _, module in chosen):
            raise SettingsError(
                f"{NAME}.also_train: {ending} shares its weight with the output layer (tie_word_embeddings), and "
                "training would part them: leave it out"
            )
        found += chosen
    return found


def _refuse_output(model: PreTrainedModel, setting: str, name: str) -> None:
    output = model.get_output_embeddings()
    chosen = [module for path, module in model.named_modules() if path.endswith(name)]
    if any(module is output for module in chosen):
        raise SettingsError(
            f"{NAME}.{setting}: {name} is the output layer, whose losses are computed without adapters: leave it out"
        )


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
