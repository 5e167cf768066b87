"""The two checks of an export: it computes what the checkpoint does, and decoding equals the parallel form."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.attention.look_ahead_file import look_ahead_weights
from refreshkv.cache.refresh import saved_config
from refreshkv.loading import PLAIN, Origin
from refreshkv.parity import decoding_difference
from refreshkv.train.checkpoint_model import quiet_transformers, validate_loading
from refreshkv.train.export_error import ExportError

CHECKED_ROWS, CHECKED_LENGTH = 3, 64
"""Number of random rows in the two checks, and of tokens in a row (fewer if the model cannot take as many)."""

DECODING_TOLERANCE = 1e-3
"""Largest difference between decoding and the parallel form in float32, as a share of the largest logit."""


def check_export(
    folder: Path, rows: Tensor, logits: Tensor, origin: Origin = PLAIN, look_ahead: dict[str, Tensor] | None = None
) -> tuple[float, float]:
    """Loads the model in `folder` and compares it with the checkpoint's; returns the largest logit difference of each.

    The model must compute `logits` (B, T, V) from `rows` (B, T), and decoding must equal its parallel form. Of
    a run with look-ahead queries, the model must have exactly `look_ahead`, their weights as in `look_ahead_weights`.
    Raises `ExportError` if one of the differences is too large.
    """
    model = _reload(folder, origin)
    differences = compare_reloaded(model, rows, logits)
    found, expected = look_ahead_weights(model), look_ahead or {}
    if found.keys() != expected.keys() or any(not torch.equal(found[name], expected[name].float()) for name in found):
        raise ExportError(
            "the reloaded model does not have the checkpoint's look-ahead queries: export with the release that "
            "trained it; nothing was exported"
        )
    return differences


def compare_reloaded(model: PreTrainedModel, rows: Tensor, logits: Tensor) -> tuple[float, float]:
    """As `check_export`, for a model that has been loaded again, perhaps with adapters in it."""
    reload_difference = (logits_of(model, rows) - logits).abs().max().item()
    tolerance = torch.finfo(model.dtype).eps * logits.abs().max().item()  # the same weights: at most another rounding
    if not reload_difference <= tolerance:
        raise ExportError(
            f"the reloaded model is not the checkpoint's: logits differ by {reload_difference:.1e}, more than "
            f"{tolerance:.1e}; nothing was exported"
        )
    decode_difference, scale = decoding_error(refreshkv.enable(model.float()), rows)
    if not decode_difference <= DECODING_TOLERANCE * scale:
        raise ExportError(
            f"decoding does not equal the parallel form: logits differ by {decode_difference:.1e}, more than "
            f"{DECODING_TOLERANCE:g} of the largest one ({scale:.1e}); nothing was exported"
        )
    return reload_difference, decode_difference


def _reload(folder: Path, origin: Origin) -> PreTrainedModel:
    with quiet_transformers():
        # output_loading_info makes it return a pair, which transformers' annotation leaves out
        model, loading = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder, dtype="auto", output_loading_info=True, trust_remote_code=origin.trust_remote_code
        )
    validate_loading("what was written", loading)
    return model


def decoding_error(model: PreTrainedModel, rows: Tensor) -> tuple[float, float]:
    """The difference between decoding `rows` (B, T) token by token and the parallel form, and the largest logit.

    The schedule and the selection are the model's own, except for a budget and a stride that are small enough to matter
    in rows this short. The difference is the median over the rows of each row's largest: where two scores are equal up
    to rounding, the two forms may select different tokens, and one row then differs without a fault.
    """
    prompt_length = max(1, 3 * rows.shape[1] // 4)
    refresh = _constraining(saved_config(model.config), prompt_length)
    differences, largest = decoding_difference(model, rows, prompt_length, refresh)
    return differences.median().item(), largest.item()


def _constraining(config: RefreshConfig, prompt_length: int) -> RefreshConfig:
    """`config` with a budget and a stride that leave tokens out and refresh within a short row."""
    return replace(config, budget=max(1, prompt_length // 3), stride=min(config.stride, 5))


def random_rows(model: PreTrainedModel) -> Tensor:
    """Token ids (B, T), the same for every model with this vocabulary and maximal length."""
    config = model.config.get_text_config(decoder=True)
    length = min(CHECKED_LENGTH, getattr(config, "max_position_embeddings", None) or CHECKED_LENGTH)
    return torch.randint(config.vocab_size, (CHECKED_ROWS, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Logits (B, T, V) of full attention in float32."""
    return model(rows, use_cache=False).logits.float()
