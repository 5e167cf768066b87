"""Perplexity of the last tokens of prepared sequences, decoded from a small cache or with full attention."""

from refreshkv.evaluation.perplexity.evaluation import evaluate
from refreshkv.evaluation.perplexity.results import Evaluation, Result, gap_closed

__all__ = ["Evaluation", "Result", "evaluate", "gap_closed"]
