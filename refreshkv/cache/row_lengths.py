"""Batch rows of different lengths in a cache that has one length, for lossless decoding.

A softmax over keys does not depend on their order, and each key includes its rotary position. So a row that accepted
fewer tokens than others moves its first tokens towards the end, and their old columns become padding. A row that
accepted more moves tokens from the end into its padding. The last tokens of a row always stay in order at the end.
`restore` puts all tokens back in order.

Shapes: `B` batch rows, `L` columns of the cache, `n` tokens of a block, `k` tokens that move.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from refreshkv.cache.preallocated_layer import Phase
from refreshkv.cache.refresh import RefreshCache
from refreshkv.ops.state import PADDING

TAIL = 64
"""Tokens at a row's end that stay in order, at least; more if `recent_window` says so."""


class Moves(NamedTuple):
    """Source and target columns, (B, k) int64 each: of the tail, which shifts as a whole, and of single tokens, which
    fill the columns that the tail leaves, or leave the columns that it takes."""

    tail_from: Tensor
    tail_to: Tensor
    single_from: Tensor
    single_to: Tensor

    def apply(self, buffer: Tensor) -> None:
        """Moves the columns of a buffer (B, ..., L, D) or (B, ..., L) in place; heads, if any, are dimension 1."""
        tail, single = _take(buffer, self.tail_from), _take(buffer, self.single_from)
        _put(buffer, self.tail_to, tail)
        _put(buffer, self.single_to, single)


class RowLengths:
    """The lengths of a cache's batch rows while they differ.

    cache: holds a prompt, and nothing that was decoded from a small cache.
    """

    def __init__(self, cache: RefreshCache):
        cache.validate_droppable()
        self.cache, self.layers = cache, cache.refresh_layers()
        first = self.layers[0]
        self.padding = first.row_state[:, PADDING].clone()
        """(B,) int64: padded columns of each row at the beginning."""
        self.lengths = torch.full_like(self.padding, cache.length)
        """(B,) int64: tokens of each row, its padding at the beginning included."""
        self.order = torch.arange(cache.capacity, device=self.padding.device).repeat(len(self.padding), 1)
        """(B, max_cache_len): for each column of the cache, the column of its token in the text."""
        self.starts = cache.row_starts

    @property
    def padding_now(self) -> Tensor:
        """(B,) int64: padded columns of each row."""
        return self.padding + self.cache.length - self.lengths

    def accept(self, counts: Tensor) -> None:
        """Keeps the first `counts` (B,) tokens of each row, of the block of n tokens after `RefreshCache.verify`.

        0 keeps none: the row has ended.
        """
        end = self.cache.length  # the block's
        assert self.layers[0].waiting is not None, "no block waits"
        count = self.layers[0].waiting.query.shape[2]
        start = end - count
        columns = torch.arange(count, device=counts.device)
        self.order[:, start:end] = self.lengths[:, None] + columns
        lengths = self.lengths + counts
        target = int(lengths.max())
        moves = self._moves(start, counts, target)
        moves.apply(self.order)
        self.lengths = lengths
        padding = self.padding + target - lengths
        for layer in self.layers:
            for name in ("keys", "values", *layer.score_state):
                moves.apply(getattr(layer, name))
            layer.accept(counts, target, padding)
        self._note_starts(target)

    def _moves(self, start: int, counts: Tensor, target: int) -> Moves:
        """The moves after which each row ends at column `target`. start: first column of the block; counts (B,): tokens
        of the block that each row keeps."""
        first = self.padding + start - self.lengths  # of each row's tokens
        shift = target - start - counts  # by which the tail moves to the right, or to the left
        most = int(shift.abs().max())
        tail = max(TAIL, self.cache.config.recent_window)
        tail = max(0, min(tail, int((start - first).min()) - most))
        number = torch.arange(tail + int(counts.max()), device=counts.device)
        tail_to = target - 1 - number.expand(len(counts), -1)
        tail_from = torch.where(number < (tail + counts)[:, None], tail_to - shift[:, None], tail_to)
        number = torch.arange(most, device=counts.device)
        gap, shift = start - tail, shift[:, None]
        # tail to the right: the row's first tokens fill the gap before it; to the left: tokens in its way move in front
        single_from = torch.where(shift > 0, first[:, None] + number, gap + shift + number)
        single_to = torch.where(shift > 0, gap + number, first[:, None] + shift + number)
        moves = number < shift.abs()
        last = torch.full_like(single_to, target - 1)
        single_from = torch.where(moves, single_from, tail_from[:, :1].expand_as(last))  # once more, the same
        return Moves(tail_from, tail_to, single_from, torch.where(moves, single_to, last))

    def _note_starts(self, target: int) -> None:
        """Writes into the cache how its rows begin; later calls are compared with this."""
        if self.starts is None:
            return
        extra = (target - self.lengths).tolist()
        self.cache.row_starts = [
            start._replace(
                padding=None if start.padding is None else start.padding + more,
                offset=None if start.offset is None else start.offset - more,
            )
            for start, more in zip(self.starts, extra, strict=True)
        ]

    def restore(self) -> None:
        """Puts all tokens back in order. The cache then holds as many as the shortest row has, minus those whose
        queries the next selection needs; the rest must follow as a block of a prompt."""
        window, now = self.cache.config.observation_window, self.cache.length
        length = max(1, int(self.lengths.min()) - (window - 1))
        column = torch.arange(now, device=self.order.device)
        is_token = column >= self.padding_now[:, None]
        place = torch.where(is_token, self.order[:, :now], now)
        source = torch.arange(now + 1, device=place.device).repeat(len(place), 1)
        source = source.scatter(1, place, column.expand_as(place))[:, :length]
        source = torch.where(torch.arange(length, device=place.device) >= self.padding[:, None], source, 0)
        for layer in self.layers:
            for name in ("keys", "values", *layer.score_state):
                buffer = getattr(layer, name)
                buffer[:, :, :length] = _take(buffer, source)
            layer.row_state[:, PADDING] = self.padding
            layer.forget_step(length)
            layer.prompt_length = layer.prefix_length = length
            layer.phase = Phase.FILLED
        self.cache.row_starts = self.starts


def _index(buffer: Tensor, columns: Tensor) -> Tensor:
    """columns (B, k) as an index of dimension 1 of a buffer (B, L), or of dimension 2 of a buffer (B, Hkv, L, ...)."""
    if buffer.ndim == 2:
        return columns
    columns = columns[:, None].expand(-1, buffer.shape[1], -1)
    return columns if buffer.ndim == 3 else columns[..., None].expand(-1, -1, -1, buffer.shape[3])


def _take(buffer: Tensor, columns: Tensor) -> Tensor:
    return buffer.gather(min(2, buffer.ndim - 1), _index(buffer, columns))


def _put(buffer: Tensor, columns: Tensor, content: Tensor) -> None:
    buffer.scatter_(min(2, buffer.ndim - 1), _index(buffer, columns), content)
