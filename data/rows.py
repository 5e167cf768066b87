"""Prepared rows: sequences of tokens written once, then read from disk by training and evaluation.

A row is a sequence of exactly `row_length` tokens.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_from_disk

from refreshkv.config import RefreshConfig
from refreshkv.data.config import MIXTURE, DataConfig
from refreshkv.data.content import content
from refreshkv.data.folder import INFO_FILE, SPLITS, TOKENIZER_FOLDER, rows_folder
from refreshkv.data.mixture import write_mixture
from refreshkv.data.preparation import LAYOUT, write_splits
from refreshkv.data.report import PreparationReport, share_beyond
from refreshkv.files import write_json
from refreshkv.folders import resolved
from refreshkv.loading import Origin, find_tokenizer
from refreshkv.reading import read_json, refuse_special_files
from refreshkv.settings import SettingsError

INFO_KEYS: dict[str, type] = {
    "layout": int,
    "data": dict,
    "splits": dict,
    "vocabulary_size": int,
    "largest_token_id": int,
    "fingerprint": str,
}
"""What readers of a rows.json use, and its kind."""


@dataclass(frozen=True)
class Rows:
    """The three splits of a prepared folder, memory-mapped.

    A sequence is {"input_ids": (row_length,) int64 tensor, "document": short hash of its document}. Sequences of tasks
    also have "prompt_length" and "answer_length", () int64: the answer, its end-of-text token included, is in columns
    `prompt_length .. prompt_length + answer_length - 1`.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    tokenizer_folder: Path
    info: dict[str, Any]
    """The content of the folder's rows.json, and the folder itself as "folder"."""


def prepare_rows(config: DataConfig, budget: int | float, overwrite: bool = False) -> PreparationReport:
    """Turns the documents of `config` into sequences of exactly `row_length` tokens in `config.folder`.

    Each document is tokenized without special tokens, the end-of-text token is added, and the whole is cut into
    consecutive sequences; none mixes documents. A document shorter than `row_length` is dropped, and so is the end that
    does not fill a sequence (with it, mostly, the end-of-text token); both are counted. A document's split depends on
    the hash of its text alone. With `path=tasks` each sequence holds one example of a task instead, see
    `refreshkv.data.tasks.rows`, and with `path=mixture` the sequences of other folders, see
    `refreshkv.data.mixture`. The folder appears when it is complete.

    Args:
        budget: the run's `refresh.budget`, for the report.
        overwrite: replace a folder that holds prepared rows.

    Raises `SettingsError` for a source, a tokenizer or a folder that cannot be used, and if no document reaches the
    train split.
    """
    capacity = RefreshConfig(budget=budget).largest_budget(config.row_length)
    target = resolved(config.folder, "data.folder")
    if config.path != MIXTURE and (config.tokenizer is None) == (config.train_vocabulary is None):
        raise SettingsError(
            "set exactly one of data.tokenizer (the model's folder or hub id) and data.train_vocabulary (such as 4096, "
            "to train a tokenizer), and the other to null"
        )
    parts = [load_rows(name) for name in config.folders or []]
    with rows_folder(target, overwrite) as folder:
        info = write_mixture(config, folder, parts) if parts else write_splits(config, folder)
        write_json(folder / INFO_FILE, info)
    return PreparationReport(target, info, capacity, share_beyond(budget, config.row_length))


def load_rows(folder: str | Path) -> Rows:
    """Opens a folder of `prepare_rows` as torch datasets.

    Raises `SettingsError` if it is missing or damaged, or if its files hold other sequences than its rows.json says.
    """
    folder = resolved(folder, "data.folder")
    if not os.path.lexists(folder / INFO_FILE):
        raise SettingsError(f"data.folder={folder} holds no prepared rows; run launch/prepare.py first")
    try:
        info = _read_info(folder / INFO_FILE)
        refuse_special_files(folder, "data.folder")
        splits = load_from_disk(str(folder), keep_in_memory=False).with_format("torch")
        if not isinstance(splits, DatasetDict):
            raise ValueError("it holds one table and no splits")
        if any(len(splits[split]) != info["splits"][split]["rows"] for split in SPLITS):
            raise ValueError(f"the number of rows is not the one in {INFO_FILE}")
        _validate_content(folder, info, splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(
            f"data.folder={folder} is damaged ({reason}); prepare it again with launch/prepare.py --overwrite"
        ) from error
    info["folder"] = str(folder)
    return Rows(**{split: splits[split] for split in SPLITS}, tokenizer_folder=folder / TOKENIZER_FOLDER, info=info)


def _read_info(file: Path) -> dict[str, Any]:
    """The content of a rows.json. Raises `ValueError` if it lacks a key that readers use, or has it in another form."""
    info = read_json(file, "data.folder")
    if not isinstance(info, dict):
        raise ValueError(f"{INFO_FILE} holds no section with keys")
    for key, kind in INFO_KEYS.items():
        if type(info.get(key)) is not kind:
            raise ValueError(f"{INFO_FILE} lacks {key}" if key not in info else f"{key} in {INFO_FILE} is no {kind}")
    if info["layout"] > LAYOUT:
        raise ValueError(f"layout {info['layout']} of {INFO_FILE} is that of a later version of refreshkv")
    if type(info["data"].get("row_length")) is not int:
        raise ValueError(f"{INFO_FILE} lacks data.row_length")
    for split in SPLITS:
        if not isinstance(info["splits"].get(split), dict) or type(info["splits"][split].get("rows")) is not int:
            raise ValueError(f"{INFO_FILE} lacks splits.{split}.rows")
    return info


def _validate_content(folder: Path, info: dict[str, Any], splits: DatasetDict) -> None:
    """Raises `ValueError` unless the files hold exactly the sequences that rows.json was written for."""
    found = content(folder, splits, info["data"]["row_length"])
    if found["fingerprints"].get(str(info["layout"])) != info["fingerprint"]:
        raise ValueError(f"its files hold other sequences than the fingerprint in {INFO_FILE} says")
    if found["smallest"] < 0 or found["largest"] > info["largest_token_id"]:
        raise ValueError(f"its files hold token ids that {INFO_FILE} does not tell of")


def validate_same_tokens(model: str, rows: Rows, origin: Origin) -> None:
    """Raises `SettingsError` if an id means another token to the model's tokenizer than to that of the rows.

    Either tokenizer may have tokens that the other lacks. Nothing is compared if the model has no tokenizer.
    """
    own, used = find_tokenizer(model, origin), find_tokenizer(rows.tokenizer_folder, origin.of_folder)
    if own is None or used is None:
        return
    ids = own.get_vocab()
    if any(ids.get(token, number) != number for token, number in used.get_vocab().items()):
        raise SettingsError(
            f"the rows in {rows.info['folder']} were made with another tokenizer than that of {model}: prepare them "
            f"again with data.tokenizer={model}"
        )


def validate_token_ids(info: dict[str, Any], model_vocab_size: int) -> None:
    """Raises `SettingsError` if the rows that `info` (of `Rows`) describes hold ids without an embedding in the model.

    Some tokenizers have more tokens than their model: the largest id in the rows decides, not the tokenizer's size.
    """
    if info["largest_token_id"] >= model_vocab_size:
        raise SettingsError(
            f"the rows in {info['folder']} were made with a tokenizer of {info['vocabulary_size']} tokens but the "
            f"model has {model_vocab_size}; prepare them again with data.tokenizer=MODEL"
        )
