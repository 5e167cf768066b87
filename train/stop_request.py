"""A request to stop: SIGTERM or SIGUSR1 to any rank lets all ranks save and leave after the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOPPED = 75
"""Exit code after SIGTERM or SIGUSR1: everything is saved, `--resume` continues (EX_TEMPFAIL of sysexits.h)."""


class StopRequest:
    """`with StopRequest() as stop` remembers SIGTERM and SIGUSR1, which would otherwise end the process."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, device: torch.device) -> str | None:
        """The signal's name if any rank has received one, the same on all ranks; all ranks call it together."""
        number = torch.tensor(float(self.received), device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
