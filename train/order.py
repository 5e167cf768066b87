"""The order of the rows: which ones each optimizer step takes, from the seed and the step alone."""

import numpy as np


class RowOrder:
    """Endless epochs, each a permutation of all rows of its own; every step takes the next `global_batch` rows.

    The rows of a step depend on the seed and the step alone, so a resumed run continues with the same rows.
    """

    def __init__(self, rows: int, global_batch: int, seed: int):
        self.rows, self.global_batch, self.seed = rows, global_batch, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def step(self, step: int) -> list[int]:
        """The rows of an optimizer step, over all ranks."""
        first = step * self.global_batch
        return [self._row(position) for position in range(first, first + self.global_batch)]

    def micro_batches(self, step: int, rank: int, world: int, micro_batch: int) -> list[list[int]]:
        """One rank's rows of an optimizer step, in micro-batches."""
        mine = self.step(step)[rank::world]
        return [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.rows)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return int(self._permutation[place])
