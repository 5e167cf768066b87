"""The operations of the refresh pattern: tensors and numbers in, tensors out.

`naive` is the readable truth on any device. On CUDA, 16- and 32-bit tensors go to the Triton kernels of `fused`;
REFRESHKV_OPS=naive in the environment keeps them on the naive form, to compare.
"""

import os
from typing import Any

import torch
from torch import Tensor

from refreshkv.ops import naive

KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def refresh_rows(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention of all rows after the prompt; arguments and result as in `naive.refresh_rows`."""
    if query.is_cuda and query.dtype in KERNEL_TYPES and os.environ.get("REFRESHKV_OPS") != "naive":
        from refreshkv.ops import fused  # imports Triton, which machines without a GPU may lack

        return fused.refresh_rows(query, *args, **kwargs)
    return naive.refresh_rows(query, *args, **kwargs)
