"""From a training checkpoint to a plain transformers folder, checked against the checkpoint before it counts."""

import fnmatch
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import refreshkv
from refreshkv import RefreshCache, RefreshConfig, Simulation
from refreshkv.cache.refresh import saved_config
from refreshkv.files import FolderKind, complete_folder, write_text
from refreshkv.settings import SettingsError, load_settings
from refreshkv.tables import column_table
from refreshkv.train.card import model_card
from refreshkv.train.checkpoint import RUN_FILE, STATE_FILE, State, finished_checkpoints, read_state
from refreshkv.train.config import RunConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODULE_STATES = "mp_rank_00_model_states.pt"
"""DeepSpeed's file with the whole model, where ZeRO partitions nothing."""

WRITTEN = ("config.json", "generation_config.json", "README.md", "model*.safetensors", "model.safetensors.index.json")
"""What every export may write; the tokenizer's files come to these."""

CHECKED_ROWS, CHECKED_LENGTH = 3, 64
"""Random rows of the two checks, and their tokens (fewer if the model's positions reach less far)."""

DECODING_TOLERANCE = 1e-3
"""Largest difference between decoding and the parallel form in float32, as a share of the largest logit."""


class ExportError(SettingsError):
    """The checkpoint cannot be exported there, or what was written does not compute what it should. One line."""


@dataclass(frozen=True)
class ExportResult:
    """A finished export. `str()` is the summary that launch/export.py prints."""

    output: Path
    step: int
    """Optimizer steps of the exported checkpoint."""
    parameters: int
    """Tied parameters count once."""
    dtype: str
    sizes: dict[str, int]
    """Bytes of each file."""
    reload_difference: float
    """Largest difference of a logit between the reloaded model and the checkpoint's weights."""
    decode_difference: float
    """Largest difference of a logit between decoding and the parallel form, in float32 (see `decoding_difference`)."""

    def __str__(self) -> str:
        lines = [
            ("exported", f"step {self.step:,} to {self.output}"),
            ("model", f"{self.parameters:,} parameters, {self.dtype}"),
            ("files", f"{len(self.sizes)}, {sum(self.sizes.values()) / 1e6:,.1f} MB: {', '.join(sorted(self.sizes))}"),
            ("reloaded against the checkpoint", f"largest logit difference {self.reload_difference:.1e}"),
            ("decoding against the parallel form", f"largest logit difference {self.decode_difference:.1e} (float32)"),
        ]
        return column_table(lines, text_columns=2)


def export(
    checkpoint: str | Path,
    output: str | Path,
    report: str | Path | None = None,
    overwrite: bool = False,
    name: str | None = None,
) -> ExportResult:
    """Writes the model of a checkpoint as a transformers folder, reloads it and checks what it computes.

    The weights are the optimizer's float32 master weights, rounded to the run's `training.dtype`. The reloaded model
    must give the logits of these weights, and decoding through `RefreshCache` the logits of `Simulation`. The folder
    appears when both hold; before that there is only `<output>.partial`, which an error removes.

    Runs on the CPU and takes about six bytes of memory per parameter in bf16, eight in fp32.

    Args:
        checkpoint: a checkpoint's folder, or a run's: then its newest finished checkpoint.
        output: the folder to write.
        report: folder of an evaluation whose table goes into the model card.
        overwrite: replace `output` if it is an earlier export and holds nothing else.
        name: what the card calls the model, such as its Hub id; None takes the folder's name.

    Raises `ExportError`, with nothing left at `output`.
    """
    checkpoint = find_checkpoint(Path(checkpoint).expanduser().resolve())
    target = Path(output).expanduser().resolve()
    run, state = _describe(checkpoint)
    card = model_card(run, state, name or target.name, report)
    dtype = DTYPES[run.training.dtype]
    with _export_folder(target, checkpoint, overwrite) as folder:
        model = checkpoint_model(checkpoint, consolidated_weights(checkpoint, state.zero_stage, dtype), dtype)
        rows, parameters = _random_rows(model), model.num_parameters()
        logits = _logits(model, rows)
        _write(model, checkpoint / "model", card, folder)
        del model  # both models at once would double the memory
        reload_difference, decode_difference = check_export(folder, rows, logits)
    sizes = {file.name: file.stat().st_size for file in target.iterdir() if file.is_file()}
    name_of_dtype = str(dtype).removeprefix("torch.")
    return ExportResult(target, state.step, parameters, name_of_dtype, sizes, reload_difference, decode_difference)


