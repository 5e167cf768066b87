"""What is measured on generated tokens, in plain Python."""

from collections.abc import Sequence
from statistics import fmean

NGRAM = 4
"""Tokens of the sequences whose repetition is counted."""
BLOCKS = 8
"""Parts of equal length into which the generated positions are divided."""


def repetition(tokens: Sequence[int], length: int = NGRAM) -> float:
    """Share of the runs of `length` tokens that came before in the same text (0 to 1); 0 for a text without one."""
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common before they differ."""
    pairs = zip(first, second, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))


def in_blocks(sequences: Sequence[Sequence[float]], blocks: int = BLOCKS) -> list[float]:
    """Means of sequences of N values over at most `blocks` parts of their positions, which differ in length by one."""
    count = len(sequences[0])
    blocks = min(blocks, count)
    edges = [i * count // blocks for i in range(blocks + 1)]
    return [
        fmean(value for own in sequences for value in own[start:end])
        for start, end in zip(edges, edges[1:], strict=False)
    ]
