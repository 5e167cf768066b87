"""Draws what each training step simulates, from the seed and the step alone."""

import random
from dataclasses import replace

from refreshkv.config import NEVER, RefreshConfig, Simulation
from refreshkv.train.config import RunConfig, SimulationConfig

PURPOSE = "simulation"
"""Part of the random seed, so that these draws are independent of every other draw of the run."""


def draw_simulation(
    settings: SimulationConfig, refresh: RefreshConfig, row_length: int, seed: int, step: int
) -> Simulation | None:
    """The simulation of one optimizer step, the same on every rank; None for a plain step.

    whole: prompt length and stride are drawn independently and uniformly. paper: the last `stride` tokens of the row
    are partial and never refreshed (appendix A.1). Raises `SettingsError` if the prompt does not lie inside the row.
    """
    if settings.pattern == "off" or random.Random(f"{PURPOSE}, plain:{seed}:{step}").random() < settings.plain_share:
        return None
    draw = random.Random(f"{PURPOSE}:{seed}:{step}")
    stride = draw.choice(settings.strides)
    if settings.pattern == "paper":
        return Simulation(row_length - stride, replace(refresh, stride=NEVER, threshold=None), recurring=True)
    least, most = settings.prompt_range(row_length)
    schedule = replace(refresh, stride=stride, threshold=settings.threshold)
    return Simulation(draw.randint(least, most), schedule, recurring=least == most)


def heaviest_simulation(config: RunConfig) -> Simulation | None:
    """The simulation that needs most memory of all that a run may draw: shortest prompt, most full steps."""
    settings, length = config.simulation, config.data.row_length
    if settings.pattern == "off":
        return None
    stride = min(settings.strides)
    if settings.pattern == "paper":
        return Simulation(length - stride, replace(config.refresh, stride=NEVER, threshold=None), recurring=True)
    least, most = settings.prompt_range(length)
    return Simulation(least, replace(config.refresh, stride=stride, threshold=None), recurring=least == most)
