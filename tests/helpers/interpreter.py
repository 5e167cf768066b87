"""Makes Triton's interpreter faster, by leaving out what it does again and again, or drops. It computes the same.

- It puts its own functions into `triton.language` anew at each call of a jitted function, and back after each launch.
  Here they stay in, once for each function.
- It computes additions, subtractions and products of integers twice, to find overflows, but reports none unless
  `debug` is set.
- It looks NumPy's type up in a dictionary that it makes anew each time.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np

POINTER = np.dtype(np.uint64)


def hasten() -> None:
    """Changes Triton's interpreter for the rest of this process."""
    from triton.runtime import interpreter

    patched, patch, stays = set(), interpreter._patch_lang, SimpleNamespace(restore=lambda: None)

    def patch_once(function):
        if function not in patched:
            patched.add(function)
            patch(function)
        return stays

    interpreter._patch_lang = patch_once
    look_up, pointer = functools.cache(interpreter._get_np_dtype), interpreter.tl.pointer_type
    interpreter._get_np_dtype = lambda kind: POINTER if isinstance(kind.scalar, pointer) else look_up(kind.scalar)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


@contextmanager
def all_at_once() -> Iterator[None]:
    """Runs the programs of each launch on CPU tensors as threads, so that they can wait for each other. Otherwise the
    interpreter runs one after the other."""
    from triton.runtime import interpreter

    own, builder = threading.local(), interpreter.interpreter_builder

    class BuilderOfThreads(type(builder)):
        grid_idx = property(lambda self: own.place, lambda self, place: setattr(own, "place", place))

    def run(executor, *args, **kwargs):
        known = inspect.getfullargspec(executor.fn).args
        bound = inspect.getcallargs(executor.fn, *args, **{name: kwargs[name] for name in kwargs if name in known})
        for name in set(bound) - set(executor.constexprs):
            bound[name] = interpreter._implicit_cvt(bound[name])
        interpreter._patch_lang(executor.fn)
        grid = (*executor.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        failures = []

        def run_program(place):
            own.place = place
            try:
                executor.fn(**bound)
            except BaseException as failure:
                failures.append(failure)

        # the others would wait for a thread that has failed: they end with the tests
        threads = [
            threading.Thread(target=run_program, args=(place,), daemon=True) for place in product(*map(range, grid))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not failures:
                thread.join(1.0)
        if failures:
            raise failures[0]

    sequential, kind, interval = interpreter.GridExecutor.__call__, type(builder), sys.getswitchinterval()
    interpreter.GridExecutor.__call__, builder.__class__ = run, BuilderOfThreads
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__, builder.__class__ = sequential, kind
        sys.setswitchinterval(interval)
