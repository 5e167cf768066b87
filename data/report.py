"""The report of a preparation: counts of each split, and warnings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refreshkv.config import RefreshConfig
from refreshkv.tables import column_table


@dataclass(frozen=True)
class PreparationReport:
    """What a preparation wrote, and how much of it a small cache constrains. `str()` gives a table and warnings."""

    folder: Path
    info: dict[str, Any]
    """The content of the folder's rows.json."""
    budget: int
    """The small cache's size K, in tokens, for a prompt as long as a row."""
    share_beyond: float
    """Share of a row's positions whose context is longer than K (0 to 1)."""

    def __str__(self) -> str:
        return "\n".join([_table(self.info["splits"]), *self._notes(), *self._warnings()])

    def _notes(self) -> list[str]:
        info = self.info
        return [
            *self._contents(),
            f"vocabulary {info['vocabulary_size']:,}, fingerprint {info['fingerprint'][:16]}",
            f"context longer than the small cache (K = {self.budget:,}): {self.share_beyond:.1%} of a row's positions",
        ]

    def _contents(self) -> list[str]:
        info, row_length = self.info, self.info["data"]["row_length"]
        if "tasks" not in info:
            fim = info["data"].get("fim")
            added = (
                "no other special token is added"
                if fim is None
                else f"about {fim['share']:.0%} of documents are fill-in-the-middle sequences, each with its own end"
            )
            names = sum(counts["special_names"] for counts in info["splits"].values())
            return [
                f"{self.folder}: rows of {row_length:,} tokens, no row of two documents; each document ends in "
                f"{info['end_of_text']}, {added}",
                *([f"names of special tokens in the documents, kept as ordinary text: {names:,}"] if names else []),
            ]
        return [
            f"{self.folder}: rows of {row_length:,} tokens, an example each of {', '.join(info['tasks'])}",
            f"answers begin at token {info['prompt_length']}: with simulation.prompt_length={info['prompt_length']} so "
            "do the simulated steps",
        ]

    def _warnings(self) -> list[str]:
        row_length = self.info["data"]["row_length"]
        warnings = [
            f"warning: {split} has no rows; use more or longer documents, or a smaller data.row_length"
            for split, counts in self.info["splits"].items()
            if counts["rows"] == 0
        ]
        if self.share_beyond == 0:
            warnings.append(
                f"warning: the small cache (K = {self.budget:,}) holds a whole row of {row_length:,} tokens and never "
                "constrains anything; lower refresh.budget or raise data.row_length"
            )
        return warnings


def share_beyond(budget: int | float, row_length: int) -> float:
    """Share (0 to 1) of a row's positions whose context, `t + 1` tokens at position t, is longer than the budget K.

    A fraction is taken of the whole row: K is the largest that any prompt in the row can give.
    """
    capacity = RefreshConfig(budget=budget).largest_budget(row_length)
    return max(0, row_length - capacity) / row_length


def _table(splits: dict[str, dict[str, int]]) -> str:
    columns = ("documents", "dropped_documents", "rows", "tokens", "leftover_tokens")
    lines = [["split", "documents", "dropped", "rows", "tokens", "left over"]]
    lines += [[split, *(f"{counts[column]:,}" for column in columns)] for split, counts in splits.items()]
    lines.append(["total", *(f"{sum(counts[column] for counts in splits.values()):,}" for column in columns)])
    return column_table(lines)
