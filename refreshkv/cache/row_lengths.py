"""Batch rows of different lengths in a cache that has one length, for lossless decoding.

A softmax over keys does not depend on their order, and each key includes its rotary position. So a row that accepted
fewer tokens than others moves its first tokens towards the end, and their old columns become padding. A row that
accepted more moves tokens from the end into its padding. The last tokens of a row always stay in order at the end.
`restore` puts all tokens back in order.

Shapes: `B` batch rows, `L` columns of the cache, `n` tokens of a block, `k` tokens that move.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from refreshkv.cache.layer import KeptTokens
from refreshkv.cache.preallocated_layer import Phase
from refreshkv.cache.refresh import RefreshCache
from refreshkv.ops.state import PADDING

TAIL = 64
"""Tokens at a row's end that stay in order, at least; more if `recent_window` says so."""


class Moves(NamedTuple):
    """Source and target columns, (B, k) int64 each: of the tail, which shifts as a whole, and of single tokens, which
    fill the columns that the tail leaves, or leave the columns that it takes. Columns that come twice get the same."""

    source: Tensor
    target: Tensor

    def apply(self, buffers: Iterable[Tensor]) -> None:
        """Moves the columns of buffers (B, ..., L, D) or (B, ..., L) in place; heads, if any, are dimension 1."""
        indices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        for buffer in buffers:
            sizes = (buffer.ndim, buffer.shape[1], buffer.shape[-1])
            if sizes not in indices:
                indices[sizes] = _index(buffer, self.source), _index(buffer, self.target)
            dim, (source, target) = min(2, buffer.ndim - 1), indices[sizes]
            buffer.scatter_(dim, target, buffer.gather(dim, source))


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
        self.paddings: list[int] = self.padding.tolist()
        self.numbers: list[int] = [cache.length] * len(self.paddings)
        """`padding` and `lengths` again, for the host, which so need not wait for the device."""
        self.order = torch.arange(cache.capacity, device=self.padding.device).repeat(len(self.padding), 1)
        """(B, max_cache_len): for each column of the cache, the column of its token in the text."""
        self.starts = cache.row_starts

    @property
    def padding_now(self) -> Tensor:
        """(B,) int64: padded columns of each row."""
        return self.padding + self.cache.length - self.lengths

    @property
    def is_padded(self) -> bool:
        """Whether any row has padded columns; the host knows."""
        rows = zip(self.paddings, self.numbers, strict=True)
        return any(padding + self.cache.length - number > 0 for padding, number in rows)

    def accept(self, counts: Tensor, counted: list[int] | None = None) -> None:
        """Keeps the first `counts` (B,) tokens of each row, of the block of n tokens after `RefreshCache.verify`.

        0 keeps none: the row has ended. counted: the same numbers, if the host knows them; else it waits for the
        device.
        """
        end = self.cache.length  # the block's
        assert self.layers[0].waiting is not None, "no block waits"
        start = end - self.layers[0].waiting.query.shape[2]
        columns = torch.arange(end - start, device=counts.device)
        self.order[:, start:end] = self.lengths[:, None] + columns
        moves = self._moves(start, counts, counts.tolist() if counted is None else counted)
        self.lengths = self.lengths + counts
        target = max(self.numbers)
        names = ("keys", "values", *self.layers[0].score_state)
        moves.apply([self.order, *(getattr(layer, name) for layer in self.layers for name in names)])
        kept = self._kept(start, counts, target)
        for layer in self.layers:
            layer.accept(kept)
        self._note_starts(target)

    def _kept(self, start: int, counts: Tensor, target: int) -> KeptTokens:
        """The tokens that stay of a block that began in column `start`. With selecting steps the next step is one: that
        costs less than a selection after the block."""
        config, padding = self.cache.config, self.padding + target - self.lengths
        window, stride = config.observation_window, config.select_stride
        latest = counts[:, None] + torch.arange(window, device=counts.device)
        latest = torch.where(latest < window, (start + latest) % window, latest)
        if stride is None:
            return KeptTokens(target, padding, latest, None)
        last = torch.full_like(padding, target - 1)
        # steps count from where the next one is a selecting step
        row_state = torch.stack([last, config.budgets(target - padding), padding, last + 2 - stride], dim=1)
        return KeptTokens(target, padding, latest, row_state)

    def _moves(self, start: int, counts: Tensor, counted: list[int]) -> Moves:
        """The moves after which each row ends at the same column, and the longest row does not move. start: first
        column of the block; counts (B,), counted: tokens of the block that each row keeps."""
        held = [length - padding for length, padding in zip(self.numbers, self.paddings, strict=True)]
        self.numbers = [length + count for length, count in zip(self.numbers, counted, strict=True)]
        target = max(self.numbers)
        most = max(abs(target - start - count) for count in counted)
        tail = max(TAIL, self.cache.config.recent_window)
        tail = max(0, min(tail, min(held) - most))
        first = self.padding + start - self.lengths  # of each row's tokens
        shift = (target - start - counts)[:, None]  # by which the tail moves to the right, or to the left
        number = torch.arange(tail + max(counted), device=counts.device)
        # an entry beyond the tail repeats the first one, the row's last token
        number = torch.where(number < (tail + counts)[:, None], number, 0)
        tail_to = target - 1 - number
        tail_from = tail_to - shift
        number = torch.arange(most, device=counts.device)
        gap, first = start - tail, first[:, None]
        # tail to the right: the row's first tokens fill the gap before it; to the left: tokens in its way move in front
        single_from = torch.where(shift > 0, first + number, gap + shift + number)
        single_to = torch.where(shift > 0, gap + number, first + shift + number)
        moves = number < shift.abs()
        single_from = torch.where(moves, single_from, tail_from[:, :1])
        single_to = torch.where(moves, single_to, target - 1)
        return Moves(torch.cat([tail_from, single_from], dim=1), torch.cat([tail_to, single_to], dim=1))

    def _note_starts(self, target: int) -> None:
        """Writes into the cache how its rows begin; later calls are compared with this."""
        if self.starts is None:
            return
        extra = [target - length for length in self.numbers]
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
        length = max(1, min(self.numbers) - (window - 1))
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
