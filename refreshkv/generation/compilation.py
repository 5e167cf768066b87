"""How generate() may compile a decoding step of one sequence, so that its products read the weights at full speed.

    model.generate(..., compile_config=tuned_compilation())

One sequence at a time, most of a step is products of the weights with one vector. What the libraries have for them is
made for more rows; torch's compiler writes them as sums instead, each with a tile found by measuring.
"""

from transformers import CompileConfig

OPTIONS = {
    "triton.cudagraphs": True,  # what transformers' own default asks for, by the name of a mode
    "coordinate_descent_tuning": True,  # products with one row as sums; tiles by measuring
    "max_autotune_pointwise": True,  # from several starting points
    "combo_kernels": True,  # independent products, such as those for query, key and value, in one launch
    # All rows of a matrix need the same activation, norm and residual sum: once the compiler counts more operations
    # than this it computes them on their own, and not for each row again. The product itself, two operations more
    # than its inputs, must stay below the number, or it would be written to memory before it is summed up.
    "realize_opcount_threshold": 9,
    "realize_reads_threshold": 1,
}


def tuned_compilation() -> CompileConfig:
    """A `compile_config` for `generate()` with a `RefreshCache` or a cache of `refreshkv.baselines.caches`, with
    `decode_ahead` or without: the same step, compiled for a single sequence.

    The first token waits some ten seconds longer, once for each model and, with the same versions and GPU, until
    torch's compilation cache is emptied. Rounding differs from the default's, in the last bit. Several sequences at a
    time (a batch, beams) gain nothing and lose nothing.
    """
    return CompileConfig(dynamic=False, mode=None, options=dict(OPTIONS))
