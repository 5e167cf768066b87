"""How far the score of the last chosen position moves between selecting steps: a real model on prepared sequences.

    python benchmarks/thresholds.py --model DIR_OR_HUB_ID --data ROWS [--data ROWS] [--rows 4] [--apart 2]

A selecting step chooses the --budget positions that score highest, and has to find the score of the last one. A step
that took the last step's for a guess would look in a bracket around it. The table has, for each text and for brackets
of several widths, how often the score lies in the bracket around that of the step --apart tokens before (`found`), and
how many of the positions do (`positions`). The widths are powers of two on either side. Full attention computes the
sequences, and its keys the scores, pooled as in RefreshConfig.recommended(). --output DIR writes thresholds.json.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from refreshkv import RefreshConfig
from refreshkv.ops.naive import selection
from texts import add_choices, compare_choices

WIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Powers of two on either side of a guess."""

COLUMNS = tuple(f"{kind} {width:g}" for kind in ("found", "positions") for width in WIDTHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choices(parser)
    parser.add_argument("--apart", type=int, default=2, help="tokens from one selecting step to the next")
    args = parser.parse_args()
    compare = partial(compare_thresholds, apart=args.apart, budget=args.budget)
    compare_choices(args, compare, COLUMNS, "thresholds", digits=1)


def compare_thresholds(query: Tensor, key: Tensor, scaling: float, apart: int, budget: int) -> Tensor:
    """The COLUMNS for the steps of these queries, (B, H, N, D), which are the last of key's T positions."""
    options, length = RefreshConfig.recommended(select_stride=apart).selection_options(), key.shape[2]
    positions = torch.arange(length - query.shape[2], length, device=key.device)[None]
    padding = torch.zeros(1, dtype=torch.int64, device=key.device)
    scores = selection.observed_scores(query.unsqueeze(3), key, positions, padding, scaling)
    scores = selection.pool(scores, positions, padding, options.pool_kernel, options.pool_ahead)
    unseen = torch.arange(length, device=key.device) > positions[..., None]
    scores = scores.masked_fill(unseen, 0.0).log2()
    thresholds = scores.topk(budget).values[..., -1]
    widths = torch.tensor(WIDTHS, device=key.device)[:, None, None, None]
    moved = (thresholds[..., apart:] - thresholds[..., :-apart]).abs()
    found = (moved < widths).float().flatten(1).mean(dim=1)
    near = [((scores - thresholds[..., None]).abs() < width).sum(-1) / (positions + 1) for width in WIDTHS]
    return torch.cat([found, torch.stack([share.mean() for share in near])])


if __name__ == "__main__":
    main()
