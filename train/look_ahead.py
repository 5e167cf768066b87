"""Look-ahead queries in a run: what they exclude, and the parameters that are trained."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from refreshkv.attention.look_ahead import CONFIG_KEY, ensure_look_ahead, freeze_model, look_ahead_modules
from refreshkv.settings import SettingsError
from refreshkv.train.config import RunConfig, TrainingConfig


def validate_look_ahead(config: RunConfig, zero_stage: int) -> None:
    """Raises `SettingsError` for settings that training with look-ahead queries excludes."""
    training, simulation = config.training, config.simulation
    if training.look_ahead is None:
        return
    excluded = {
        "simulation.pattern=off": simulation.pattern == "off",
        "training.adapter": training.adapter is not None,
        "training.activation_checkpointing": bool(training.activation_checkpointing),
        "parallel.sequence above 1": config.parallel.sequence > 1,
        "refresh.rectify=true": config.refresh.rectify,
        "ZeRO stage 3 (training.deepspeed)": zero_stage == 3,
        "model.quantization": config.model.quantization is not None,
        "distillation.weight with training.look_ahead.freeze_model": training.look_ahead.freeze_model
        and config.distillation.weight > 0,
    }
    for name, is_set in excluded.items():
        if is_set:
            raise SettingsError(f"training.look_ahead and {name} exclude each other: remove one of them")


def prepare_look_ahead(model: PreTrainedModel, training: TrainingConfig) -> None:
    """Adds the run's look-ahead queries to its enabled model, and freezes the rest if the settings say so."""
    if training.look_ahead is not None:
        ensure_look_ahead(model, training.look_ahead, training.seed)
        if training.look_ahead.freeze_model:
            freeze_model(model)
    elif getattr(model.config, CONFIG_KEY, None) is not None:
        raise SettingsError(
            "model.path: the model has look-ahead queries, which this run would neither train nor measure: set "
            "training.look_ahead with the same queries and rank"
        )


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[Any]:
    """The trained parameters, for the optimizer: those of look-ahead queries have a learning rate of their own."""
    trained = [part for part in model.parameters() if part.requires_grad]
    if training.look_ahead is None:
        return trained
    own = {id(part) for module in look_ahead_modules(model).values() for part in module.parameters()}
    ahead = {"params": [part for part in trained if id(part) in own], "lr": training.look_ahead.learning_rate}
    others = [part for part in trained if id(part) not in own]
    return [{"params": others}, ahead] if others else [ahead]
