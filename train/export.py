"""Writes the model of a training checkpoint as a plain transformers folder, and checks it against the checkpoint."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreshkv.attention.look_ahead_file import split_weights, write_weights
from refreshkv.files import RECORD_FILE, write_json, write_text
from refreshkv.folders import resolved
from refreshkv.reading import read_own_json
from refreshkv.settings import SettingsError
from refreshkv.tables import column_table
from refreshkv.train.card import model_card
from refreshkv.train.checkpoint_model import checkpoint_model, consolidated_weights
from refreshkv.train.checkpoint_reader import Checkpoint, find_checkpoint
from refreshkv.train.export_adapter import adapted_model, load_adapter, merged_model, write_adapter
from refreshkv.train.export_check import check_export, compare_reloaded, logits_of, random_rows
from refreshkv.train.export_error import ExportError
from refreshkv.train.export_folder import export_folder
from refreshkv.train.public_files import without_local_paths

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Form = Literal["model", "merged", "adapter"]
"""What is written: a whole model, into which adapters are merged if there are any; the same, of a checkpoint of
adapters only; the adapters alone, in peft's format."""


@dataclass(frozen=True)
class ExportResult:
    """A finished export. `str()` is the summary that launch/export.py prints."""

    output: Path
    step: int
    """Optimizer steps of the exported checkpoint."""
    parameters: int
    """Number of parameters; tied ones count once."""
    dtype: str
    sizes: dict[str, int]
    """Bytes of each file, those in custom_generate/ left out."""
    reload_difference: float
    """Largest difference of a logit between the reloaded model and the checkpoint's weights."""
    decode_difference: float
    """Largest difference of a logit between decoding and the parallel form, in float32 (see `decoding_error`)."""
    merge_difference: float | None = None
    """Largest difference of a logit, in float32, between adapters beside the base model and merged into its weights;
    None where nothing was merged."""

    def __str__(self) -> str:
        lines = [
            ("exported", f"step {self.step:,} to {self.output}"),
            ("model", f"{self.parameters:,} parameters, {self.dtype}"),
            ("files", f"{len(self.sizes)}, {sum(self.sizes.values()) / 1e6:,.1f} MB: {', '.join(sorted(self.sizes))}"),
            ("reloaded against the checkpoint", f"largest logit difference {self.reload_difference:.1e}"),
            ("decoding against the parallel form", f"largest logit difference {self.decode_difference:.1e} (float32)"),
        ]
        if self.merge_difference is not None:
            merged = f"largest logit difference {self.merge_difference:.1e} (float32)"
            lines.append(("merged against the adapters", merged))
        return column_table(lines, text_columns=2)


def export(
    checkpoint: str | Path,
    output: str | Path,
    report: str | Path | None = None,
    overwrite: bool = False,
    name: str | None = None,
    form: Form = "model",
) -> ExportResult:
    """Writes the model of a checkpoint as a transformers folder, reloads it and checks what it computes.

    The weights are the optimizer's float32 master weights, rounded to the run's `training.dtype`. The reloaded model
    must give the logits of these weights, and decoding through `RefreshCache` the logits of `Simulation`. Look-ahead
    queries (`training.look_ahead`) are a file of their own beside the model, whose numbers must be the checkpoint's
    when `refreshkv.enable` has found it. The folder appears when all hold; before that there is only
    `<output>.partial`, which an error removes.

    Of a checkpoint of adapters (`training.adapter`) it writes the base model with the adapters merged into its weights,
    which must give the logits of the adapters beside it; or, with form="adapter", the adapters in float32 in peft's
    format, with a config.json that carries the schedule.

    Runs on the CPU and takes about six bytes of memory per parameter in bf16, eight in fp32 or with adapters.

    Args:
        checkpoint: a checkpoint's folder, or a run's: then its newest finished checkpoint.
        output: the folder to write.
        report: folder of an evaluation whose table goes into the model card.
        overwrite: replace `output` if it is an earlier export and holds nothing else.
        name: the model's name in its card, such as its Hub id; None takes the folder's name.
        form: what is written; all but "model" need a checkpoint of adapters.

    Raises `ExportError`, with nothing left at `output`.
    """
    try:
        found = find_checkpoint(resolved(checkpoint, "CHECKPOINT"))
    except SettingsError as error:
        raise ExportError(str(error)) from error
    _validate_form(found, form)
    target = resolved(output, "OUT")
    card = model_card(found.settings, found.state, name or target.name, report, is_adapter=form == "adapter")
    with export_folder(target, found.folder, overwrite) as folder:
        written = (_write_adapter if form == "adapter" else _write_model)(found, card, folder)
    sizes = {file.name: file.stat().st_size for file in target.iterdir() if file.is_file() and file.name != RECORD_FILE}
    return ExportResult(target, found.state.step, sizes=sizes, **written)


