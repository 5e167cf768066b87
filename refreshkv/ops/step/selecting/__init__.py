"""A selecting step of decoding by Triton kernels (docs/specification.md, section 10).

Five launches of fixed size, one after the other, the first and the last of which every step makes
(`refreshkv.ops.step.attention`). Each reads from device memory what the step of a batch row is; the three between end
at once where that is not a selecting step.

1. `_attend` stores the token and its score key. At a selecting step it computes the logits of all positions from the
   score keys (`scoring.py`).
2. `_rank` (`ranking.py`) turns them into rankings, and counts these in a histogram (`bins.py`).
3. `_find_threshold` (`threshold.py`) finds the ranking of the last chosen position.
4. `_attend_to_chosen` (`attention.py`) lists the chosen positions and attends to them, in shares.
5. `_finish` merges the shares and counts the token. At a selecting step it keeps the lists as the selection of the
   partial steps that follow (`keeping.py`).

`launches.py` makes the launches between, `state.py` has the memory in which they hand results on, and `shares.py`
divides the positions of a batch row among the programs. The definition is `refreshkv.ops.naive.decode_step`.
"""
