"""A selecting step of decoding by Triton kernels (docs/specification.md, section 10).

Five launches of fixed size, one after the other. Each reads from device memory what the step of a batch row is; its
programs end at once where that is not a selecting step.

1. `_score` (`scoring.py`) stores the token and computes the logits of all positions from the score keys.
2. `_rank` (`ranking.py`) turns them into rankings, and counts these in a histogram (`bins.py`).
3. `_find_threshold` (`threshold.py`) finds the ranking of the last chosen position.
4. `_attend` (`attention.py`) attends to the chosen positions, in shares.
5. `_merge` (`attention.py`) merges the shares and counts the token.

`launches.py` makes these launches, `state.py` has the structs that they take, and `shares.py` divides the positions of
a batch row among the programs. The definition is `refreshkv.ops.naive.select` with `own_first`. The cache does not call
these kernels yet: tests and `benchmarks/selecting.py` do.
"""
