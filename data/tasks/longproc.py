"""LongProc's released problems, prompts and scores (Ye et al., COLM 2025, arXiv 2501.05414).

`tasks.NAME.data` names a copy of the folder `data` of LongProc's repository. It holds a folder for each task, with
`prompts.yaml` and the problems of each level, such as `html_to_tsv/html_to_tsv_0.5k.json`.
"""

import json
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

import yaml

from refreshkv.data.tasks.countdown import is_solution
from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.html_table import HtmlTable
from refreshkv.data.tasks.longproc_search import SEARCH_HEADING, leading_actions, written_search
from refreshkv.data.tasks.path_traversal import PathTraversal
from refreshkv.data.tasks.scoring import between_tags
from refreshkv.data.tasks.template import Template
from refreshkv.settings import SettingsError

COUNTDOWN_EXAMPLES = (([40, 19, 23, 7], 29), ([9, 16, 6, 18], 12))
"""Numbers and target of the two solved problems in each of LongProc's countdown prompts."""


@dataclass(frozen=True)
class Released(Family):
    """A task of LongProc whose problems are read from files. A problem has one size."""

    data: str = ""
    """Copy of the folder `data` of LongProc's repository."""
    level: Literal["0.5k", "2k", "8k"] = "0.5k"
    """LongProc's level: about how many tokens the answer has."""
    length: int = 40960
    """Tokens of a prompt and its answer together; an error says if a prompt needs more."""
    max_new_tokens: int = 1024
    """Tokens that may be generated."""
    shortest_prompt: int = 0
    """Problems whose prompt has fewer tokens are left out; the RefreshKV paper leaves out prompts under 10K tokens."""

    folder: ClassVar[str]
    """The task's folder."""
    columns: ClassVar[dict[str, type | tuple[type, ...]]]
    """Columns that every problem must have, and their types."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortest_prompt < 0 or self.shortest_prompt > self.length - self.max_new_tokens:
            raise SettingsError(
                f"shortest_prompt={self.shortest_prompt} must lie between 0 and length - max_new_tokens = "
                f"{self.length - self.max_new_tokens}"
            )
        self._records()

    @property
    def wording(self) -> Template:
        return {"prompt": _read_prompt(self.data, self.folder), "answer_prefix": ""}

    def largest_size(self, index: int) -> int | None:
        return 1

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        records = self._records()
        if index >= len(records):
            raise SettingsError(
                f"data: {self._file()} holds {len(records)} problems: ask for fewer examples"
                + (f", or lower shortest_prompt={self.shortest_prompt}" if self.shortest_prompt else "")
            )
        return self._problem(records[index])

    @abstractmethod
    def _problem(self, record: dict[str, Any]) -> Problem:
        """The problem of a record that has all of `columns`."""

    def _file(self) -> Path:
        return Path(self.data) / self.folder / f"{self.folder}_{self.level}.json"

    def _records(self) -> list[dict[str, Any]]:
        return _read_records(self._file(), tuple(self.columns.items()))


@dataclass(frozen=True)
class ReleasedHtmlTable(Released):
    """LongProc's HTML to TSV: real web pages."""

    folder: ClassVar[str] = "html_to_tsv"
    columns: ClassVar[dict[str, type | tuple[type, ...]]] = dict.fromkeys(
        ("html_path", "task_topic", "task_description", "filtering_instruction", "tsv_header", "gt"), str
    )

    def _problem(self, record: dict[str, Any]) -> Problem:
        names = ("task_topic", "task_description", "filtering_instruction", "tsv_header")
        page = _read_text(_inside(Path(self.data) / self.folder, record["html_path"]))
        fields = {"html_str": page, **{name: record[name] for name in names}}
        return Problem(fields, answer=f"```tsv\n{record['gt']}\n```", references=record["gt"])

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """LongProc's F1 over table lines, with precision and recall, see `HtmlTable.score`."""
        return HtmlTable.score(self, prediction, references)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReleasedPathTraversal(Released):
    """LongProc's path traversal: routes between real cities."""

    folder: ClassVar[str] = "path_traversal"
    columns: ClassVar[dict[str, type | tuple[type, ...]]] = {
        "context_nl": str,
        "question_repr": list,
        "answer_nl": str,
    }

    def _problem(self, record: dict[str, Any]) -> Problem:
        start, goal = record["question_repr"]
        fields = {"city_context": record["context_nl"], "src_city": start, "dst_city": goal}
        route = record["answer_nl"].strip()
        return Problem(fields, answer=f"<Route>\n{route}\n</Route>", references=route.split("\n"))

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """score: 1 for the whole route, else 0; partial: the share of leading right lines."""
        return PathTraversal.score(self, prediction, references)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReleasedCountdown(Released):
    """LongProc's countdown, with its two solved examples in the prompt."""

    length: int = 8192
    """Tokens of a prompt and its answer together; an error says if a prompt needs more."""

    folder: ClassVar[str] = "countdown"
    columns: ClassVar[dict[str, type | tuple[type, ...]]] = {"nums": list, "target": int}

    def _problem(self, record: dict[str, Any]) -> Problem:
        numbers, target = record["nums"], record["target"]
        lines, answer = written_search(tuple(numbers), target)
        return Problem(
            fields={"nums": str(numbers), "target": str(target), "demonstration": _solved_examples()},
            answer=answer,
            references={"numbers": numbers, "target": target, "search": list(lines)},
        )

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """score: LongProc's accuracy, 1 for three right equations that use all numbers and end in the target, whatever
        the search. partial: 1 for those, else the share of leading right lines of the search."""
        solution = between_tags(prediction, "Solution")
        if solution is not None and is_solution(solution, references["numbers"], references["target"]):
            return {"score": 1.0, "partial": 1.0}
        if SEARCH_HEADING not in prediction:
            return {"score": 0.0, "partial": 0.0}
        found = prediction.rpartition(SEARCH_HEADING)[2].strip().split("\n")
        return {"score": 0.0, "partial": leading_actions(found, references["search"]) / len(references["search"])}


