"""Liger's kernels for a model's layers: RMSNorm, SwiGLU and rotary embedding, each in one pass over memory."""

import importlib.util
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from refreshkv.settings import SettingsError
from refreshkv.train.config import ModelConfig, TrainingConfig

WAY_OUT = "set training.kernels=torch"


def validate_kernels(training: TrainingConfig, model_config: PretrainedConfig) -> None:
    """Raises `SettingsError` if `training.kernels` cannot run here, or not with this model."""
    if training.kernels == "torch":
        return
    known = _liger().MODEL_TYPE_TO_APPLY_LIGER_FN
    decoder = model_config.get_text_config(decoder=True)
    activation = getattr(decoder, "hidden_act", None)
    if not torch.cuda.is_available():
        raise SettingsError(f"training.kernels=liger runs on GPUs only, and there is none here: {WAY_OUT}")
    if model_config.model_type not in known:
        raise SettingsError(
            f"training.kernels=liger: Liger has no kernels for models of type {model_config.model_type}; {WAY_OUT}"
        )
    if activation not in ("silu", "swish"):  # Liger would compute SwiGLU all the same
        raise SettingsError(f"training.kernels=liger: Liger has no kernels for hidden_act={activation}; {WAY_OUT}")


def validate_prompt_attention(model: ModelConfig) -> None:
    """Raises `SettingsError` if `model.prompt_attention` cannot run here."""
    name = model.prompt_attention
    if name == "sdpa":
        return
    way_out = "set model.prompt_attention=sdpa"
    if not torch.cuda.is_available():
        raise SettingsError(f"model.prompt_attention={name} runs on GPUs only, and there is none here: {way_out}")
    package = "flash_attn" if name == "flash_attention_2" else "flash_attn_interface"
    if all(importlib.util.find_spec(module) is None for module in (package, "kernels")):
        raise SettingsError(f"model.prompt_attention={name} needs the package {package}, which is not here: {way_out}")


def use_liger(model: PreTrainedModel) -> None:
    """Exchanges the layers' norms, MLPs and rotary embedding for Liger's; attention, parameters and their names stay.

    Liger exchanges the rotary embedding in transformers' module, so it changes for all models of this type in the
    process, and for those that are made later.
    """
    _liger()._apply_liger_kernel_to_instance(
        model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def _liger() -> Any:
    try:
        from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError(
            f"training.kernels=liger needs the package liger-kernel: pip install 'refreshkv[gpu]', or {WAY_OUT}"
        ) from None
    return monkey_patch
