"""Figures of the grids that an experiment measures: each arm's loss against its own full attention, and its gap beside
that of plain training and of the untrained model."""

from statistics import fmean, stdev

from refreshkv.train.experiment.comparison import Entries, finished_seeds
from refreshkv.train.experiment.config import PLAIN, UNTRAINED, ExperimentConfig

KIND = "tradeoff"


def tradeoff_tables(config: ExperimentConfig, study: str, entries: Entries) -> dict[str, list[list[str]]]:
    """Text -> a header, then a line for each arm with figures; means over seeds. {} without figures.

    A cell has the perplexity over full attention's of the same model, less one, with its standard deviation over seeds;
    in brackets the gap as a share of plain training's gap, and of the untrained model's.
    """
    arms = [arm for arm in config.studies[study].arms if _finished(config, study, arm, entries)]
    if not arms:
        return {}
    first = _finished(config, study, arms[0], entries)[0]["results"]
    names = [point["name"] for point in first["points"]]
    return {text: _table(config, study, arms, text, names, entries) for text in first["full attention"]}


def losses(config: ExperimentConfig, study: str, arm: str, text: str, name: str, entries: Entries) -> list[float]:
    """Perplexity over full attention's, less one, of a strategy by name, for each finished seed."""
    found = _finished(config, study, arm, entries)
    return [_point(entry, name)["losses"][text] for entry in found]


def bytes_read(config: ExperimentConfig, study: str, arm: str, name: str, entries: Entries) -> float:
    """Bytes that a decoding step reads under a strategy, as a share of full attention's."""
    return _point(_finished(config, study, arm, entries)[0], name)["read"]


def point_names(config: ExperimentConfig, study: str, arm: str, entries: Entries) -> tuple[list[str], list[str]]:
    """The strategies and the texts that an arm was measured with; empty without figures."""
    found = _finished(config, study, arm, entries)
    if not found:
        return [], []
    results = found[0]["results"]
    return [point["name"] for point in results["points"]], list(results["full attention"])


def _table(
    config: ExperimentConfig, study: str, arms: list[str], text: str, names: list[str], entries: Entries
) -> list[list[str]]:
    lines = [["arm", "seeds", "full", "against plain", *names]]
    plain, base = (_gaps(config, study, arm, text, names, entries) for arm in (PLAIN, UNTRAINED))
    of_plain = fmean(full_perplexities(config, study, PLAIN, text, entries)) if plain else None
    for arm in arms:
        full, gaps = (
            full_perplexities(config, study, arm, text, entries),
            _gaps(config, study, arm, text, names, entries),
        )
        is_compared = of_plain is not None and arm not in (PLAIN, UNTRAINED)
        against = f"{100 * (fmean(full) / of_plain - 1):+.2f} %" if is_compared and of_plain else ""
        cells = []
        for name in names:
            shares = [f"{gaps[name] / other[name]:.0%}" if other.get(name) else "-" for other in (plain, base)]
            cells.append(f"{_percent(losses(config, study, arm, text, name, entries))} ({', '.join(shares)})")
        lines.append([arm, str(len(full)), f"{fmean(full):.3f}", against, *cells])
    return lines


def _finished(config: ExperimentConfig, study: str, arm: str, entries: Entries) -> list[dict]:
    if arm not in config.studies[study].arms:
        return []
    return finished_seeds(config, study, arm, config.arms[arm].selections[0], KIND, entries)


def full_perplexities(config: ExperimentConfig, study: str, arm: str, text: str, entries: Entries) -> list[float]:
    """Full attention's perplexity for each finished seed."""
    return [entry["results"]["full attention"][text] for entry in _finished(config, study, arm, entries)]


def _gaps(
    config: ExperimentConfig, study: str, arm: str, text: str, names: list[str], entries: Entries
) -> dict[str, float]:
    """Strategy -> mean over seeds of its perplexity less full attention's; {} without figures."""
    full = full_perplexities(config, study, arm, text, entries)
    if not full:
        return {}
    return {
        name: fmean(f * loss for f, loss in zip(full, losses(config, study, arm, text, name, entries), strict=True))
        for name in names
    }


def _point(entry: dict, name: str) -> dict:
    return next(point for point in entry["results"]["points"] if point["name"] == name)


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):+.2f}{spread} %"
