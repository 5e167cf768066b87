"""Tables as text: aligned columns for a terminal, and markdown.

Both take lines of equally many cells, the header first. The first `text_columns` are aligned left, numbers right.
"""

from collections.abc import Sequence


def column_table(lines: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Columns two spaces apart, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(lines: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A markdown table; a `|` inside a cell is escaped."""
    header, *others = lines
    rule = [":---" if column < text_columns else "---:" for column in range(len(header))]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *others)]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