RELEASED: dict[str, type[Released]] = {
    "html_to_tsv": ReleasedHtmlTable,
    "path_traversal": ReleasedPathTraversal,
    "countdown": ReleasedCountdown,
}
"""The families that stand in for the generated ones of the same name where `data` is set."""


def _solved_examples() -> str:
    parts = []
    for numbers, target in COUNTDOWN_EXAMPLES:
        _, answer = written_search(tuple(numbers), target)
        parts.append(f"# Example\nNumbers: {numbers}\nTarget: {target}\n\n{answer}")
    return "\n\n".join(parts)


@lru_cache(maxsize=8)
def _read_prompt(data: str, folder: str) -> str:
    path = Path(data) / folder / "prompts.yaml"
    try:
        parts = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise SettingsError(f"data: {path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(parts, dict) or not isinstance(parts.get("USER_PROMPT"), str):
        raise SettingsError(f"data: {path} has no text USER_PROMPT: copy LongProc's folder again")
    return parts["USER_PROMPT"]


@lru_cache(maxsize=8)
def _read_records(path: Path, columns: tuple[tuple[str, type], ...]) -> list[dict[str, Any]]:
    try:
        records = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise SettingsError(f"data: {path} is not readable JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise SettingsError(f"data: {path} must be a list of problems: copy LongProc's folder again")
    for number, record in enumerate(records):
        for column, kind in columns:
            if not isinstance(record, dict) or not isinstance(record.get(column), kind):
                raise SettingsError(f"data: {path}, problem {number}: {column} must be {kind.__name__}")
    return records


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(
            f"data: {path} cannot be read ({reason}); name a copy of the folder `data` of LongProc's repository"
        ) from None


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises `SettingsError` for a path that leads out of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SettingsError(f"data: html_path={name} leads out of {folder}")
    return path
