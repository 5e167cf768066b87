"""Questions about one of many documents: qa_1 (SQuAD) and qa_2 (HotpotQA) of RULER (arXiv 2404.06654)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, ClassVar, Literal

import fsspec

from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.scoring import match_any
from refreshkv.data.tasks.template import Template
from refreshkv.data.tasks.values import Value, file_state
from refreshkv.data.tasks.words import ADJECTIVES, NOUNS, coined_words
from refreshkv.reading import refuse_special_sources
from refreshkv.settings import SettingsError


@dataclass(frozen=True)
class Question:
    """A question, its answers, and the numbers of the documents that it needs and of related ones."""

    text: str
    answers: list[str]
    needed: list[int]
    related: list[int]


@dataclass(frozen=True)
class Questions(Family):
    """Size: documents in the prompt: the needed ones, then related ones, then any others, in random order."""

    max_new_tokens: int = 32
    """Tokens that may be generated."""
    source: Literal["squad", "hotpot"] = "squad"
    """Layout of `data_files`, and the documents that a made-up question needs: one (squad) or two (hotpot)."""
    data_files: str | None = None
    """SQuAD 2.0's dev-v2.0.json, or HotpotQA's hotpot_dev_distractor_v1.json. None: documents about made-up
    people and towns."""

    template: ClassVar[Template] = {
        "document": "Document {number}:\n{text}",
        "prompt": (
            "Read the documents and answer the question at the end from them, with the answer alone.\n\n{context}\n\n"
            "Answer from the documents above, with the answer alone.\n\nQuestion: {query}\n"
        ),
        "answer_prefix": "Answer:",
    }

    @property
    def answer_fits(self) -> bool:
        """False for files: RULER asks questions whose answers are longer than max_new_tokens too."""
        return self.data_files is None

    @property
    def substitutes(self) -> tuple[str, ...]:
        names = {"squad": "SQuAD", "hotpot": "HotpotQA"}
        return () if self.data_files else (f"made-up documents for {names[self.source]}",)

    @property
    def least_size(self) -> int:
        return 1 if self.source == "squad" else 2

    def largest_size(self, index: int) -> int | None:
        return None if self.data_files is None else len(_questions(self.data_files, self.source)[1])

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        if self.data_files is None:
            question, documents = _made_up(random, size, self.source)
            chosen = list(range(size))
        else:
            questions, documents = _questions(self.data_files, self.source)
            question = _nth(questions, index, self.seed, self.data_files)
            chosen = _choose(random, question, len(documents), size)
        random.shuffle(chosen)
        texts = [
            template["document"].format(number=number, text=documents[i]) for number, i in enumerate(chosen, start=1)
        ]
        return Problem(
            fields={"context": "\n\n".join(texts), "query": question.text},
            answer=f" {question.answers[0]}",
            references=question.answers,
        )

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """1 if the prediction contains any of the answers, else 0: RULER's partial match."""
        return {"score": match_any(prediction, references)}


def _nth(questions: list[Question], index: int, seed: int, file: str) -> Question:
    if index >= len(questions):
        raise SettingsError(f"data_files={file} has {len(questions)} questions: ask for fewer examples")
    return questions[Random(seed).sample(range(len(questions)), len(questions))[index]]


def _choose(random: Random, question: Question, available: int, size: int) -> list[int]:
    """Numbers of all needed documents, then of related ones, then of any others, up to `size` in all."""
    room = max(0, size - len(question.needed))
    related = random.sample(question.related, min(room, len(question.related)))
    taken = {*question.needed, *question.related}
    others = [i for i in range(available) if i not in taken]
    return [*question.needed, *related, *random.sample(others, min(room - len(related), len(others)))]


def _questions(file: str, source: str) -> tuple[list[Question], list[str]]:
    """The questions and documents of a file."""
    return _read(file, source, file_state(file))


@lru_cache(maxsize=4)
def _read(file: str, source: str, state: tuple | None) -> tuple[list[Question], list[str]]:
    """`_questions`, remembered. state: `file_state`."""
    refuse_special_sources(file, "data_files")
    try:
        with fsspec.open(file, "rt", encoding="utf-8", compression="infer") as opened:
            text = opened.read()  # pyright: ignore[reportAttributeAccessIssue]  # a list only for several files
    except FileNotFoundError:
        raise SettingsError(f"data_files: there is no file {file}") from None
    except (OSError, ValueError, ImportError) as error:  # such as an address of a kind without an installed reader
        raise SettingsError(f"data_files={file} cannot be read: {' '.join(str(error).split())}") from error
    layout = f"data_files={file} does not have the layout of source={source}"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{layout}: {type(error).__name__}: {error}") from error
    return (_squad if source == "squad" else _hotpot)(Value(content, f"{layout}: the file"))


def _squad(content: Value) -> tuple[list[Question], list[str]]:
    """Questions with an answer, and all documents. Related are the other paragraphs of the same article."""
    articles = [list(article["paragraphs"].each()) for article in content["data"].each()]
    texts = [[paragraph["context"].filled() for paragraph in paragraphs] for paragraphs in articles]
    documents, numbers = _unique(text for own in texts for text in own)
    questions = []
    for paragraphs, own_texts in zip(articles, texts, strict=True):
        own = [numbers[text] for text in own_texts]
        for paragraph, number in zip(paragraphs, own, strict=True):
            related = [other for other in dict.fromkeys(own) if other != number]
            for item in paragraph["qas"].each(may_be_empty=True):
                if not item.has("is_impossible"):
                    answers = [answer["text"].filled() for answer in item["answers"].each()]
                    questions.append(Question(item["question"].filled(), answers, [number], related))
    return questions, documents


def _hotpot(content: Value) -> tuple[list[Question], list[str]]:
    """Questions and all documents. Each question needs its own ten paragraphs, as in RULER."""
    items = list(content.each())
    texts = [[_paragraph(*paragraph.pair()) for paragraph in item["context"].each()] for item in items]
    documents, numbers = _unique(text for own in texts for text in own)
    return [
        Question(
            item["question"].filled(), [item["answer"].filled()], list(dict.fromkeys(numbers[text] for text in own)), []
        )
        for item, own in zip(items, texts, strict=True)
    ], documents


def _paragraph(title: Value, sentences: Value) -> str:
    return f"{title.text()}\n{''.join(sentence.text() for sentence in sentences.each())}"


def _unique(texts: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The different texts in order, and the number of each."""
    documents = sorted(set(texts))
    return documents, {text: number for number, text in enumerate(documents)}


def _made_up(random: Random, size: int, source: str) -> tuple[Question, list[str]]:
    """A question about made-up people in towns (one document answers it), or towns in countries (two answer it)."""
    hops = 1 if source == "squad" else 2
    pairs = (size + hops - 1) // hops
    words = [word.capitalize() for word in coined_words(random, 4 * pairs)]
    names, families, towns, countries = (words[i * pairs : (i + 1) * pairs] for i in range(4))
    people = [f"{name} {family}" for name, family in zip(names, families, strict=True)]
    documents = []
    for i in range(pairs):
        documents.append(f"{people[i]}\n{people[i]} lives in {towns[i]} and collects {_thing(random)}s.")
        if hops == 2:
            documents.append(f"{towns[i]}\n{towns[i]} lies in {countries[i]} and is known for its {_thing(random)}.")
    if hops == 1:
        return Question(f"In which town does {people[0]} live?", [towns[0]], [0], []), documents[:size]
    question = f"In which country does {people[0]} live?"
    return Question(question, [countries[0]], [0, 1], []), documents[:size]


def _thing(random: Random) -> str:
    return f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}"
