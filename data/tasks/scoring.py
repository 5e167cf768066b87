"""Scores that several tasks share; all lie between 0 and 1."""

from typing import Any

from refreshkv.settings import SettingsError


def match_all(prediction: str, references: list[str]) -> float:
    """Share of the references that occur somewhere in the prediction, upper and lower case alike (RULER)."""
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


def match_any(prediction: str, references: list[str]) -> float:
    """1 if one of the references occurs somewhere in the prediction, upper and lower case alike (RULER's QA)."""
    return float(any(reference.lower() in prediction.lower() for reference in references))


def leading_matches(found: list[str], expected: list[str]) -> int:
    """How many items, from the first on, are the expected ones."""
    count = 0
    for item, wanted in zip(found, expected, strict=False):
        if item != wanted:
            break
        count += 1
    return count


def between_tags(text: str, tag: str) -> str | None:
    """What stands between the first <tag> and the first </tag>, stripped; None if either is missing (LongProc)."""
    start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
    if start == -1 or end == -1:
        return None
    return text[start + len(tag) + 2 : end].strip()


def rouge_l(prediction: str, references: list[str]) -> float:
    """F-measure of ROUGE-L with stemming against the best-matching reference, from the library rouge-score."""
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
