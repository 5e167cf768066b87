"""Draws what each training step simulates, from the seed and the step alone."""

import random

from refreshkv.config import NEVER, RefreshConfig, Simulation
from refreshkv.train.config import RunConfig, SimulationConfig

PURPOSE = "simulation"
"""Part of the random seed, so that no other draw of the run is tied to this one."""


def draw_simulation(
    settings: SimulationConfig, refresh: RefreshConfig, row_length: int, seed: int, step: int
) -> Simulation | None:
    """The simulation of one optimizer step, the same on every rank; None for a plain step.

    whole: prompt length and stride drawn independently and uniformly. paper: the last `stride` tokens of the row are
    partial and never refreshed (appendix A.1). `SettingsError` if the prompt does not lie inside the row.
    """
    if settings.pattern == "off" or random.Random(f"{PURPOSE}, plain:{seed}:{step}").random() < settings.plain_share:
        return None
    draw = random.Random(f"{PURPOSE}:{seed}:{step}")
    stride = draw.choice(settings.strides)
    if settings.pattern == "paper":
        return Simulation(row_length - stride, _with_schedule(refresh, NEVER, None))
    least, most = settings.prompt_range(row_length)
    # under the similarity schedule only the attention knows which checks were full; the step's work depends on it
    record = settings.threshold is not None
    return Simulation(draw.randint(least, most), _with_schedule(refresh, stride, settings.threshold), record)


def heaviest_simulation(config: RunConfig) -> Simulation | None:
    """Of all that a run may draw, the simulation that needs most memory: shortest prompt, most full steps."""
    settings, length = config.simulation, config.data.row_length
    if settings.pattern == "off":
        return None
    stride = min(settings.strides)
    if settings.pattern == "paper":
        return Simulation(length - stride, _with_schedule(config.refresh, NEVER, None))
    return Simulation(settings.prompt_range(length)[0], _with_schedule(config.refresh, stride, None))


def _with_schedule(refresh: RefreshConfig, stride: int, threshold: float | None) -> RefreshConfig:
    return RefreshConfig(**{**refresh.to_dict(), "stride": stride, "threshold": threshold})
