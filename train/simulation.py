"""Draws what each training step simulates, from the seed and the step alone."""

import random
from dataclasses import replace

from refreshkv.config import NEVER, RefreshConfig, Simulation, Trace
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
        return _simulation(settings, row_length - stride, replace(refresh, stride=NEVER, threshold=None))
    least, most = settings.prompt_range(row_length)
    prompt_length = draw.randint(least, most)
    return _simulation(settings, prompt_length, replace(refresh, stride=stride, threshold=settings.threshold))


def heaviest_simulation(config: RunConfig) -> Simulation | None:
    """The simulation that needs most memory of all that a run may draw: shortest prompt, most full steps."""
    settings, length = config.simulation, config.data.row_length
    if settings.pattern == "off":
        return None
    stride = min(settings.strides)
    if settings.pattern == "paper":
        return _simulation(settings, length - stride, replace(config.refresh, stride=NEVER, threshold=None))
    fixed = replace(config.refresh, stride=stride, threshold=None)
    return _simulation(settings, settings.prompt_range(length)[0], fixed)


def _simulation(settings: SimulationConfig, prompt_length: int, refresh: RefreshConfig) -> Simulation:
    """A simulation; few shapes recur if the prompt length is fixed, or follows from the stride as under paper."""
    recurring = settings.pattern == "paper" or isinstance(settings.prompt_length, int)
    return Simulation(prompt_length, refresh, recurring=recurring)


def new_trace(simulation: Simulation | None) -> Trace | None:
    """A trace for the full steps of a pass under the similarity schedule; None where they are known beforehand."""
    return Trace() if simulation is not None and simulation.config.threshold is not None else None
