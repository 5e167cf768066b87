"""A selecting step of decoding by Triton kernels (docs/specification.md, section 10).

A cache with selecting steps makes two launches of fixed size at every step. Each reads from device memory what the step
of a batch row is.

1. `_attend` (`refreshkv.ops.step.attention`) stores the token and its score key. At a selecting step it computes the
   logits of all positions from the score keys (`scoring.py`); at others it attends.
2. `_choose_and_attend` (`attention.py`) has five stages. The first four are for selecting steps: it turns the logits
   into rankings and counts these in a histogram (`ranking.py`, `bins.py`, `counting.py`), lists the positions above the
   bin that holds the ranking of the last chosen position, narrows the bin down (`threshold.py`), and attends to what it
   has chosen.
   The last merges the shares of the attention, keeps the lists as the selection of the partial steps that follow, and
   counts the token (`finishing.py`). Between the stages the programs that share a row wait for each other; where they
   do not all run at once, each stage is a launch of its own.

`launches.py` makes the second launch, `state.py` has the memory in which results are handed on, and `shares.py` divides
the positions of a batch row among the programs. The definition is `refreshkv.ops.naive.decode_step`.
"""