def find_checkpoint(folder: Path) -> Path:
    """`folder` if it is a finished checkpoint, or else the newest one of the run in it; `ExportError` if neither."""
    if not folder.is_dir():
        raise ExportError(f"CHECKPOINT: there is no folder {folder}")
    if (folder / STATE_FILE).is_file() and folder.suffix != ".partial":
        return folder
    finished = finished_checkpoints(folder)
    if finished:
        return finished[-1]
    if folder.name.startswith("step-"):
        raise ExportError(
            f"CHECKPOINT: {folder} was not finished; give the run's folder to take its newest finished one"
        )
    raise ExportError(f"CHECKPOINT: {folder} is neither a finished checkpoint nor a run that has one")


def _describe(checkpoint: Path) -> tuple[RunConfig, State]:
    try:
        return load_settings(RunConfig, checkpoint / RUN_FILE), read_state(checkpoint)
    except (ValueError, TypeError, OSError) as error:
        raise ExportError(f"CHECKPOINT: {checkpoint} is damaged: {_one_line(error)}") from error


def consolidated_weights(checkpoint: Path, zero_stage: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's weights by name, put together from the ranks' files and rounded to `dtype`."""
    try:
        weights = _module_weights(checkpoint) if zero_stage == 0 else _master_weights(checkpoint)
        return {name: _rounded(weight, dtype) for name, weight in weights.items()}
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ExportError(f"CHECKPOINT: {checkpoint} is damaged or incomplete: {_one_line(error)}") from error


def _module_weights(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint / MODULE_STATES, map_location="cpu", mmap=True, weights_only=False)["module"]


def _master_weights(checkpoint: Path) -> dict[str, Any]:
    """The float32 weights of ZeRO 1 to 3; a partitioned one is gathered when its `contiguous()` is called."""
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints how it gets on
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)


def _rounded(weight: Any, dtype: torch.dtype) -> Tensor:
    tensor = weight.contiguous()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def checkpoint_model(checkpoint: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint's configuration with these weights; `ExportError` unless each has its place."""
    try:
        config = AutoConfig.from_pretrained(checkpoint / "model")
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"CHECKPOINT: {checkpoint / 'model'} holds no known model: {_one_line(error)}") from error
    saved_config(config)
    with _quiet_transformers():
        model, loading = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # reported below, with the others
            output_loading_info=True,
        )
    _check_all_loaded(checkpoint, loading)
    return model


