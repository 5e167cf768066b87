"""The model of a checkpoint of adapters: the base model with the adapters beside it, or merged into its weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from refreshkv.loading import load_configuration, load_model
from refreshkv.quantized import quantization_method
from refreshkv.train.adapter import base_of, lora_settings, quantization_options, validate_base
from refreshkv.train.checkpoint_model import consolidated_weights
from refreshkv.train.checkpoint_reader import Checkpoint
from refreshkv.train.export_check import logits_of
from refreshkv.train.export_error import ExportError, one_line

MERGE_TOLERANCE = 1e-4
"""Largest difference in float32 between a merged model and its adapters beside the base, as a share of the largest
logit."""


def adapted_model(checkpoint: Checkpoint) -> Any:
    """peft's model of a checkpoint of adapters, in float32: the base model with the checkpoint's weights beside it.

    4-bit weights are those that the adapters were trained with, in float32. Raises `SettingsError` if the base model is
    not there or has other weights now, `ExportError` if the adapters do not fit it.
    """
    import peft

    run, state = checkpoint.settings, checkpoint.state
    assert run.training.adapter is not None
    base = base_model(checkpoint)
    model = peft.get_peft_model(base, lora_settings(run.training.adapter, run.model))
    weights = consolidated_weights(checkpoint.folder, state.zero_stage, torch.float32, trained_alone=True)
    found = model.load_state_dict(
        {f"base_model.model.{name}": weight for name, weight in weights.items()}, strict=False
    )
    lacking = [name for name, part in model.named_parameters() if part.requires_grad and name in found.missing_keys]
    if lacking or found.unexpected_keys:
        name = [*lacking, *found.unexpected_keys][0]
        raise ExportError(f"CHECKPOINT: the adapters in {checkpoint.folder} do not fit their model: {name}")
    return model.eval()


def base_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model beside which a checkpoint's adapters were trained, in float32, with its refresh settings."""
    run = checkpoint.settings
    assert run.model.path is not None
    dtype = torch.bfloat16 if run.training.dtype == "bf16" else torch.float32
    model_config = load_configuration(run.model.path, "model.path", run.model.origin)
    options = quantization_options(run, model_config, torch.device("cpu"))
    model = load_model(run.model.path, "model.path", run.model.origin, dtype=dtype, **options)
    validate_base(checkpoint.state.base, base_of(run, model.config), run.model.path, "CHECKPOINT")
    if quantization_method(model.config) is not None:
        model = _unpacked(model)
    config = AutoConfig.from_pretrained(checkpoint.folder / "model", trust_remote_code=run.model.trust_remote_code)
    model.config.refreshkv = config.refreshkv
    return model.float()


def _unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """The model with ordinary weights that have the values of its 4-bit ones."""
    unpacked = model.dequantize()
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(unpacked.config, name):
            delattr(unpacked.config, name)
    unpacked.hf_quantizer = None
    unpacked.is_quantized = False
    return unpacked


def merged_model(adapted: Any, rows: Tensor) -> tuple[PreTrainedModel, float]:
    """The adapters added to the weights of the base model, and the largest difference of a logit that this makes.

    adapted: of `adapted_model`, which is used up. rows: token ids (B, T). Raises `ExportError` if the difference is too
    large.
    """
    expected = logits_of(adapted, rows)
    model = adapted.merge_and_unload()
    difference = (logits_of(model, rows) - expected).abs().max().item()
    tolerance = MERGE_TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference <= tolerance:
        raise ExportError(
            f"the merged model does not compute what its adapters do: logits differ by {difference:.1e}, more than "
            f"{tolerance:.1e}; nothing was exported"
        )
    return model, difference


def write_adapter(adapted: Any, folder: Path) -> None:
    """Writes the adapters in peft's format; the configuration beside them carries the refresh settings."""
    adapted.save_pretrained(folder)
    adapted.get_base_model().config.save_pretrained(folder)


def load_adapter(checkpoint: Checkpoint, folder: Path) -> Any:
    """peft's model of what `write_adapter` wrote, in float32, beside a base model that is loaded again."""
    import peft

    try:
        return peft.PeftModel.from_pretrained(base_model(checkpoint), str(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"the adapters that were written do not load: {one_line(error)}") from error
