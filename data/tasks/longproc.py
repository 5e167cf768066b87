"""LongProc's released problems, prompts and scores (Ye et al., COLM 2025, arXiv 2501.05414).

`tasks.NAME.data` names a copy of the folder `data` of LongProc's repository. It holds a folder for each task, with
`prompts.yaml` and the problems of each level, such as `html_to_tsv/html_to_tsv_0.5k.json`.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from refreshkv.data.tasks.countdown import search_scores
from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.html_table import table_scores
from refreshkv.data.tasks.longproc_search import SEARCH_HEADING, leading_actions, written_search
from refreshkv.data.tasks.path_traversal import route_scores
from refreshkv.data.tasks.template import Template
from refreshkv.data.tasks.values import file_state
from refreshkv.reading import read_json, read_text, read_yaml_value
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
    columns: ClassVar[dict[str, type]]
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
        path = Path(self.data) / self.folder / "prompts.yaml"
        return {"prompt": _read_prompt(path, file_state(str(path))), "answer_prefix": ""}

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
        return _read_records(self._file(), tuple(self.columns.items()), file_state(str(self._file())))


@dataclass(frozen=True)
class ReleasedHtmlTable(Released):
    """LongProc's HTML to TSV: real web pages."""

    folder: ClassVar[str] = "html_to_tsv"
    columns: ClassVar[dict[str, type]] = dict.fromkeys(
        ("html_path", "task_topic", "task_description", "filtering_instruction", "tsv_header", "gt"), str
    )

    def _problem(self, record: dict[str, Any]) -> Problem:
        names = ("task_topic", "task_description", "filtering_instruction", "tsv_header")
        page = _read(read_text, _inside(Path(self.data) / self.folder, record["html_path"]))
        fields = {"html_str": page, **{name: record[name] for name in names}}
        return Problem(fields, answer=f"```tsv\n{record['gt']}\n```", references=record["gt"])

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """As `table_scores`."""
        return table_scores(prediction, references)


@dataclass(frozen=True)
class ReleasedPathTraversal(Released):
    """LongProc's path traversal: routes between real cities."""

    folder: ClassVar[str] = "path_traversal"
    columns: ClassVar[dict[str, type]] = {
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
        """As `route_scores`."""
        return route_scores(prediction, references)


@dataclass(frozen=True)
class ReleasedCountdown(Released):
    """LongProc's countdown, with its two solved examples in the prompt."""

    length: int = 8192
    """Tokens of a prompt and its answer together; an error says if a prompt needs more."""

    folder: ClassVar[str] = "countdown"
    columns: ClassVar[dict[str, type]] = {"nums": list, "target": int}

    def _problem(self, record: dict[str, Any]) -> Problem:
        numbers, target = record["nums"], record["target"]
        lines, answer = written_search(tuple(numbers), target)
        return Problem(
            fields={"nums": str(numbers), "target": str(target), "demonstration": _solved_examples()},
            answer=answer,
            references={"numbers": numbers, "target": target, "search": list(lines)},
        )

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """As `search_scores`, with lines of the search that agree as `leading_actions` says."""
        return search_scores(prediction, references, SEARCH_HEADING, leading_actions)


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
def _read_prompt(path: Path, state: tuple | None) -> str:
    """The prompt with its placeholders. state: the file's `file_state`, part of what is remembered."""
    parts = _read(read_yaml_value, path)
    if not isinstance(parts, dict) or not isinstance(parts.get("USER_PROMPT"), str):
        raise SettingsError(f"data: {path} has no text USER_PROMPT: copy LongProc's folder again")
    return parts["USER_PROMPT"]


@lru_cache(maxsize=8)
def _read_records(path: Path, columns: tuple[tuple[str, type], ...], state: tuple | None) -> list[dict[str, Any]]:
    """The problems of a file, all with these columns. state: as in `_read_prompt`."""
    records = _read(read_json, path)
    if not isinstance(records, list) or not records:
        raise SettingsError(f"data: {path} must be a list of problems: copy LongProc's folder again")
    for number, record in enumerate(records):
        for column, kind in columns:
            if not isinstance(record, dict) or not isinstance(record.get(column), kind):
                raise SettingsError(f"data: {path}, problem {number}: {column} must be {kind.__name__}")
    return records


def _read(read: Callable[[Path, str], Any], path: Path) -> Any:
    """What `read`, a function of `refreshkv.reading`, returns of a file of LongProc's folder."""
    if not path.is_file():
        raise SettingsError(
            f"data: {path} cannot be read (it is no file); name a copy of the folder `data` of LongProc's repository"
        )
    return read(path, "data")


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises `SettingsError` for a path that leads out of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SettingsError(f"data: html_path={name} leads out of {folder}")
    return path
