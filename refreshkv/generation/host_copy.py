"""Copies tensors to the host. The host waits for the copy only, not for later work of the device."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of tensors of one device to the host; begun now, finished in `wait`."""

    def __init__(self, *tensors: Tensor):
        device = tensors[0].device
        # only copies from a GPU to pinned memory have an event that says when they are done
        self.copies = [tensor.to("cpu", non_blocking=device.type == "cuda") for tensor in tensors]
        self.arrival = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> list[Tensor]:
        """Waits for the tensors, and returns them."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copies
