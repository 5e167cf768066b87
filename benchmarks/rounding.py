"""How many positions a selecting step chooses otherwise because kernels round: a real model on prepared sequences.

    python benchmarks/rounding.py --model DIR_OR_HUB_ID --data ROWS [--data ROWS] [--rows 4] [--budget 1024]

With 16-bit caches, the kernels of a selecting step round queries to whole numbers of 16 bits, and for large batches
the logits to float16, relative to the mean of a sample (`refreshkv.ops.step.selecting.scoring`). Here PyTorch does the
same. The table has, for each text, which share of the --budget chosen positions differs from the choice without this
rounding: with rounded queries, and with rounded queries and logits. For comparison, `4 bits` is the share that differs
between score keys of 4 bits and the keys themselves. Full attention computes the sequences; scores are pooled as in
RefreshConfig.recommended(select_stride=2). --output DIR writes rounding.json.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from refreshkv import RefreshConfig
from refreshkv.ops.naive import score_keys, selection
from refreshkv.ops.step.selecting.scoring import SAMPLED
from refreshkv.ops.tiles import LOG2E
from texts import add_choices, compare_choices

COLUMNS = ("rounded queries", "and logits", "4 bits")

OPTIONS = RefreshConfig.recommended(select_stride=2).selection_options()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choices(parser)
    args = parser.parse_args()
    compare_choices(args, partial(differing, budget=args.budget), COLUMNS, "rounding", digits=3)


def differing(query: Tensor, key: Tensor, scaling: float, budget: int) -> Tensor:
    """The COLUMNS for the steps of these queries, (B, H, N, D), which are the last of key's T positions."""
    query, key = query.bfloat16().float(), key.bfloat16().float()
    scored = score_keys.score_keys_of(key, 4)
    rounded = logits_of(rounded_queries(query), scored, scaling)
    expected = chosen(logits_of(query, scored, scaling), budget)
    others = (rounded, narrow(rounded), logits_of(query, key, scaling))
    return torch.stack([(expected & ~chosen(other, budget)).sum() / expected.sum() for other in others])


def chosen(logits: Tensor, budget: int) -> Tensor:
    """Which positions each step chooses by logits (B, Hkv, G, N, T) of base 2: (B, Hkv, N, T) bool."""
    steps, length = logits.shape[3:]
    positions = torch.arange(length - steps, length, device=logits.device)[None]
    padding = torch.zeros(1, dtype=torch.int64, device=logits.device)
    unseen = torch.arange(length, device=logits.device) > positions[..., None]
    scores = (logits / LOG2E).masked_fill(unseen, -torch.inf).softmax(-1).amax(2)
    pooled = selection.pool(scores, positions, padding, OPTIONS.pool_kernel, OPTIONS.pool_ahead)
    best = pooled.masked_fill(unseen, 0.0).topk(budget).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def logits_of(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Logits of base 2 of queries (B, H, N, D) and keys (B, Hkv, T, D): (B, Hkv, G, N, T)."""
    return query.unflatten(1, (key.shape[1], -1)) @ key.unsqueeze(2).mT * (scaling * LOG2E)


def rounded_queries(query: Tensor) -> Tensor:
    """As `query_bytes` rounds queries (.., D)."""
    _, exponent = torch.frexp(query.abs().amax(-1, keepdim=True) * 1.004)
    unit = torch.exp2(exponent - 15.0)
    return torch.floor(query / unit + 0.5) * unit


def narrow(logits: Tensor) -> Tensor:
    """As `score_share` stores logits (.., N, T) in float16: each step's relative to their mean over a sample."""
    steps, length = logits.shape[-2:]
    positions = torch.arange(length - steps, length, device=logits.device)
    sampled = positions[:, None] * torch.arange(SAMPLED.value, device=logits.device) // SAMPLED.value
    middle = logits.gather(-1, sampled.expand(*logits.shape[:-2], -1, -1)).mean(-1, keepdim=True)
    return (logits - middle).half().float() + middle


if __name__ == "__main__":
    main()
