"""Where the time of steps goes on the GPU: the kernels that ran, by torch's profiler."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity

from refreshkv.tables import column_table

LONGEST_NAME, MOST_KERNELS = 70, 20
"""Characters of a kernel's name, and kernels of a table."""

LONGEST_PAUSE = 20.0
"""Microseconds: the GPU itself pauses for less between two kernels; in longer pauses it waits for the host."""


class KernelTimes:
    """Records what runs on the GPU from `start` to `stop`."""

    def __init__(self):
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])

    def start(self) -> None:
        torch.cuda.synchronize()
        self.profiler.start()

    def stop(self) -> None:
        torch.cuda.synchronize()
        self.profiler.stop()

    def table(self, steps: int) -> str:
        """The kernels that took longest, of so many recorded steps."""
        on_gpu = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
        events = [event for event in self.profiler.events() or () if event.device_type == on_gpu]
        return kernel_table(((e.name, e.time_range.start, e.time_range.end) for e in events), steps)


def kernel_table(runs: Iterable[tuple[str, float, float]], steps: int) -> str:
    """A table of runs, each a kernel's name and when it began and ended, in microseconds: the longest in all first. Its
    last two lines are the pauses, in which no kernel ran."""
    times: dict[str, list[float]] = defaultdict(list)
    ordered = sorted(runs, key=lambda run: run[1])
    busy_until = ordered[0][1] if ordered else 0.0
    pauses = []
    for name, begin, end in ordered:
        times[name].append(end - begin)
        if begin > busy_until:
            pauses.append(begin - busy_until)
        busy_until = max(busy_until, end)
    longest = sorted(times, key=lambda name: -sum(times[name]))
    lines = [[name[:LONGEST_NAME], *_per_step(times[name], steps)] for name in longest[:MOST_KERNELS]]
    others = [time for name in longest[MOST_KERNELS:] for time in times[name]]
    lines.append(["others", *_per_step(others, steps)])
    lines.append(["short pauses", *_per_step([pause for pause in pauses if pause <= LONGEST_PAUSE], steps)])
    lines.append(["longer pauses", *_per_step([pause for pause in pauses if pause > LONGEST_PAUSE], steps)])
    return column_table([["kernel", "runs a step", "us a step"], *lines])


def _per_step(times: list[float], steps: int) -> tuple[str, str]:
    return f"{len(times) / steps:.1f}", f"{sum(times) / steps:.1f}"
