"""Requests to one model run one after another, and those on a GPU all run in one thread, whichever thread they come
from.

A captured CUDA graph of a decoding step belongs to the thread that captured it. In any other thread torch captures the
step again, with more memory, or fails. Servers have many threads.
"""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_NAME = "refreshkv-gpu"
_GPU_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix=_NAME)  # starts its thread with the first call


class Stop(StoppingCriteria):
    """Ends a text at the next token, once `event` is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Turns:
    """The order of one model's requests."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def run(self, call: Callable[[Stop | None], Any], device: torch.device) -> Any:
        """Returns `call(stop)` once no other request runs. `call` must end the text when `stop` says so, unless it is
        None.

        On a GPU an interrupt (Ctrl-C) ends the text at its next token and is raised afterwards.
        """
        if threading.current_thread().name.startswith(_NAME):  # a streamer that asks for another text
            return call(None)
        with self._lock:
            return _run_in_gpu_thread(call, device) if device.type == "cuda" else call(None)


def _run_in_gpu_thread(call: Callable[[Stop | None], Any], device: torch.device) -> Any:
    """Runs `call` under this thread's stream, autocast, gradient and inference mode: torch has them for each thread."""
    event, context = threading.Event(), contextvars.copy_context()
    stream, current = torch.cuda.current_stream(device), torch.cuda.current_device()
    autocast = {"enabled": torch.is_autocast_enabled("cuda"), "dtype": torch.get_autocast_dtype("cuda")}
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run() -> Any:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(gradients),
            torch.cuda.device(current),
            torch.cuda.stream(stream),
            torch.autocast("cuda", **autocast),
        ):
            return call(Stop(event))

    future: Future = _GPU_THREAD.submit(context.run, run)
    try:
        return future.result()
    except BaseException:
        event.set()
        wait([future])
        raise
