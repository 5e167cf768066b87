"""Writes the model of a training checkpoint as a plain transformers folder, and checks it against the checkpoint."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from refreshkv.files import RECORD_FILE, write_json, write_text
from refreshkv.folders import resolved
from refreshkv.generation.custom_generate import write_custom_generate
from refreshkv.settings import SettingsError
from refreshkv.tables import column_table
from refreshkv.train.card import model_card
from refreshkv.train.checkpoint_model import checkpoint_model, consolidated_weights
from refreshkv.train.checkpoint_reader import find_checkpoint
from refreshkv.train.export_check import check_export, logits_of, random_rows
from refreshkv.train.export_error import ExportError
from refreshkv.train.export_folder import export_folder
from refreshkv.train.public_files import without_local_paths

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
        name: the model's name in its card, such as its Hub id; None takes the folder's name.

    Raises `ExportError`, with nothing left at `output`.
    """
    try:
        found = find_checkpoint(resolved(checkpoint, "CHECKPOINT"))
    except SettingsError as error:
        raise ExportError(str(error)) from error
    target = resolved(output, "OUT")
    checkpoint, run, state = found.folder, found.settings, found.state
    card = model_card(run, state, name or target.name, report)
    dtype = DTYPES[run.training.dtype]
    with export_folder(target, checkpoint, overwrite) as folder:
        model = checkpoint_model(checkpoint, consolidated_weights(checkpoint, state.zero_stage, dtype), dtype)
        rows, parameters = random_rows(model), model.num_parameters()
        logits = logits_of(model, rows)
        _write(model, checkpoint / "model", card, folder)
        del model  # both models at once would double the memory
        reload_difference, decode_difference = check_export(folder, rows, logits)
    sizes = {file.name: file.stat().st_size for file in target.iterdir() if file.is_file() and file.name != RECORD_FILE}
    name_of_dtype = str(dtype).removeprefix("torch.")
    return ExportResult(target, state.step, parameters, name_of_dtype, sizes, reload_difference, decode_difference)


def _write(model: PreTrainedModel, description: Path, card: str, folder: Path) -> None:
    model.save_pretrained(folder)
    for file in description.iterdir():  # the tokenizer and the generation config, unchanged
        if file.name != "config.json":
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    for file in folder.glob("*config.json"):
        write_json(file, without_local_paths(json.loads(file.read_text(encoding="utf-8"))))
    write_custom_generate(folder)
    write_text(folder / "README.md", card)
