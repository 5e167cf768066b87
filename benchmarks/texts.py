"""A pretrained model and prepared sequences, for the benchmarks that need real ones."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from output import save
from refreshkv.evaluation.inputs import check_tokens, open_split
from refreshkv.evaluation.reports import hardware
from refreshkv.loading import PLAIN, load_model, model_folder
from refreshkv.tables import column_table


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


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options of `compare_choices`."""
    add_texts(parser, rows=4)
    parser.add_argument("--tokens", type=int, default=64, help="last tokens of each sequence, each of which selects")
    parser.add_argument("--budget", type=int, default=1024, help="positions that a step chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for a JSON file of the results")


def compare_choices(
    args: argparse.Namespace,
    compare: Callable[[Tensor, Tensor, float], Tensor],
    columns: Sequence[str],
    name: str,
    digits: int,
) -> None:
    """Prints a table of what `compare` measures on each text of --data, and writes it to `name`.json in --output.

    Full attention computes the sequences. `compare` gets the queries of the last --tokens tokens, (B, H, N, D), the
    keys, (B, Hkv, T, D), and the factor of the logits of each layer of each sequence; it returns a share for each of
    the columns, of which the table has the means, with so many digits after the point.
    """
    folder, model = open_model(args, torch.float32)
    shares: list[Tensor] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        shares.append(compare(query[:, :, -args.tokens :], key, scaling).cpu())
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(name, attention)
    model.set_attn_implementation(name)
    about = f"{hardware()}, torch {torch.__version__}, {time.strftime('%d %B %Y')}"
    settings, results, lines = {**vars(args), "output": None}, [], []
    for data in args.data:
        shares.clear()
        for row in tqdm(read_sequences(model, folder, data, args.split, args.rows), desc=Path(data).name):
            with torch.no_grad():
                model.base_model(row[None].to(args.device), use_cache=False)
        means = torch.stack(shares).mean(dim=0).tolist()
        results.append({"data": Path(data).name, **dict(zip(columns, means, strict=True))})
        lines.append((Path(data).name, *(f"{mean:.{digits}%}" for mean in means)))
        save(args.output, f"{name}.json", {"about": about, "settings": settings, "results": results})
    print(about, column_table([("text", *columns), *lines], text_columns=1), sep="\n")
