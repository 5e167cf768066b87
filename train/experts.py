"""Mixtures of experts: how much of a model a token passes through, and the routers' load-balancing loss."""

import sys
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from refreshkv.settings import SettingsError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")
"""Names of a configuration's numbers of experts in a layer, and of experts that a token is sent to."""
FUNCTION = "load_balancing_loss_func"
"""The function of transformers' modules of such models."""


def expert_share(model_config: PretrainedConfig) -> float:
    """The share of a layer's routed experts that a token is sent to; 1.0 without experts."""
    experts, chosen = _first(model_config, COUNTS), _first(model_config, CHOSEN)
    return chosen / experts if experts and chosen else 1.0


def chosen_experts(model_config: PretrainedConfig) -> int:
    """How many routed experts of a layer a token is sent to; 0 without experts."""
    return (_first(model_config, CHOSEN) or 0) if _first(model_config, COUNTS) else 0


def expert_parameters(model: PreTrainedModel) -> int:
    """Parameters of all routed experts: tensors with a dimension for the experts, or lists of modules with as many."""
    experts = _first(model.config, COUNTS)
    if not experts:
        return 0
    return sum(
        parameter.numel() for name, parameter in model.named_parameters() if _is_expert(name, parameter, experts)
    )


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that a token passes through: all but those of the experts that it is not sent to."""
    return model.num_parameters() - round(expert_parameters(model) * (1 - expert_share(model.config)))


def multiplied_weights(model: PreTrainedModel) -> int:
    """Weights that a token is multiplied with: those of linear layers, of routers, and of the experts that it is sent
    to."""
    experts, linear, routed = _first(model.config, COUNTS) or 0, 0, 0
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            is_linear = isinstance(module, nn.Linear) and parameter.dim() == 2
            if _is_expert(name, parameter, experts):
                routed += parameter.numel() if is_linear or parameter.dim() == 3 else 0
            elif is_linear or _is_router(module, parameter, experts):
                linear += parameter.numel()
    return linear + round(routed * expert_share(model.config))


def router_loss_weight(model_config: PretrainedConfig) -> float:
    """The weight of the routers' loss, as transformers' own training has it: `router_aux_loss_coef`, if
    `output_router_logits` is true."""
    decoder = model_config.get_text_config(decoder=True)
    if not getattr(decoder, "output_router_logits", False):
        return 0.0
    return float(getattr(decoder, "router_aux_loss_coef", None) or 0.0)


def validate_router_loss(model: PreTrainedModel) -> None:
    """Raises `SettingsError` if the configuration asks for a routers' loss that cannot be computed here."""
    if router_loss_weight(model.config) and _loss_function(model) is None:
        raise SettingsError(
            f"model: {type(model).__name__} has output_router_logits=true and router_aux_loss_coef="
            f"{router_loss_weight(model.config):g}, but no loss of its routers: set output_router_logits to false"
        )


def router_loss(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The routers' load-balancing loss (), of the router logits that the decoder returned for one batch."""
    function = _loss_function(model)
    assert function is not None and router_logits is not None  # it has been validated
    experts, chosen = _first(model.config, COUNTS), chosen_experts(model.config)
    return function(router_logits, experts, chosen, attention_mask)


def _is_router(module: nn.Module, parameter: Tensor, experts: int) -> bool:
    """Whether a parameter is a router's matrix (experts, hidden size), which many families keep in no linear layer."""
    return parameter.dim() == 2 and len(parameter) == experts > 0 and not isinstance(module, nn.Embedding)


def _loss_function(model: PreTrainedModel) -> Any:
    return getattr(sys.modules[type(model).__module__], FUNCTION, None)


def _first(model_config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    """The first of these numbers that the decoder's configuration has."""
    decoder = model_config.get_text_config(decoder=True)
    values = (getattr(decoder, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _is_expert(name: str, parameter: nn.Parameter, experts: int) -> bool:
    """Whether a parameter is one of a list of routed experts, or holds all of them in its first dimension."""
    _, is_inside, rest = name.partition(".experts.")
    return bool(is_inside) and (rest[:1].isdigit() or parameter.shape[0] == experts)
