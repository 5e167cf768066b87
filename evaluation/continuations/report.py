"""The report of long generation: a table for the terminal, and generation.json, generation.md, generation.png."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from refreshkv.evaluation.continuations.generation import TEXT, Continuation
from refreshkv.evaluation.continuations.measures import NGRAM, common_prefix, in_blocks, repetition
from refreshkv.evaluation.reports import drawn, provenance
from refreshkv.evaluation.strategies import FULL
from refreshkv.files import write_bytes, write_json, write_text
from refreshkv.tables import column_table, markdown_table

TEXTS_FILE = "texts.jsonl"
"""In the report's folder: every generated text, as tokens."""
NAMES = ("generation.json", "generation.md", "generation.png")
FILES = (*NAMES, TEXTS_FILE)
"""All that the evaluation writes into its folder."""


@dataclass(frozen=True)
class Summary:
    """What one strategy and decoding wrote, over all sequences."""

    strategy: str
    decoding: str
    perplexity: float
    """Of the generated tokens under full attention."""
    standard_error: float | None
    """Of the logarithm of `perplexity`, over the sequences; None for a single one."""
    likeliest: float
    """Share of the tokens that full attention finds most likely after the same text."""
    same: float | None
    """Share of the positions with the token that full attention wrote there; None without full attention's text."""
    same_until: float | None
    """Tokens before the first that differs from full attention's text, median over the sequences: single
    texts that never differ would outweigh all others in a mean."""
    repetition: float
    """Share of the runs of 4 tokens that came before in the same generated text, mean over the sequences."""
    perplexity_by_position: list[float]
    """The same measures in parts of the generated positions, from the first to the last."""
    likeliest_by_position: list[float]
    same_by_position: list[float] | None
    seconds: float | None
    """Prompts and generation, all sequences together."""


def summarize(found: list[Continuation]) -> list[Summary]:
    """A summary for each strategy and decoding, in the order in which they come."""
    groups: dict[tuple[str, str], list[Continuation]] = {}
    for one in found:
        groups.setdefault((one.strategy, one.decoding), []).append(one)
    return [
        _summary(strategy, decoding, own, groups.get((FULL, decoding)) if strategy != TEXT else None)
        for (strategy, decoding), own in groups.items()
    ]


def _summary(strategy: str, decoding: str, own: list[Continuation], reference: list[Continuation] | None) -> Summary:
    means = [fmean(one.losses) for one in own]
    same, until = None, None
    if reference is not None:
        pairs = list(zip(own, reference, strict=True))
        same = [[float(a == b) for a, b in zip(x.tokens, y.tokens, strict=True)] for x, y in pairs]
        until = median(common_prefix(x.tokens, y.tokens) for x, y in pairs)
    likeliest = [[float(value) for value in one.likeliest] for one in own]
    seconds = [one.seconds for one in own if one.seconds is not None]
    return Summary(
        strategy=strategy,
        decoding="" if strategy == TEXT else decoding,
        perplexity=math.exp(fmean(means)),
        standard_error=stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
        likeliest=fmean(map(fmean, likeliest)),
        same=None if same is None else fmean(map(fmean, same)),
        same_until=until,
        repetition=fmean(repetition(one.tokens) for one in own),
        perplexity_by_position=[math.exp(value) for value in in_blocks([one.losses for one in own])],
        likeliest_by_position=in_blocks(likeliest),
        same_by_position=None if same is None else in_blocks(same),
        seconds=sum(seconds) if seconds else None,
    )


def build_generation_report(
    found: list[Continuation], model: str, settings: dict[str, Any], command: str
) -> dict[str, Any]:
    """The content of generation.json, as plain values."""
    origin = provenance(command)
    computed_on = sorted({one.hardware for one in found if one.hardware})
    return {
        "layout": 1,
        "model": model,
        "settings": settings,
        **origin,
        "hardware": "; ".join(computed_on) or origin["hardware"],
        "results": [asdict(summary) for summary in summarize(found)],
    }


def write_generation_report(folder: Path, report: dict[str, Any]) -> list[str]:
    """Writes generation.json, generation.md and, if matplotlib is installed, generation.png; returns the names."""
    figure = drawn(NAMES[2], lambda: _draw(report))
    write_json(folder / NAMES[0], report)
    write_text(folder / NAMES[1], _markdown(report, has_figure=figure is not None))
    if figure is None:
        return list(NAMES[:2])
    write_bytes(folder / NAMES[2], figure)
    return list(NAMES)


def generation_table(report: dict[str, Any]) -> str:
    """The strategies in aligned columns, for a terminal."""
    return column_table(_cells(report), text_columns=2)


def _draw(report: dict[str, Any]) -> bytes:
    from refreshkv.evaluation.continuations.figure import draw_generation  # needs matplotlib

    return draw_generation(report)


def _cells(report: dict[str, Any]) -> list[list[str]]:
    lines = [["strategy", "decoding", "perplexity", "likeliest", "as full", "as full until", "repeated"]]
    for one in report["results"]:
        error = one["standard_error"]
        perplexity = f"{one['perplexity']:.3f}" + ("" if error is None else f" ± {one['perplexity'] * error:.3f}")
        until = "-" if one["same_until"] is None else f"{one['same_until']:g}"
        shares = [_percent(one[name]) for name in ("likeliest", "same")]
        lines.append([one["strategy"], one["decoding"], perplexity, *shares, until, _percent(one["repetition"])])
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _markdown(report: dict[str, Any], has_figure: bool) -> str:
    settings = report["settings"]
    explained = (
        f"{settings['sequences']} prompts of {settings['prompt']:,} tokens, {settings['generated']:,} tokens generated "
        "after each. Perplexity: of the generated tokens under the same model's full attention, ± its standard error "
        "over the sequences. Likeliest: tokens that full attention finds most likely after the same text. As full: "
        "positions with the token that full attention wrote there; until: tokens before the first other one, median. "
        f"Repeated: runs of {NGRAM} tokens that came before in the same generated text."
    )
    parts = [f"# Long generation with {report['model']}"]
    parts += ["![by position](generation.png)"] if has_figure else []
    parts += [markdown_table(_cells(report), text_columns=2), explained]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    details = {**settings, "hardware": report["hardware"], "date": report["date"], "versions": versions}
    parts += ["\n".join(f"- {key}: {value}" for key, value in details.items()), f"```\n{report['command']}\n```"]
    return "\n\n".join(parts) + "\n"
