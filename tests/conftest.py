import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
    if importlib.util.find_spec("triton"):
        from tests.helpers import interpreter

        interpreter.hasten()