def _validate_form(checkpoint: Checkpoint, form: Form) -> None:
    if form != "model" and checkpoint.settings.training.adapter is None:
        option = {"merged": "--merge", "adapter": "--adapter"}[form]
        raise ExportError(
            f"{option}: {checkpoint.folder} is of a run that trained all weights (no training.adapter): leave it out"
        )


def _write_model(checkpoint: Checkpoint, card: str, folder: Path) -> dict[str, Any]:
    """Writes and checks a whole model; the fields of `ExportResult` that follow from it."""
    dtype, merge_difference = DTYPES[checkpoint.settings.training.dtype], None
    origin = checkpoint.settings.model.origin
    look_ahead: dict[str, Tensor] = {}
    if checkpoint.settings.training.adapter is None:
        weights = consolidated_weights(checkpoint.folder, checkpoint.state.zero_stage, dtype)
        weights, look_ahead = split_weights(weights)
        model = checkpoint_model(checkpoint.folder, weights, dtype, origin)
    else:
        adapted = adapted_model(checkpoint)
        model, merge_difference = merged_model(adapted, random_rows(adapted.get_base_model()))
        del adapted
        for part in model.parameters():  # and no buffer: a model that is loaded keeps its frequencies in float32
            part.data = part.data.to(dtype)
    rows, parameters = random_rows(model), model.num_parameters()
    logits = logits_of(model, rows)
    _write(model, checkpoint.folder / "model", card, folder)
    if look_ahead:
        write_weights(look_ahead, folder)
    del model  # both models at once would double the memory
    reload_difference, decode_difference = check_export(folder, rows, logits, origin, look_ahead)
    return {
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "reload_difference": reload_difference,
        "decode_difference": decode_difference,
        "merge_difference": merge_difference,
    }


def _write_adapter(checkpoint: Checkpoint, card: str, folder: Path) -> dict[str, Any]:
    """Writes and checks the adapters alone, in float32; the fields of `ExportResult` that follow from them."""
    adapted = adapted_model(checkpoint)
    rows = random_rows(adapted.get_base_model())
    logits = logits_of(adapted, rows)
    parameters = sum(part.numel() for part in adapted.parameters() if part.requires_grad)
    write_adapter(adapted, folder)
    del adapted
    _describe(checkpoint.folder / "model", card, folder)
    model = load_adapter(checkpoint, folder).get_base_model()
    reload_difference, decode_difference = compare_reloaded(model, rows, logits)
    return {
        "parameters": parameters,
        "dtype": "float32",
        "reload_difference": reload_difference,
        "decode_difference": decode_difference,
    }


def _write(model: PreTrainedModel, description: Path, card: str, folder: Path) -> None:
    model.save_pretrained(folder)
    _describe(description, card, folder)


def _describe(description: Path, card: str, folder: Path) -> None:
    """Copies what describes the model, and writes its card."""
    for file in description.iterdir():  # the tokenizer and the generation config, unchanged
        if file.name != "config.json":
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    for file in folder.glob("*config.json"):
        write_json(file, without_local_paths(read_own_json(file, "CHECKPOINT")))
    write_text(folder / "README.md", card)
