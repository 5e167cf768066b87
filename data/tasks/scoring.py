"""Scores, between 0 and 1, that several tasks use."""

from typing import Any

from refreshkv.settings import SettingsError


def match_all(prediction: str, references: list[str]) -> float:
    """Share of the references that occur in the prediction, ignoring case: RULER's string match (arXiv 2404.06654)."""
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


def match_any(prediction: str, references: list[str]) -> float:
    """1 if any reference occurs in the prediction, ignoring case, else 0: RULER's partial match, for questions."""
    return float(any(reference.lower() in prediction.lower() for reference in references))


def leading_matches(found: list[str], expected: list[str]) -> int:
    """Number of items of `found` that equal those of `expected`, up to the first difference."""
    count = 0
    for item, wanted in zip(found, expected, strict=False):
        if item != wanted:
            break
        count += 1
    return count


def between_tags(text: str, tag: str) -> str | None:
    """The text between the first <tag> and the first </tag>, stripped; None if either is missing (LongProc)."""
    start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
    if start == -1 or end == -1:
        return None
    return text[start + len(tag) + 2 : end].strip()


def rouge_l(prediction: str, references: list[str]) -> float:
    """F-measure of ROUGE-L with stemming, the best over the references, by the library rouge-score.

    Raises `SettingsError` if the library is not installed.
    """
    scorer = _rouge_scorer()
    return max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise SettingsError(
            'ROUGE-L needs the library rouge-score: pip install "refreshkv[tasks]", or leave summaries out of --tasks'
        ) from None
    return RougeScorer(["rougeL"], use_stemmer=True)
