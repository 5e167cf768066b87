"""A pretrained model and prepared sequences, for the benchmarks that need real ones."""

import argparse
from typing import Any

import torch
from torch import Tensor

from refreshkv.evaluation.inputs import check_tokens, open_split
from refreshkv.loading import PLAIN, load_model, model_folder


def add_texts(parser: argparse.ArgumentParser, rows: int) -> None:
    """Options for a model and for texts, of which `rows` sequences each are read by default."""
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--data", required=True, action="append", help="folder of prepared sequences; may come again")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=rows, help="sequences of each text")


def open_model(args: argparse.Namespace, dtype: torch.dtype) -> tuple[str, Any]:
    """The folder of --model, and the model on --device."""
    folder = model_folder(args.model, "--model")
    model = load_model(folder, "--model", dtype=dtype).to(args.device).eval()  # pyright: ignore[reportArgumentType]  # transformers' wrapper of it hides `self`
    return folder, model


def read_sequences(model: Any, folder: str, data: str, split: str, rows: int) -> Tensor:
    """The tokens of the first prepared sequences in `data`, (rows, T). Raises `SettingsError` if they are other tokens
    than those of the model in `folder`."""
    prepared, sequences = open_split(data, split, rows)
    check_tokens(model, folder, prepared, PLAIN)
    return torch.as_tensor(sequences[:]["input_ids"])
