"""The simulation of a run that needs most memory, for the forecast and the mock step."""

from refreshkv.config import Simulation
from refreshkv.simulation.draw import never_refreshed, simulation_of, with_budget, with_strides
from refreshkv.train.config import RunConfig


def heaviest_simulation(config: RunConfig) -> Simulation | None:
    """The simulation that needs most memory of all that a run may draw: shortest prompt, most full and selecting steps,
    largest budget."""
    settings, length = config.simulation, config.data.row_length
    if settings.pattern == "off":
        return None
    stride = min(settings.strides)
    if settings.pattern == "paper":
        return simulation_of(settings, length - stride, never_refreshed(config.refresh))
    select_stride = min((stride for stride in settings.select_strides if stride is not None), default=None)
    prompt_length = settings.prompt_range(length)[0]
    budgets = [with_budget(config.refresh, budget) for budget in settings.budgets]
    largest = max(budgets, key=lambda refresh: refresh.largest_budget(prompt_length))
    refresh = with_strides(largest, stride, None, select_stride)
    ends = None  # chunks save memory, but a model that cannot have them should fail before the first step
    if max(settings.chunk_counts) > 1 and prompt_length > refresh.observation_window:
        ends = (prompt_length - refresh.observation_window, prompt_length)
    return simulation_of(settings, prompt_length, refresh, ends)
