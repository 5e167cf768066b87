"""Draws what each training step simulates, from the seed and the step alone."""

import math
import random
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from refreshkv.config import NEVER, RefreshConfig, Simulation, Trace
from refreshkv.simulation.settings import SimulationConfig

PURPOSE = "simulation"
"""Part of the random seed, which makes these draws independent of all other draws of the run."""


def draw_simulation(
    settings: SimulationConfig, refresh: RefreshConfig, row_length: int, seed: int, step: int
) -> Simulation | None:
    """The simulation of one optimizer step, the same on every rank; None for a plain step.

    whole: prompt length, stride, select stride, budget and chunks are drawn independently and uniformly. paper: the
    last `stride` tokens of the row are partial and never refreshed (appendix A.1). Raises `SettingsError` if the prompt
    does not lie inside the row.
    """
    if settings.pattern == "off" or random.Random(f"{PURPOSE}, plain:{seed}:{step}").random() < settings.plain_share:
        return None
    draw = random.Random(f"{PURPOSE}:{seed}:{step}")
    stride = draw.choice(settings.strides)
    if settings.pattern == "paper":
        return simulation_of(settings, row_length - stride, never_refreshed(refresh))
    least, most = settings.prompt_range(row_length)
    prompt_length = draw.randint(least, most)
    # generators of their own, so that these draws do not change the others
    select_stride = random.Random(f"{PURPOSE}, select:{seed}:{step}").choice(settings.select_strides)
    budget = random.Random(f"{PURPOSE}, budget:{seed}:{step}").choice(settings.budgets)
    drawn = with_budget(with_strides(refresh, stride, settings.threshold, select_stride), budget)
    ends = _draw_ends(settings, prompt_length, drawn, random.Random(f"{PURPOSE}, chunks:{seed}:{step}"))
    return simulation_of(settings, prompt_length, drawn, ends)


def _draw_ends(
    settings: SimulationConfig, prompt_length: int, refresh: RefreshConfig, draw: random.Random
) -> tuple[int, ...] | None:
    """The ends of the prompt's chunks, as many as drawn if they fit; None for one chunk. The last chunk contains the
    observation window."""
    room = prompt_length - refresh.observation_window
    cuts = min(draw.choice(settings.chunk_counts) - 1, max(0, room))
    return (*sorted(draw.sample(range(1, room + 1), cuts)), prompt_length) if cuts else None


def fitted(settings: SimulationConfig, row_length: int, padding: int, seed: int, step: int) -> SimulationConfig | None:
    """The settings with prompts that fit into rows of `row_length` columns, the shortest of which begins with `padding`
    padded columns. None, with a warning, if that row has no room for a prompt and one decoded token.

    Every prompt begins after the padding; by default it has at least a quarter of the shortest row's tokens.
    """
    if settings.pattern == "off":
        return settings
    if settings.pattern == "paper":
        drawn = random.Random(f"{PURPOSE}:{seed}:{step}").choice(settings.strides)
        if padding < row_length - drawn:
            return settings
        return _too_short(f"simulation.stride={drawn}")
    given = settings.prompt_length
    if given is None:
        shortest = row_length - padding
        if shortest < 2:
            return _too_short("a prompt")
        least, most = settings.prompt_range(shortest)
        return settings if padding == 0 else replace(settings, prompt_length=[padding + least, padding + most])
    least, most = given if isinstance(given, list) else (given, given)
    least, most = max(least, padding + 1), min(most, row_length - 1)
    if least > most:
        return _too_short(f"simulation.prompt_length={given}")
    return settings if isinstance(given, int) else replace(settings, prompt_length=[least, most])


def _too_short(what: str) -> None:
    """Warns of a pass that stays plain."""
    warnings.warn(
        f"simulate(): a sequence is too short for {what} and a decoded token: its pass stays plain", stacklevel=2
    )


def with_strides(
    refresh: RefreshConfig, stride: int, threshold: float | None, select_stride: int | None
) -> RefreshConfig:
    """The settings with other strides. Without selecting steps there are no score keys either."""
    bits = 16 if select_stride is None else refresh.score_bits
    return replace(refresh, stride=stride, threshold=threshold, select_stride=select_stride, score_bits=bits)


def with_budget(refresh: RefreshConfig, budget: int | float | None) -> RefreshConfig:
    """The settings with another budget; None leaves them as they are."""
    return refresh if budget is None else replace(refresh, budget=budget)


def never_refreshed(refresh: RefreshConfig) -> RefreshConfig:
    """The settings without full or selecting steps after the prompt."""
    return with_strides(refresh, NEVER, None, None)


def simulation_of(
    settings: SimulationConfig, prompt_length: int, refresh: RefreshConfig, chunks: tuple[int, ...] | None = None
) -> Simulation:
    """A simulation. It is `recurring` if the prompt length is fixed, or follows from the stride as in `paper`: then
    only few shapes occur."""
    recurring = settings.pattern == "paper" or isinstance(settings.prompt_length, int)
    return Simulation(prompt_length, refresh, recurring=recurring, chunks=chunks)


def effective_strides(simulation: Simulation | None, length: int, trace: Trace | None = None) -> dict[str, float]:
    """Decoded tokens per full step and per selecting step of sequences of `length` tokens: means over layers and
    sequences, by name. A kind of step that does not occur is left out.

    trace: the recorded steps under the similarity schedule; None for the fixed schedule.
    """
    if simulation is None:
        return {}
    decoded = length - simulation.prompt_length
    stride, select_stride = simulation.config.stride, simulation.config.select_stride
    if trace is not None and trace.full_steps:
        full = _mean_steps(trace.full_steps, simulation.prompt_length)
        selecting = _mean_steps(trace.selecting_steps, simulation.prompt_length)
    else:
        full, selecting = decoded // stride, 0
        if select_stride is not None:
            selecting = decoded // select_stride - decoded // math.lcm(stride, select_stride)
    counts = {"effective stride": full, "effective select stride": selecting}
    return {name: decoded / count for name, count in counts.items() if count}


def _mean_steps(flags: dict[int, Tensor], prompt_length: int) -> float:
    """The mean number of flagged positions after the prompt; flags: (B, T) bool of each layer."""
    after = [layer[:, prompt_length:].sum(dim=1).double().mean() for layer in flags.values()]
    return float(torch.stack(after).mean()) if after else 0.0


def new_trace(simulation: Simulation | None) -> Trace | None:
    """A trace for a pass under the similarity schedule; None if the schedule alone determines the full steps."""
    return Trace() if simulation is not None and simulation.config.threshold is not None else None
