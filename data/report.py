"""What a preparation prints when it is done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refreshkv.tables import column_table


@dataclass(frozen=True)
class PreparationReport:
    """The prepared folder, its rows.json, and how much of a row the small cache constrains. `str()` is the table."""

    folder: Path
    info: dict[str, Any]
    budget: int
    """The small cache's size K for a prompt as long as a row."""
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
            return [
                f"{self.folder}: rows of {row_length:,} tokens, no row of two documents; each document ends in "
                f"{info['end_of_text']}, no other special token is added"
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


def _table(splits: dict[str, dict[str, int]]) -> str:
    columns = ("documents", "dropped_documents", "rows", "tokens", "leftover_tokens")
    lines = [["split", "documents", "dropped", "rows", "tokens", "left over"]]
    lines += [[split, *(f"{counts[column]:,}" for column in columns)] for split, counts in splits.items()]
    lines.append(["total", *(f"{sum(counts[column] for counts in splits.values()):,}" for column in columns)])
    return column_table(lines)
