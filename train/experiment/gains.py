"""What an arm gains in perplexity with a small cache, as a share of another arm's gain: adapters beside all weights."""

from statistics import fmean

from refreshkv.train.experiment.comparison import Entries
from refreshkv.train.experiment.config import UNTRAINED, ExperimentConfig
from refreshkv.train.experiment.tradeoffs import full_perplexities, losses, point_names


def gain_table(config: ExperimentConfig, study: str, entries: Entries) -> list[list[str]]:
    """A header, then a line for each arm with `beside`, text and strategy of the grid; only the header without figures.

    The gain is the perplexity of the untrained model less the arm's, both under the strategy; means over seeds.
    """
    lines = [["arm", "beside", "text", "strategy", "untrained", "arm", "beside it", "share of its gain"]]
    for arm in config.studies[study].arms:
        other = config.arms[arm].beside
        if other is None:
            continue
        names, texts = point_names(config, study, arm, entries)
        for text in texts:
            for name in names:
                values = [_perplexity(config, study, one, text, name, entries) for one in (UNTRAINED, arm, other)]
                known = [value for value in values if value is not None]
                if len(known) == len(values):
                    lines.append([arm, other, text, name, *_cells(*known)])
    return lines


def _cells(untrained: float, arm: float, other: float) -> list[str]:
    """The three perplexities, and the share; a dash where the other arm gained nothing."""
    gain = untrained - other
    share = f"{100 * (untrained - arm) / gain:.1f} %" if gain > 0 else "-"
    return [f"{untrained:.3f}", f"{arm:.3f}", f"{other:.3f}", share]


def _perplexity(config: ExperimentConfig, study: str, arm: str, text: str, name: str, entries: Entries) -> float | None:
    """An arm's perplexity under a strategy: mean over seeds; None without figures."""
    full = full_perplexities(config, study, arm, text, entries)
    if not full:
        return None
    return fmean(f * (1 + loss) for f, loss in zip(full, losses(config, study, arm, text, name, entries), strict=True))
