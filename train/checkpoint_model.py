"""The plain transformers model of a training checkpoint, put together from the files of all ranks."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from refreshkv.cache.refresh import saved_config
from refreshkv.loading import PLAIN, Origin, own_class
from refreshkv.train.export_error import ExportError, one_line
from refreshkv.train.safe_loading import tensors_only

MODULE_STATES = "mp_rank_00_model_states.pt"
"""DeepSpeed's file with the whole model, which it writes at ZeRO stage 0."""


def consolidated_weights(
    checkpoint: Path, zero_stage: int, dtype: torch.dtype, trained_alone: bool = False
) -> dict[str, Tensor]:
    """The model's weights by name, put together from the ranks' files and rounded to `dtype`.

    trained_alone: the checkpoint holds the trained weights alone (`training.adapter`).
    """
    try:
        with tensors_only():
            at_stage_0 = zero_stage == 0
            weights = _module_weights(checkpoint) if at_stage_0 else _master_weights(checkpoint, trained_alone)
        return {name: _rounded(weight, dtype) for name, weight in weights.items()}
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ExportError(f"CHECKPOINT: {checkpoint} is damaged or incomplete: {one_line(error)}") from error


def _module_weights(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint / MODULE_STATES, map_location="cpu", mmap=True, weights_only=True)["module"]


def _master_weights(checkpoint: Path, trained_alone: bool) -> dict[str, Any]:
    """The float32 weights of ZeRO 1 to 3. At stage 3 each is put together when its `contiguous()` is called."""
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints its progress
        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True, exclude_frozen_parameters=trained_alone
        )
    assert weights is not None
    return weights


def _rounded(weight: Any, dtype: torch.dtype) -> Tensor:
    tensor = weight.contiguous()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def checkpoint_model(
    checkpoint: Path, weights: dict[str, Tensor], dtype: torch.dtype, origin: Origin = PLAIN
) -> PreTrainedModel:
    """The model of a checkpoint's configuration with these weights; `ExportError` unless each has its place.

    origin: of the model that was trained; whether the code in the checkpoint may run.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint / "model", trust_remote_code=origin.trust_remote_code)
        own = own_class(config, checkpoint / "model", origin.of_folder)
        model_class = own or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"CHECKPOINT: {checkpoint / 'model'} holds no known model: {one_line(error)}") from error
    saved_config(config)
    with quiet_transformers():
        model, loading = model_class.from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]  # one class, no tuple
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # reported below, with the others
            output_loading_info=True,
        )
    validate_loading(checkpoint, loading)
    return model


def validate_loading(checkpoint: Path | str, loading: dict[str, Any]) -> None:
    """Raises `ExportError` if weights are missing, left over or of another shape. loading: of `from_pretrained`."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            names = sorted(str(key) for key in loading[problem])
            raise ExportError(
                f"{checkpoint} does not fit its model's config.json: {problem.replace('_', ' ')} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' report of keys that do not fit; `validate_loading` reports them."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
