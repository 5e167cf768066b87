"""Prepared folders with given sequences, as `prepare_rows` would leave them."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict

from refreshkv.data.content import content
from refreshkv.data.folder import INFO_FILE
from refreshkv.data.preparation import LAYOUT


def save_rows(folder: Path, splits: dict[str, list[list[int]]], vocabulary_size: int) -> None:
    """Writes the splits, sequences of equal length, and their rows.json."""
    rows = DatasetDict({split: Dataset.from_dict({"input_ids": ids}) for split, ids in splits.items()})
    rows.save_to_disk(folder, num_shards=dict.fromkeys(splits, 1))
    row_length = len(next(ids for own in splits.values() for ids in own))
    info = {
        "layout": LAYOUT,
        "data": {"row_length": row_length},
        "splits": {split: {"rows": len(ids)} for split, ids in splits.items()},
        "largest_token_id": vocabulary_size - 1,
        "vocabulary_size": vocabulary_size,
        "fingerprint": content(folder, rows, row_length)["fingerprints"][str(LAYOUT)],
    }
    (folder / INFO_FILE).write_text(json.dumps(info))