def _check_all_loaded(checkpoint: Path | str, loading: dict[str, Any]) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            names = sorted(str(key) for key in loading[problem])
            raise ExportError(
                f"{checkpoint} does not fit its model's config.json: {problem.replace('_', ' ')} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            )


def _write(model: PreTrainedModel, description: Path, card: str, folder: Path) -> None:
    model.save_pretrained(folder)
    for file in description.iterdir():  # the tokenizer and the generation config, as they are
        if file.name != "config.json":
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    write_text(folder / "README.md", card)


def check_export(folder: Path, rows: Tensor, logits: Tensor) -> tuple[float, float]:
    """Reloads `folder`: it must give `logits` (B, T, V) for `rows` (B, T), and its decoding equal its parallel form.

    Returns the largest logit difference of each check. Raises `ExportError` if one is too large.
    """
    model = _reload(folder)
    reload_difference = (_logits(model, rows) - logits).abs().max().item()
    tolerance = torch.finfo(model.dtype).eps * logits.abs().max().item()  # the same weights: at most another rounding
    if not reload_difference <= tolerance:
        raise ExportError(
            f"the reloaded model is not the checkpoint's: logits differ by {reload_difference:.1e}, more than "
            f"{tolerance:.1e}; nothing was exported"
        )
    decode_difference, scale = decoding_difference(refreshkv.enable(model.float()), rows)
    if not decode_difference <= DECODING_TOLERANCE * scale:
        raise ExportError(
            f"decoding does not equal the parallel form: logits differ by {decode_difference:.1e}, more than "
            f"{DECODING_TOLERANCE:g} of the largest one ({scale:.1e}); nothing was exported"
        )
    return reload_difference, decode_difference


def _reload(folder: Path) -> PreTrainedModel:
    with _quiet_transformers():
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    _check_all_loaded("what was written", loading)
    return model


@torch.no_grad()
def decoding_difference(model: PreTrainedModel, rows: Tensor) -> tuple[float, float]:
    """How far decoding `rows` (B, T) one token at a time is from the parallel form, and the largest logit.

    The schedule and the selection are the model's own, but with a budget and a stride small enough to matter in rows as
    short as these. Two scores may tie so nearly that rounding decides, and then that row differs for a reason that is
    no fault: so each row's largest difference is taken, and of these the middle one.
    """
    prompt_length = max(1, 3 * rows.shape[1] // 4)
    config = _constraining(saved_config(model.config), prompt_length)
    parallel = model(rows, refresh=Simulation(prompt_length, config), use_cache=False).logits
    cache = RefreshCache(model.config, rows.shape[1], config)
    blocks = [rows[:, :prompt_length], *rows[:, prompt_length:].split(1, dim=1)]
    decoded = [model(block, past_key_values=cache, use_cache=True).logits for block in blocks]
    differences = (torch.cat(decoded, dim=1) - parallel).abs().flatten(1).amax(dim=1)
    return differences.median().item(), parallel.abs().max().item()


def _constraining(config: RefreshConfig, prompt_length: int) -> RefreshConfig:
    return replace(config, budget=max(1, prompt_length // 3), stride=min(config.stride, 5))


def _random_rows(model: PreTrainedModel) -> Tensor:
    """(B, T) token ids, the same for every model with this vocabulary and reach."""
    config = model.config.get_text_config(decoder=True)
    length = min(CHECKED_LENGTH, getattr(config, "max_position_embeddings", None) or CHECKED_LENGTH)
    return torch.randint(config.vocab_size, (CHECKED_ROWS, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    return model(rows, use_cache=False).logits.float()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the report of keys that do not fit: that becomes an `ExportError`."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def _export_folder(target: Path, checkpoint: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an error (`complete_folder`)."""
    _check_target(target, checkpoint, overwrite)
    try:
        with complete_folder(target, EXPORT) as folder:
            yield folder
    except OSError as error:
        raise ExportError(f"OUT={target}: the export could not be written: {_one_line(error)}") from error


def _check_target(target: Path, checkpoint: Path, overwrite: bool) -> None:
    if target == checkpoint or checkpoint in target.parents or target in checkpoint.parents:
        raise ExportError(f"OUT={target} and the checkpoint {checkpoint} lie in each other; choose another folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_export(target):
        raise ExportError(
            f'OUT={target} exists and is no export (no config.json with "refreshkv"); choose another folder'
        )
    if not overwrite:
        raise ExportError(f"OUT={target} already holds an export; choose another folder, or replace it: --overwrite")
    known = (*WRITTEN, *(file.name for file in (checkpoint / "model").iterdir()))
    for file in sorted(target.iterdir()):
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in known):
            raise ExportError(
                f"OUT={target} also holds {file.name}, which --overwrite would delete; move it away first"
            )


def is_export(folder: Path) -> bool:
    """Whether `folder` holds a model that carries its refresh schedule."""
    try:
        return "refreshkv" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


EXPORT = FolderKind(setting="OUT", writer="export", lock_file=".exporting", is_complete=is_export, error=ExportError)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
