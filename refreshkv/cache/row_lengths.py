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

from refreshkv import ops
from refreshkv.cache.layer import KeptTokens
from refreshkv.cache.preallocated_layer import Phase
from refreshkv.cache.refresh import RefreshCache
from refreshkv.ops.state import PADDING

ORDERED_TOKENS = 64
"""Tokens at a row's end that stay in order, at least; more if `recent_window` says so."""


class Moves(NamedTuple):
    """Source and target columns, (B, k) int64 each: of the tail, which shifts as a whole, and of single tokens, which
    fill the columns that the tail leaves, or leave the columns that it takes. Columns that come twice get the same."""

    source: Tensor
    target: Tensor


class RowLengths:
    """The lengths of a cache's batch rows while they differ.

    cache: holds a prompt, and nothing that was decoded from a small cache.
    """

    def __init__(self, cache: RefreshCache):
        cache.validate_droppable()
        self.cache, self.layers = cache, cache.refresh_layers()
        padding, length = self.layers[0].row_state[:, PADDING], cache.length
        order = torch.arange(cache.capacity, device=padding.device).repeat(len(padding), 1)
        self.padding = cache.row_tensor("padding", padding)
        """(B,) int64: padded columns of each row at the beginning."""
        self.lengths = cache.row_tensor("lengths", torch.full_like(padding, length))
        """(B,) int64: tokens of each row, its padding at the beginning included."""
        self.end = cache.row_tensor("end", torch.full_like(padding[0], length))
        """() int64: columns of the cache that hold tokens, those of drafts not included."""
        self.order = cache.row_tensor("order", order)
        """(B, max_cache_len): for each column of the cache, the column of its token in the text."""
        self.paddings: list[int] = padding.tolist()
        self.numbers: list[int] = [length] * len(self.paddings)
        """`padding` and `lengths` again, for the host, which so need not wait for the device."""
        self.starts, self.begun = cache.row_starts, length
        self.selects_by_step = cache.config.select_stride is not None
        """Whether the step after a block selects, which costs less than a selection after the block."""
        self.kept: KeptTokens | None = None
        """What stays of a block, as long as the host does not know how many tokens these are."""
        cache.begin_drafts()

    @property
    def padding_now(self) -> Tensor:
        """(B,) int64: padded columns of each row."""
        return self.padding + self.end - self.lengths

    def columns(self, count: int) -> Tensor:
        """(n,) int64: the columns of the next block of `count` tokens."""
        return self.end + torch.arange(count, device=self.end.device)

    @property
    def is_padded(self) -> bool:
        """Whether any row has padded columns; the host knows."""
        rows = zip(self.paddings, self.numbers, strict=True)
        return any(padding + self.cache.length - number > 0 for padding, number in rows)

    def accept(self, counts: Tensor) -> None:
        """Keeps the first `counts` (B,) tokens of each row, of the block of n tokens after `RefreshCache.verify`; 0 if
        the row has ended. All shapes depend on n alone, and the host does not wait for the device: a CUDA graph can
        capture the call. `note` must follow."""
        waiting = self.layers[0].waiting
        assert waiting is not None, "no block waits"
        start, columns = self.end.clone(), torch.arange(waiting.query.shape[2], device=counts.device)
        self.order.index_copy_(1, start + columns, self.lengths[:, None] + columns)
        moves = self._moves(start, counts, len(columns))
        self.lengths.add_(counts)
        self.end.copy_(self.lengths.max())
        names = ("keys", "values", *self.layers[0].score_state)
        ops.move_tokens([*(getattr(layer, name) for layer in self.layers for name in names), self.order], *moves)
        kept = self._kept(start, counts)
        self.kept = None if self.selects_by_step else kept
        for layer in self.layers if self.selects_by_step else ():
            layer.accept(kept)

    def begin_steps(self) -> None:
        """Lets decoding steps follow `accept` before `note`, where steps select. There must be room for them."""
        assert self.selects_by_step, "the small cache is selected in `note`"
        for layer in self.layers:
            layer.begin_uncounted_steps()

    def note(self, counted: list[int], steps: int = 0) -> None:
        """Tells the host what `accept` kept of each row: the same numbers as its `counts`.

        steps: decoding steps since `begin_steps`; 0 if `restore` follows.
        """
        self.numbers = [length + count for length, count in zip(self.numbers, counted, strict=True)]
        length = max(self.numbers)
        for layer in self.layers:
            if self.selects_by_step:
                layer.note_accepted(length, steps)
            else:
                assert self.kept is not None, "accept comes before note"
                layer.select_accepted(self.kept, length)
        self._note_starts(length)

    def _kept(self, start: Tensor, counts: Tensor) -> KeptTokens:
        """The tokens that stay of a block that began in column `start` ()."""
        config, padding = self.cache.config, self.padding_now
        window, stride = config.observation_window, config.select_stride or 1
        latest = counts[:, None] + torch.arange(window, device=counts.device)
        latest = torch.where(latest < window, (start + latest) % window, latest)
        last = (self.end - 1).expand_as(padding)
        # steps count from where the next one is a selecting step
        row_state = torch.stack([last, config.budgets(self.end - padding), padding, last + 2 - stride], dim=1)
        return KeptTokens(self.end, padding, latest, row_state)

    def _moves(self, start: Tensor, counts: Tensor, most: int) -> Moves:
        """The moves after which each row ends at the same column, and the longest row does not move.

        start (): first column of the block; counts (B,): tokens of the block that each row keeps; most: tokens of the
        block, which no row moves further than.
        """
        end = (self.lengths + counts).max()
        shift = (end - start - counts)[:, None]  # by which the tail moves to the right, or to the left
        longest_tail = max(ORDERED_TOKENS, self.cache.config.recent_window)
        tail = ((self.lengths - self.padding).min() - shift.abs().max()).clamp(0, longest_tail)
        first = (self.padding + start - self.lengths)[:, None]  # of each row's tokens
        number = torch.arange(longest_tail + most, device=counts.device)
        # an entry beyond the tail repeats the first one, the row's last token
        number = torch.where(number < tail + counts[:, None], number, 0)
        tail_to = end - 1 - number
        tail_from = tail_to - shift
        number, gap = torch.arange(most, device=counts.device), start - tail
        # tail to the right: the row's first tokens fill the gap before it; to the left: tokens in its way move in front
        single_from = torch.where(shift > 0, first + number, gap + shift + number)
        single_to = torch.where(shift > 0, gap + number, first + shift + number)
        moves = number < shift.abs()
        single_from = torch.where(moves, single_from, tail_from[:, :1])
        single_to = torch.where(moves, single_to, end - 1)
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
        queries the next selection needs; the rest must follow as a block of a prompt. That block selects anew, so
        later calls never read what earlier steps selected."""
        window, now = self.cache.config.observation_window, max(self.numbers)
        length = max(1, min(self.numbers) - (window - 1))
        column = torch.arange(now, device=self.order.device)
        is_token = column >= self.padding_now[:, None]
        place = torch.where(is_token, self.order[:, :now], now)
        source = torch.arange(now + 1, device=place.device).repeat(len(place), 1)
        source = source.scatter(1, place, column.expand_as(place))[:, :length]
        source = torch.where(torch.arange(length, device=place.device) >= self.padding[:, None], source, 0)
        for layer in self.layers:
            if self.selects_by_step:
                layer.forget_step(self.begun)  # the drafts' selecting steps
            for name in ("keys", "values", *layer.score_state):
                buffer = getattr(layer, name)
                buffer[:, :, :length] = _take(buffer, source)
            layer.row_state[:, PADDING] = self.padding
            layer.forget_step(length)
            layer.prompt_length = layer.prefix_length = length
            layer.phase = Phase.FILLED
        self.cache.row_starts = self.starts


def _take(buffer: Tensor, columns: Tensor) -> Tensor:
    """The columns (B, k) of a buffer (B, Hkv, L, D) or (B, Hkv, L)."""
    columns = columns[:, None].expand(-1, buffer.shape[1], -1)
    return buffer.gather(2, columns if buffer.ndim == 3 else columns[..., None].expand(-1, -1, -1, buffer.shape[3]))
