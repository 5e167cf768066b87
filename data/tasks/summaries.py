"""Summaries of long documents from files: QMSum, GovReport and novels, scored with ROUGE-L."""

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, ClassVar

from refreshkv.data.tasks.essays import load_columns
from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.scoring import rouge_l
from refreshkv.data.tasks.template import Template
from refreshkv.data.tasks.values import Value, file_state
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class Summaries(Family):
    """Size: words of the document from its beginning; the rest is cut off."""

    max_new_tokens: int = 512
    """Tokens that may be generated."""
    data_files: str | list[str] | None = None
    """JSON (lines) or parquet files, a document and its summaries in each line; the columns below are LongBench's."""
    document_column: str = "context"
    """The column of the document."""
    question_column: str | None = None
    """The column of the question that the summary answers, for prompts with a question (qmsum)."""
    summary_column: str = "answers"
    """The column of the summary, or of a list of them."""

    shortest_prompt: int = 0
    """Documents whose prompt has fewer tokens are left out; the RefreshKV paper leaves out prompts under 10K tokens."""

    answer_fits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_files is None:
            raise SettingsError("data_files: name files with documents and their summaries; nothing stands in for them")

    def largest_size(self, index: int) -> int | None:
        return max(1, len(self._row(index)[self.document_column].filled().split()))

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        row = self._row(index)
        summaries = row[self.summary_column].texts()
        fields = {"context": _beginning(row[self.document_column].filled(), size)}
        if self.question_column is not None:
            fields["query"] = row[self.question_column].filled()
        return Problem(fields=fields, answer=f" {summaries[0].strip()}", references=summaries)

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """F-measure of ROUGE-L, the best over several summaries."""
        return {"score": rouge_l(prediction, references)}

    def _row(self, index: int) -> dict[str, Value]:
        """The values of a document's record by column."""
        assert self.data_files is not None
        files = (self.data_files,) if isinstance(self.data_files, str) else tuple(self.data_files)
        rows = _rows(files, tuple(map(file_state, files)))
        columns = [self.document_column, self.summary_column]
        for name in columns + ([self.question_column] if self.question_column else []):
            if name not in rows.column_names:
                raise SettingsError(f"data_files have no column {name}; they have {', '.join(rows.column_names)}")
        if index >= len(rows):
            raise SettingsError(f"data_files hold {len(rows)} documents: ask for fewer examples")
        place = f"data_files={', '.join(files)}: row {index}"
        return {name: Value(value, f"{place}, column {name}") for name, value in rows[index].items()}


@dataclass(frozen=True)
class Reports(Summaries):
    """GovReport (Huang et al., NAACL 2021, arXiv 2104.02112): summaries of government reports."""

    template: ClassVar[Template] = {
        "prompt": "This is a government report:\n\n{context}\n\nSummarise the report in one page.\n",
        "answer_prefix": "Summary:",
    }


@dataclass(frozen=True)
class Meetings(Summaries):
    """QMSum (Zhong et al., NAACL 2021, arXiv 2104.05938): summaries that answer a question about a meeting."""

    max_new_tokens: int = 256
    """Tokens that may be generated."""
    question_column: str | None = "input"
    """The column of the question."""

    template: ClassVar[Template] = {
        "prompt": "This is the transcript of a meeting:\n\n{context}\n\nAnswer in a few sentences: {query}\n",
        "answer_prefix": "Answer:",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.question_column is None:
            raise SettingsError("question_column must name the column of the questions")


@dataclass(frozen=True)
class Novels(Summaries):
    """Summaries of novels, such as longbook_sum_eng of InfiniteBench (Zhang et al., ACL 2024, arXiv 2402.13718)."""

    max_new_tokens: int = 1024
    """Tokens that may be generated."""
    summary_column: str = "answer"
    """The column of the summary, or of a list of them; the default is InfiniteBench's."""

    template: ClassVar[Template] = {
        "prompt": "This is a novel:\n\n{context}\n\nTell what happens in it, from the beginning to the end.\n",
        "answer_prefix": "Summary:",
    }


@lru_cache(maxsize=4)
def _rows(files: tuple[str, ...], states: tuple) -> Any:
    """The table of the files. states: their `file_state`, part of what is remembered."""
    return load_columns(files, "data_files")


def _beginning(text: str, words: int) -> str:
    """The first `words` words, with the spaces and line breaks between them."""
    parts = text.split(maxsplit=words)
    return text if len(parts) <= words else text[: len(text) - len(parts[-1])].rstrip()
