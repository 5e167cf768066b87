"""Adapters of a run, by the package peft: small weights beside the model's, the only ones that are trained."""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from refreshkv.gguf import is_gguf
from refreshkv.identity import folder_identity
from refreshkv.loading import hub_commit
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


def quantization_options(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` that load the weights of linear layers in 4 bits, straight to `device`."""
    if config.model.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    _bitsandbytes()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.model.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.training.dtype == "bf16" else torch.float32,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def keep_packed_form(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew in evaluation mode.

    On CPUs with AVX512-BF16 it would do so in place, with rounded scales and a product that has no gradient, and the
    training after an evaluation would go on with them.
    """
    modules: list[Any] = list(model.modules())  # any: torch annotates every attribute as a tensor or a module
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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
