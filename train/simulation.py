"""Draws what each training step simulates, from the seed and the step alone."""

import random

from refreshkv.config import NEVER, RefreshConfig, Simulation
from refreshkv.train.config import SimulationConfig

PURPOSE = "simulation"
"""Part of the random seed, so that no other draw of the run is tied to this one."""


def draw_simulation(
    settings: SimulationConfig, refresh: RefreshConfig, row_length: int, seed: int, step: int
) -> Simulation | None:
    """The simulation of one optimizer step, the same on every rank; None for plain training.

    whole: prompt length and stride drawn independently and uniformly. paper: the last `stride` tokens of the row are
    partial and never refreshed (appendix A.1). `SettingsError` if the prompt does not lie inside the row.
    """
    if settings.pattern == "off":
        return None
    draw = random.Random(f"{PURPOSE}:{seed}:{step}")
    stride = draw.choice(settings.strides)
    if settings.pattern == "paper":
        return Simulation(row_length - stride, _with_schedule(refresh, NEVER, None))
    least, most = settings.prompt_range(row_length)
    return Simulation(draw.randint(least, most), _with_schedule(refresh, stride, settings.threshold))


def _with_schedule(refresh: RefreshConfig, stride: int, threshold: float | None) -> RefreshConfig:
    return RefreshConfig(**{**refresh.to_dict(), "stride": stride, "threshold": threshold})
