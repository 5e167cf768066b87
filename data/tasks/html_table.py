"""HTML to TSV: copy the items of a web page into a table (after LongProc, Ye et al., arXiv 2501.05414).

LongProc uses real web sites. This task generates catalogues instead, and its label says that it is a substitute.
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
"""Replaces every cell of a table line with the wrong number of cells."""


@dataclass(frozen=True)
class HtmlTable(Family):
    """Size: items on the page. The table holds those of one category."""

    max_new_tokens: int = 1024
    """Tokens that may be generated."""
    rows: int = 10
    """Items of the page that belong into the table."""

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
        """As `table_scores`."""
        return table_scores(prediction, references)


def table_scores(prediction: str, table: str) -> dict[str, float]:
    """LongProc's F1 over table lines, with precision and recall. Case, punctuation, articles and spaces of cells do not
    matter, nor does the order of lines."""
    precision, recall = row_overlap(read_table(_fenced(prediction)), read_table(table))
    both = precision + recall
    return {"score": 2 * precision * recall / both if both else 0.0, "precision": precision, "recall": recall}


def read_table(text: str) -> list[tuple[str, ...]]:
    """The normalised table lines below the header, which sets the number of cells.

    A last line with another number of cells is left out, any other such line matches nothing. Returns [] if there is no
    line or the table cannot be read.
    """
    try:
        lines = list(csv.reader(text.strip().split("\n"), delimiter="\t"))
    except csv.Error:  # such as a carriage return in a cell
        return []
    if len(lines) < 2:
        return []
    width, body = len(lines[0]), lines[1:]
    if len(body[-1]) != width:
        body = body[:-1]
    return [tuple(map(_normalised, line)) if len(line) == width else (INVALID,) * width for line in body]


def row_overlap(found: list[tuple[str, ...]], expected: list[tuple[str, ...]]) -> tuple[float, float]:
    """Precision and recall: the shares of found lines that are expected, and of expected lines that are found."""
    if not found:
        return 0.0, 0.0
    precision = sum(line in expected for line in found) / len(found)
    return precision, sum(line in found for line in expected) / len(expected)


def _fenced(prediction: str) -> str:
    """The text between the fences; all after the first if the second is missing; everything if there is none."""
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
