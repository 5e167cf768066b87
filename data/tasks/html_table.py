"""HTML to TSV: copy the items of a web page into a table (as LongProc's task, arXiv 2501.05414, on generated pages).

LongProc's pages are real web sites, which cannot be generated: this task is a substitute for its, built from catalogues
that do not exist, and named so.
"""

import csv
import re
import string
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.template import Template
from refreshkv.data.tasks.words import ADJECTIVES, NOUNS, coined_words
from refreshkv.settings import SettingsError

COLUMNS = ("Name", "Maker", "Price", "Rating", "Stock")
ARTICLES = re.compile(r"\b(a|an|the)\b")
FENCE = re.compile(r"```tsv(.*)```", re.DOTALL)
INVALID = "na"
"""Every cell of a row that has the wrong number of cells, after normalisation."""


@dataclass(frozen=True)
class HtmlTable(Family):
    """Size: items on the page. Only those of one category belong into the table."""

    max_new_tokens: int = 1024
    """Tokens that may be generated."""
    rows: int = 10
    """Items that belong into the table, of all on the page."""

    template: ClassVar[Template] = {
        "prompt": (
            "Below is the source of a web page with a catalogue.\n\n{context}\n\nWrite a table of all items of the "
            "category {category}, in the order of the page, as tab-separated values. Begin with ```tsv and the header "
            "{header}, write a line for each item with its values as they stand on the page, and end with ```.\n"
        ),
        "answer_prefix": "",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise SettingsError(f"rows must be a whole number >= 1, got {self.rows}")

    @property
    def substitutes(self) -> tuple[str, ...]:
        return ("generated pages for LongProc's web sites",)

    @property
    def least_size(self) -> int:
        return self.rows

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        asked, *others = (word.capitalize() for word in random.sample(NOUNS, 4))
        wanted = set(random.sample(range(size), self.rows))
        makers = [word.capitalize() for word in coined_words(random, size)]
        items = [_item(random, maker) for maker in makers]
        categories = [asked if i in wanted else random.choice(others) for i in range(size)]
        page = "\n".join(_markup(random, item, category) for item, category in zip(items, categories, strict=True))
        header = "\t".join(COLUMNS)
        table = "\n".join([header, *("\t".join(items[i]) for i in sorted(wanted))])
        return Problem(
            fields={"context": f"<html>\n<body>\n<main>\n{page}\n</main>\n</body>\n</html>", "category": asked}
            | {"header": ", ".join(COLUMNS)},
            answer=f"```tsv\n{table}\n```",
            references=table,
        )

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """LongProc's F1 of the rows, with their precision and recall. Cells are compared without case, punctuation,
        articles and spaces, rows without regard to their order."""
        found = read_table(_fenced(prediction))
        precision, recall = row_overlap(found, read_table(references))
        both = precision + recall
        return {"score": 2 * precision * recall / both if both else 0.0, "precision": precision, "recall": recall}


def read_table(text: str) -> list[tuple[str, ...]]:
    """The normalised rows below the first line, which sets the number of cells. A last row with another number is left
    out; any other such row counts, as one that matches nothing. Empty if there is no row, or no table can be read."""
    try:
        lines = list(csv.reader(text.strip().split("\n"), delimiter="\t"))
    except csv.Error:  # a carriage return in a cell, say
        return []
    if len(lines) < 2:
        return []
    width, rows = len(lines[0]), lines[1:]
    if len(rows[-1]) != width:
        rows = rows[:-1]
    return [tuple(map(_normalised, row)) if len(row) == width else (INVALID,) * width for row in rows]


def row_overlap(found: list[tuple[str, ...]], expected: list[tuple[str, ...]]) -> tuple[float, float]:
    """Precision and recall: shares of the found rows that are expected, and of the expected ones that were found."""
    if not found:
        return 0.0, 0.0
    precision = sum(row in expected for row in found) / len(found)
    return precision, sum(row in found for row in expected) / len(expected)


def _fenced(prediction: str) -> str:
    """The table in the prediction: between the fences, after the first if the second is missing, or all."""
    match = FENCE.search(prediction)
    return match.group(1) if match else prediction.partition("```tsv")[2] or prediction


def _normalised(cell: str) -> str:
    bare = "".join(character for character in cell.lower() if character not in string.punctuation)
    return "".join(ARTICLES.sub(" ", bare).split())


def _item(random: Random, maker: str) -> tuple[str, ...]:
    name = f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}".title()
    price = f"${random.randrange(100, 100_000) / 100:.2f}"
    return name, maker, price, f"{random.randrange(10, 51) / 10:.1f}", str(random.randrange(1000))


def _markup(random: Random, item: tuple[str, ...], category: str) -> str:
    name, maker, price, rating, stock = item
    number = random.randrange(10**5)
    return (
        f'<div class="card" id="item-{number}">\n  <h3><a href="/items/{number}">{name}</a></h3>\n'
        f'  <p class="kind">{category}</p>\n  <p>by <span class="maker">{maker}</span></p>\n'
        f'  <ul><li class="price">{price}</li><li class="rating">{rating}</li><li class="stock">{stock}</li></ul>\n'
        "</div>"
    )
