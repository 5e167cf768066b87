"""How far the score of the last chosen position moves between selecting steps: a real model on prepared sequences.

    python benchmarks/thresholds.py --model DIR_OR_HUB_ID --data ROWS [--data ROWS] [--rows 4] [--apart 2]

A selecting step chooses the --budget positions that score highest, and has to find the score of the last one. A step
that took the last step's for a guess would look in a bracket around it. The table has, for each text and for brackets
of several widths, how often the score lies in the bracket around that of the step --apart tokens before (`found`), and
how many of the positions do (`positions`). The widths are powers of two on either side. Full attention computes the
sequences, and its keys the scores, pooled as in RefreshConfig.recommended(). --output DIR writes thresholds.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from output import save
from refreshkv import RefreshConfig
from refreshkv.evaluation.reports import hardware
from refreshkv.ops.naive import selection
from refreshkv.tables import column_table
from texts import add_texts, open_model, read_sequences

WIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Powers of two on either side of a guess."""

COLUMNS = tuple(f"{kind} {width:g}" for kind in ("found", "positions") for width in WIDTHS)

NAME = "thresholds"


def main() -> None:
    args = read_arguments()
    folder, model = open_model(args, torch.float32)
    watch = Watch(args)
    AttentionInterface.register(NAME, watch.attention)
    model.set_attn_implementation(NAME)
    about = f"{hardware()}, torch {torch.__version__}, {time.strftime('%d %B %Y')}"
    results: list[dict[str, Any]] = []
    for data in args.data:
        sequences = read_sequences(model, folder, data, args.split, args.rows)
        watch.shares = []
        for row in tqdm(sequences, desc=Path(data).name, unit="sequence"):
            with torch.no_grad():
                model.base_model(row[None].to(args.device), use_cache=False)
        shares = torch.stack(watch.shares).mean(dim=0).tolist()
        results.append({"data": Path(data).name, **dict(zip(COLUMNS, shares, strict=True))})
        save(
            args.output,
            "thresholds.json",
            {"about": about, "settings": {**vars(args), "output": None}, "results": results},
        )
    print(about, table(results), sep="\n")


class Watch:
    """Attention that compares the scores of the last tokens' choices."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.options = RefreshConfig.recommended(select_stride=args.apart).selection_options()
        self.shares: list[Tensor] = []
        """For each layer of each sequence: the COLUMNS."""

    def attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
        """As transformers calls it: query (B, H, T, D), key and value (B, Hkv, T, D)."""
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        self.shares.append(self.compare(query[:, :, -self.args.tokens :], key, scaling))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    def compare(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """The COLUMNS for the steps of these queries, (B, H, N, D), which are the last of key's T positions."""
        apart, length = self.args.apart, key.shape[2]
        positions = torch.arange(length - query.shape[2], length, device=key.device)[None]
        padding = torch.zeros(1, dtype=torch.int64, device=key.device)
        scores = selection.observed_scores(query.unsqueeze(3), key, positions, padding, scaling)
        scores = selection.pool(scores, positions, padding, self.options.pool_kernel, self.options.pool_ahead)
        unseen = torch.arange(length, device=key.device) > positions[..., None]
        scores = scores.masked_fill(unseen, 0.0).log2()
        thresholds = scores.topk(self.args.budget).values[..., -1]
        widths = torch.tensor(WIDTHS, device=key.device)[:, None, None, None]
        moved = (thresholds[..., apart:] - thresholds[..., :-apart]).abs()
        found = (moved < widths).float().flatten(1).mean(dim=1)
        near = [((scores - thresholds[..., None]).abs() < width).sum(-1) / (positions + 1) for width in WIDTHS]
        return torch.cat([found, torch.stack([share.mean() for share in near])]).cpu()


def table(results: list[dict[str, Any]]) -> str:
    lines = [(line["data"], *(f"{line[name]:.1%}" for name in COLUMNS)) for line in results]
    return column_table([("text", *COLUMNS), *lines], text_columns=1)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_texts(parser, rows=4)
    parser.add_argument("--tokens", type=int, default=64, help="last tokens of each sequence, each of which selects")
    parser.add_argument("--apart", type=int, default=2, help="tokens from one selecting step to the next")
    parser.add_argument("--budget", type=int, default=1024, help="positions that a step chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for thresholds.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
