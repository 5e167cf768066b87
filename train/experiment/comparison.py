"""Figures of an experiment by arm, selection and seed, and the gap to full attention that each arm closes."""

from typing import Any

from refreshkv.train.experiment.config import UNTRAINED, ExperimentConfig
from refreshkv.train.experiment.jobs import report_name

FULL = "full"

Entries = dict[str, dict[str, Any]]
"""Name of a report -> its figures, as results.json holds them."""


def gaps_closed(
    config: ExperimentConfig, study: str, arm: str, selection: str, entries: Entries, strategy: str
) -> list[float]:
    """Share of the untouched base model's gap that an arm closes, one for each finished seed.

    A gap is the strategy's perplexity minus full attention's with the same model; the base's is under its first
    selection. Empty while the base's figures are missing, and if the base has no gap.
    """
    first = config.arms[UNTRAINED].selections[0]
    base = [perplexities(config, study, UNTRAINED, first, entries, name) for name in (strategy, FULL)]
    if not all(base):
        return []
    before = base[0][0] - base[1][0]
    if before <= 0:
        return []
    own = [perplexities(config, study, arm, selection, entries, name) for name in (strategy, FULL)]
    return [1 - (refreshed - full) / before for refreshed, full in zip(*own, strict=True)]


def arm_selections(config: ExperimentConfig, study: str) -> list[tuple[str, str]]:
    """The arms of a study, each with each of its selections: the tables' lines."""
    return [(arm, selection) for arm in config.studies[study].arms for selection in config.arms[arm].selections]


def finished_seeds(
    config: ExperimentConfig, study: str, arm: str, selection: str, kind: str, entries: Entries
) -> list[dict[str, Any]]:
    """The entries of the seeds that are finished; kind: perplexity, tasks or tradeoff."""
    seeds = [None] if config.arms[arm].settings is None else config.studies[study].seeds
    names = [report_name(study, arm, seed, selection, kind) for seed in seeds]
    return [entries[name] for name in names if name in entries]


def perplexities(
    config: ExperimentConfig, study: str, arm: str, selection: str | None, entries: Entries, strategy: str
) -> list[float]:
    """The strategy's perplexity for each finished seed. selection: None takes the arm's first."""
    if arm not in config.studies[study].arms:
        return []
    chosen = selection or config.arms[arm].selections[0]
    found = finished_seeds(config, study, arm, chosen, "perplexity", entries)
    return [one["results"][strategy]["perplexity"] for one in found]


def refreshing_strategies(config: ExperimentConfig, study: str, entries: Entries) -> list[str]:
    """The strategies of the first finished report, without full attention."""
    for arm, selection in arm_selections(config, study):
        for one in finished_seeds(config, study, arm, selection, "perplexity", entries):
            return [name for name in one["results"] if name != FULL]
    return []
