"""A selecting step of decoding by Triton kernels (docs/specification.md, section 10).

Three launches of fixed size, one after the other, the first and the last of which every step makes
(`refreshkv.ops.step.attention`). Each reads from device memory what the step of a batch row is; the one between ends at
once where that is not a selecting step.

1. `_attend` stores the token and its score key. At a selecting step it computes the logits of all positions from the
   score keys (`scoring.py`).
2. `_choose_and_attend` (`attention.py`) has four stages: it turns the logits into rankings and counts these in a
   histogram (`ranking.py`, `bins.py`), lists the positions above the bin that holds the ranking of the last chosen
   position, narrows the bin down (`threshold.py`), and attends to what it has chosen. Between the stages the programs
   that share a row wait for each other; where they do not all run at once, each stage is a launch of its own.
3. `_finish` merges the shares and counts the token. At a selecting step it keeps the lists as the selection of the
   partial steps that follow (`keeping.py`).

`launches.py` makes the second launch, `state.py` has the memory in which results are handed on, and `shares.py` divides
the positions of a batch row among the programs. The definition is `refreshkv.ops.naive.decode_step`.
"""
