"""How the launches of a step overlap: the next one is prepared while the one before still runs.

A step of one layer is five short launches, and what lies between them is as long as the shortest. With programmatic
dependent launch, Hopper's GPUs set up a launch's programs early; these wait until the launch before has written
everything. Each launch waits before its first load, so that it comes after all the launches before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def wait_for_the_launch_before(OVERLAP: tl.constexpr):
    """Waits until the launch before has ended, and lets the next one set up its programs."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlap_of(tensor: Tensor, *, wanted: bool = True) -> dict[str, bool]:
    """The options of a launch on the tensor's GPU, for kernels that begin with `wait_for_the_launch_before`."""
    overlaps = wanted and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}
