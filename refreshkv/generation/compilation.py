"""Compiles the decoding step of a single sequence so that matrix products read the weights at full speed.

    model.generate(..., compile_config=tuned_compilation())

With one sequence, a step spends most of its time on products of weight matrices with one vector. Library kernels for
products are made for several vectors. torch's compiler writes these products as sums, with tiles found by measuring.
"""

from typing import Any

from transformers import CompileConfig

OPTIONS = {
    "triton.cudagraphs": True,  # as in transformers' own default, which names a mode
    "coordinate_descent_tuning": True,  # products with one row as sums; tiles by measuring
    "max_autotune_pointwise": True,  # from several starting points
    "combo_kernels": True,  # independent products, such as those for query, key and value, in one launch
    # All rows of a weight matrix need the same activation, norm and residual sum. Above this number of operations the
    # compiler computes them once, and not again for each row. The product, two operations more than its inputs, must
    # stay below the number, or it would be written to memory before it is summed up.
    "realize_opcount_threshold": 9,
    "realize_reads_threshold": 1,
}


def tuned_compilation() -> CompileConfig:
    """A `compile_config` for `generate()` with a `RefreshCache` or one of `refreshkv.baselines`, with `decode_ahead`
    or without: the same step, compiled for a single sequence.

    The first decoding step takes some ten seconds longer, once for each model, GPU and version, as long as torch's
    compilation cache is kept. Numbers differ from the default's by rounding in the last bit. Several sequences at a
    time (a batch, beams) are neither faster nor slower.
    """
    mode: Any = None  # declared as a string, but options exclude a mode
    return CompileConfig(dynamic=False, mode=mode, options=dict(OPTIONS))
