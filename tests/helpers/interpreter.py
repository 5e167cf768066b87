"""Makes Triton's interpreter faster, by leaving out what it does again and again, or drops. It computes the same.

- It puts its own functions into `triton.language` anew at each call of a jitted function, and back after each launch.
  Here they stay in, once for each function.
- It computes additions, subtractions and products of integers twice, to find overflows, but reports none unless
  `debug` is set.
- It looks NumPy's type up in a dictionary that it makes anew each time.
"""

import functools
from dataclasses import replace
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
