"""Adapters of a run, by the package peft: small weights beside the model's, the only ones that are trained."""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from refreshkv.gguf import is_gguf
from refreshkv.identity import folder_identity
from refreshkv.loading import hub_commit
from refreshkv.quantized import FOUR_BITS, quantization_method
from refreshkv.settings import SettingsError
from refreshkv.train.adapter_config import AdapterConfig
from refreshkv.train.config import ModelConfig, RunConfig


def validate_adapter(config: RunConfig, zero_stage: int, dry: bool) -> None:
    """Raises `SettingsError` if adapters or 4-bit weights cannot work with the other settings, or not here.

    dry: nothing will be trained here, so the packages need not be here.
    """
    model, adapter = config.model, config.training.adapter
    if adapter is not None and model.path is None:
        raise SettingsError(
            "training.adapter needs a trained model beside which adapters learn: set model.path instead of "
            "model.scratch"
        )
    if model.quantization is not None:
        _validate_quantization(config, zero_stage)
    if dry:
        return
    if adapter is not None:
        _peft()
    if model.quantization is not None:
        _bitsandbytes()


def validate_quantized_model(config: RunConfig, model_config: PretrainedConfig, zero_stage: int) -> None:
    """Raises `SettingsError` for a model with quantized weights that cannot be trained, or not like this."""
    method = quantization_method(model_config)
    if method is None or config.model.path is None or is_gguf(config.model.path):
        return
    model = f"model.path={config.model.path} holds {method} weights"
    if config.model.quantization is not None:
        raise SettingsError(f"{model}, which model.quantization would quantize twice: remove it")
    if method not in FOUR_BITS:
        raise SettingsError(
            f"{model}, which are not trained, nor adapters beside them: name a folder with the original weights"
        )
    if config.training.adapter is None:
        raise SettingsError(
            f"{model}, which cannot be trained themselves: set training.adapter, such as training.adapter.rank=16, or "
            "name a folder with the original weights"
        )
    if zero_stage == 3:
        raise SettingsError(f"{model}, which ZeRO stage 3 does not divide: set training.deepspeed=zero2")


def _validate_quantization(config: RunConfig, zero_stage: int) -> None:
    quantization = f"model.quantization={config.model.quantization}"
    if config.training.adapter is None:
        raise SettingsError(
            f"{quantization} needs training.adapter: weights of 4 bits cannot be trained themselves; set it, for "
            "instance training.adapter.rank=16"
        )
    if zero_stage == 3:
        raise SettingsError(f"{quantization} does not work with ZeRO stage 3: set training.deepspeed=zero2")
    if config.model.path is not None and is_gguf(config.model.path):
        raise SettingsError(
            f"{quantization}: model.path={config.model.path} is a GGUF file, whose weights would be quantized twice: "
            "name a folder with the original weights"
        )


def add_adapters(model: PreTrainedModel, adapter: AdapterConfig, seed: int) -> None:
    """Puts adapters into `model`, in place, and freezes all other weights; they compute zero at first.

    Their weights depend on the seed alone, so all ranks make the same ones.
    """
    torch.manual_seed(seed)
    _peft().inject_adapter_in_model(lora_settings(adapter), model)


def lora_settings(adapter: AdapterConfig, base: ModelConfig | None = None) -> Any:
    """peft's settings of the adapters. base: the model that they belong to."""
    return _peft().LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=adapter.targets or "all-linear",
        lora_dropout=adapter.dropout,
        modules_to_save=adapter.also_train or None,
        base_model_name_or_path=None if base is None else base.path,
        revision=None if base is None else base.revision,
        task_type="CAUSAL_LM",
    )


def quantization_options(config: RunConfig, model_config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` that load quantized weights straight to `device`; none for ordinary weights.

    They are quantized by `model.quantization`, or in the files already.
    """
    if config.model.quantization is None:
        return {} if quantization_method(model_config) is None else {"device_map": {"": device}}
    from transformers import BitsAndBytesConfig

    _bitsandbytes()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.model.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.training.dtype == "bf16" else torch.float32,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def base_of(config: RunConfig, model_config: PretrainedConfig) -> str:
    """What tells the model beside which adapters are trained from others: a hash of a folder's weights, or the Hub's
    commit. Empty for a run without adapters."""
    if config.training.adapter is None or config.model.path is None:
        return ""
    folder = Path(config.model.path).expanduser()
    found = folder_identity(folder) if folder.is_dir() else None
    if found:
        return found["weights"]
    # newer releases of transformers do not note the commit
    return str(getattr(model_config, "_commit_hash", None) or hub_commit(config.model.path, config.model.origin) or "")


def validate_base(before: str, now: str, model: str | None, setting: str) -> None:
    """Raises `SettingsError` if a checkpoint's adapters were trained beside other weights than `model` has now.

    before, now: of `base_of`.
    """
    if before and now and before != now:
        raise SettingsError(
            f"{setting}: model.path={model} holds other weights than those beside which the adapters were trained: "
            "bring back the model that it was"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise SettingsError(
            "training.adapter needs the package peft: pip install 'refreshkv[adapters]', or remove training.adapter to "
            "train all weights"
        ) from None
    return peft


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError(
            "model.quantization needs the package bitsandbytes: pip install 'refreshkv[8bit]', or remove it"
        ) from None
    return bitsandbytes
