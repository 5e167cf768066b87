"""One layer of a `RefreshCache`: keys and values of all tokens, and the layer's current selection.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens so far, `W` slots of a
selection, `O` observation window.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refreshkv import ops
from refreshkv.cache.joint_state import JointState, join_layers
from refreshkv.cache.preallocated_layer import Phase, PreallocatedLayer
from refreshkv.cache.stored_block import stored_block
from refreshkv.config import RefreshConfig
from refreshkv.ops import naive
from refreshkv.ops.schedule import mean_query
from refreshkv.ops.state import (
    LAST_FULL,
    PLAIN_SOFTMAX,
    SORTED_RANKS,
    Decisions,
    FullSteps,
    LayerState,
    SelectingState,
    SoftmaxTerms,
)
from refreshkv.ops.step.operators import decode_step
from refreshkv.settings import SettingsError


class Block(NamedTuple):
    """A block of drafts. Its selection waits until `accept` says how many of its tokens stay."""

    query: Tensor
    """(B, H, n, D): the block's queries."""
    left_padding: Tensor
    """(B,) int64."""
    scaling: float
    terms: SoftmaxTerms


class KeptTokens(NamedTuple):
    """Which tokens of a block of drafts stay, for all layers of a cache."""

    length: Tensor
    """() int64: tokens of the cache then; each row's last token is in column `length - 1`."""
    left_padding: Tensor
    """(B,) int64."""
    latest: Tensor
    """(B, O) int64: the last O queries, in order, among the observers before the block, in their slots, and the block's
    queries."""
    row_state: Tensor
    """(B, 4) int64: the state of each row if the next step selects."""


class RefreshLayer(PreallocatedLayer):
    """One full-attention layer: the keys and values of all tokens, and the layer's decisions.

    All state is tensors of fixed size: `keys`, `values` (B, Hkv, max_cache_len, D), `full_steps` (B, max_cache_len),
    `row_state` (B, 4), `selected`, `ranking` (B, Hkv, W), `observers` (B, H, O, D), `mean_query` (B, D),
    `cumulative_length` (); `refreshkv.ops.state.LayerState` says what they hold. With selecting steps also
    `selecting_steps` (B, max_cache_len) and, for score keys of 8 or 4 bits, `score_codes` (B, Hkv, max_cache_len, D or
    D / 2) and `score_scales` (B, Hkv, max_cache_len); see `refreshkv.ops.state.SelectingState`.
    """

    batch_state = tuple(name for name in LayerState._fields if name != "length")
    takes_terms = takes_other_values = takes_look_ahead = True
    observers: Tensor
    kept_observers: Tensor

    def __init__(self, max_cache_len: int, config: RefreshConfig):
        super().__init__(max_cache_len)
        self.config = config
        self.last_queries = config.observation_window
        self.drops_many = config.step_options().longest_segment > SORTED_RANKS
        """Whether the queue may drop more ranks before the next full step than the kernels sort at a time."""
        self.reads_rankings = config.step_options().last_ranks > 0
        """Whether ranks are put in order, by the rankings, after the step that made the selection."""
        self.width = min(config.largest_budget(max_cache_len), max_cache_len)
        self.has_selecting_steps = config.select_stride is not None
        self.score_state = ("score_codes", "score_scales") if config.score_bits < 16 else ()
        """Names of the buffers of the score keys."""
        if self.has_selecting_steps:
            self.batch_state = (*self.batch_state, *self.score_state, "selecting_steps")
        if config.rectify:  # the host counts the steps, and a full step removes several tokens
            self.is_compileable = self.is_croppable = False
        self.prompt_length = 0
        """Tokens before the first decoding step. Later tokens have other keys and values than under full attention."""
        self.dropped: int | None = None
        """Number of tokens that `drop_steps` removed, until a block computes them again; None if there are none."""
        self.waiting: Block | None = None
        """The last block, as long as its selection waits for `accept`."""
        self.awaits_accept = False
        """Whether the next block's selection waits for `accept`."""
        self.stores_compiled_block = False
        self.earlier_layers: tuple[RefreshLayer, ...] = ()
        """In the last layer of a cache: the layers before it, with which it may share a `JointState`. Other layers do
        not refer to later ones: a reference cycle would keep the buffers until Python's garbage collector finds it."""
        self.joint: JointState | None = None
        self.number = 0
        """Number of this layer in `joint`."""
        self.has_look_ahead = False
        """Whether the layer has look-ahead queries; plain PyTorch then computes the steps."""
        self.has_terms = False
        """Whether the softmax of the last block had sinks or a softcap."""

    def __setstate__(self, state: dict) -> None:
        """Restores a copy: where the original has slices of the joint state, pickle makes separate tensors."""
        vars(self).update(state)
        for name in Decisions._fields if self.joint is not None else ():
            setattr(self, name, getattr(self.joint, name)[self.number])

    @property
    def exact_length(self) -> int:
        return min(self.prompt_length, self.length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, kv_heads, _, head_dim = key_states.shape
        self.full_steps = torch.zeros(batch, self.max_cache_len, dtype=torch.bool, device=self.device)
        self.row_state = torch.zeros(batch, 4, dtype=torch.int64, device=self.device)
        self.selected = torch.full((batch, kv_heads, self.width), -1, dtype=torch.int32, device=self.device)
        self.ranking = torch.zeros_like(self.selected)
        self.mean_query = torch.zeros(batch, head_dim, dtype=torch.float32, device=self.device)
        if self.has_selecting_steps:
            self._make_score_keys(key_states)

    def _make_score_keys(self, key_states: Tensor) -> None:
        """Makes the buffers of selecting steps, for keys (B, Hkv, any, D)."""
        if key_states.shape[-1] % 2:
            raise SettingsError(f"select_stride needs an even head size, and the model's is {key_states.shape[-1]}")
        self.selecting_steps = torch.zeros_like(self.full_steps)
        if self.score_state:
            one = key_states.new_empty(*key_states.shape[:2], 1, key_states.shape[3])
            whole = one.expand(-1, -1, self.max_cache_len, -1)
            self.score_codes, self.score_scales = naive.empty_score_keys(whole, self.config.score_bits)

    @torch.compiler.disable
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.columns is None:
            return super()._append(key_states, value_states)  # pyright: ignore[reportAttributeAccessIssue]  # disable()
        self._validate_attended()
        self._validate_shape(key_states, value_states)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.index_copy_(2, self.columns, states)
        self._store_score_keys(key_states, self.columns[0])
        self.phase = Phase.BLOCK
        return self.keys, self.values

    def _store(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        stored = super()._store(key_states, value_states, start, end)
        self._store_score_keys(key_states, start)
        return stored

    def _store_score_keys(self, key: Tensor, first: int | Tensor) -> None:
        """Stores the score keys of the keys (B, Hkv, n, D) from position `first` on, a number or () int64."""
        if self.score_state:
            ops.write_score_keys(key.detach(), self.score_codes, self.score_scales, first)

    def wait_for(self, stream: torch.cuda.Stream) -> None:
        for name in self.score_state:
            getattr(self, name).record_stream(stream)
        super().wait_for(stream)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.config.rectify:
            self._validate_rectified(key_states.shape[2])
        if self.stores_compiled_block:
            return key_states, value_states  # `compiled_block` stores them
        return super().update(key_states, value_states, *args, **kwargs)

    def _validate_rectified(self, count: int) -> None:
        """Refuses `count` tokens that do not begin at the last full step where `rectify` needs that."""
        steps = self.length - self.exact_length
        is_full = count == 1 and steps == self.config.stride - 1
        if self.phase is Phase.DECODING and (is_full or (count > 1 and steps > 0)):
            raise RuntimeError(
                f"rectify=True: {steps} tokens came since the last full step, and this call needs them too: call the "
                "cache's rectify(), and give it the tokens that this forgets with the new ones, or use generate()"
            )
        if self.dropped is not None and count <= self.dropped:
            raise RuntimeError(f"{self.dropped} tokens were dropped: give them with the new ones, not {count} tokens")

    def drop_steps(self) -> int:
        """Removes the tokens of the steps since the last block, and returns their number. The next call must be a block
        that begins with these tokens."""
        self._validate_attended()
        length, dropped = self.exact_length, self.length - self.exact_length
        super().forget_step(length)  # the steps stay in `selecting_steps`
        self.phase, self.dropped = Phase.CONTINUING, dropped
        return dropped

    def drop_drafts(self, columns: Tensor | None = None, compiled: bool = False) -> None:
        """Removes the tokens of the steps since the last block. Does not wait for the device. The next call must be a
        block; its selection waits for `accept`.

        columns (n,) int64: those of the block's n tokens. A CUDA graph can then capture the block, which attends to the
        whole buffers. None: the host knows where the block begins. compiled: whether the block is compiled.
        """
        self._validate_attended()
        self.columns, self.stores_compiled_block = columns, compiled
        if columns is None:
            self.forget_step(self.prompt_length)
        self.phase, self.awaits_accept, self.dropped = Phase.CONTINUING, True, None

    def keep_observers(self) -> None:
        """Copies the observers. Call this before steps that will be dropped, because they overwrite the observers."""
        if self.config.observation_window > 1:
            self._keep("kept_observers", self.observers)

    def accept(self, kept: KeptTokens) -> None:
        """Prepares a selecting step after the block since `drop_drafts`. The host need not know how many tokens stay;
        `note_accepted` tells it."""
        block = self._end_waiting()
        window, device = self.config.observation_window, block.query.device
        self.cumulative_length.copy_(kept.length)
        if window > 1:
            slots = (torch.arange(window, device=device) - kept.length) % window
            self.observers.copy_(self._kept_queries(block, kept.latest[:, slots]))
            self.keep_observers()
        if self.config.threshold is not None:
            self.mean_query.copy_(mean_query(self._kept_queries(block, kept.latest[:, -1:])).squeeze(1))
        self.row_state.copy_(kept.row_state)
        self.selected.clamp_(max=kept.length - 1)  # of dropped drafts; the next step selects anew

    def begin_uncounted_steps(self) -> None:
        """Begins decoding after `accept`, before the host knows how many tokens stayed. `note_accepted` must follow."""
        self.known_length, self.phase = None, Phase.DECODING

    def note_accepted(self, length: int, steps: int = 0) -> None:
        """Tells the host that `length` tokens were in the cache after `accept` and `steps` decoding steps have come
        since, and begins decoding."""
        self.known_length, self.prompt_length, self.block_end = length + steps, length, length
        self.phase, self.prefix_length = Phase.DECODING, 0

    def select_accepted(self, kept: KeptTokens, length: int) -> None:
        """Ends the block since `drop_drafts` where steps do not select: selects at the last of the `length` tokens."""
        block = self._end_waiting()
        self.forget_step(length)
        self.prompt_length = length
        latest = self._kept_queries(block, kept.latest)
        self._select_after_block(latest, kept.left_padding, block.scaling, block.terms)
        self.keep_observers()

    def _end_waiting(self) -> Block:
        block, self.waiting = self.waiting, None
        assert block is not None, "no block waits"
        return block

    def _kept_queries(self, block: Block, numbers: Tensor) -> Tensor:
        """Of the observers before the block, in their slots, and the block's queries those with these numbers (B, n):
        (B, H, n, D)."""
        before = self.kept_observers if self.config.observation_window > 1 else block.query[:, :, :1]
        queries = torch.cat([before, block.query], dim=2)
        return queries.gather(2, numbers[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))

    @torch.compiler.disable
    def end_block(
        self,
        query: Tensor,
        left_padding: Tensor,
        scaling: float,
        terms: SoftmaxTerms = PLAIN_SOFTMAX,
        look_ahead: Tensor | None = None,
    ) -> None:
        """Ends a prompt block: its last position is a full step, and steps count from there (specification, section 7).

        After `drop_steps`, a block of the dropped tokens and one more is a full step (section 11). query (B, H, n, D):
        the block's queries; left_padding (B,) int64; terms: changes of the softmax; look_ahead (B, H, m, D): the
        look-ahead queries of its last token.
        """
        self.has_look_ahead, self.has_terms = look_ahead is not None, not terms.is_plain
        if self.has_look_ahead and (self.awaits_accept or self.config.rectify):
            raise SettingsError(
                "look-ahead queries are not followed by lossless decoding, nor by rectify=True: set rectify=False and "
                "use generate(), or take them off the model with remove_look_ahead(model)"
            )
        if self.awaits_accept:
            self._end_drafts(Block(query.detach(), left_padding, scaling, terms))
            return
        self._end_block(query, left_padding, scaling, terms, look_ahead)

    def compiled_block(self, query: Tensor, key: Tensor, value: Tensor, left_padding: Tensor, scaling: float) -> Tensor:
        """Stores a block of drafts in the columns of `drop_drafts`, and computes its attention; for compiled models.

        query (B, H, n, D), key and value (B, Hkv, n, D): the block's -> (B, n, H, D).
        """
        assert self.columns is not None, "a compiled block has its columns from drop_drafts"
        codes, scales = (self.score_codes, self.score_scales) if self.score_state else (None, None)
        buffers = (self.keys, self.values, codes, scales)
        output = stored_block(query, key, value, *buffers, self.columns, left_padding, scaling)
        self._end_drafts(Block(query, left_padding, scaling, PLAIN_SOFTMAX))
        return output

    def _end_drafts(self, waiting: Block | None) -> None:
        """Undoes what `drop_drafts` announced: the block has come, or the cache forgets it."""
        self.awaits_accept, self.waiting, self.columns = False, waiting, None
        self.stores_compiled_block = False

    def _end_block(
        self, query: Tensor, left_padding: Tensor, scaling: float, terms: SoftmaxTerms, look_ahead: Tensor | None
    ) -> None:
        length, window = self.length, self.config.observation_window
        self._validate_padding(left_padding, query.shape[2])
        query = query.detach()  # a selection has no gradient
        if length - query.shape[2] in (self.prompt_length, self.prefix_length):  # no decoding step came before it
            self.prompt_length = length
        latest = self._latest_queries(query, length, window)
        is_step = self.dropped is not None and query.shape[2] == self.dropped + 1
        self._select_after_block(latest, left_padding, scaling, terms, look_ahead, keeps_schedule=is_step)

    def _select_after_block(
        self,
        latest: Tensor,
        left_padding: Tensor,
        scaling: float,
        terms: SoftmaxTerms,
        look_ahead: Tensor | None = None,
        keeps_schedule: bool = False,
    ) -> None:
        """Selects at the last token, by the last O queries `latest` (B, H, O, D), and begins decoding.

        keeps_schedule: keep the prompt's budget, and go on counting steps from the prompt.
        """
        length, window = self.length, self.config.observation_window
        last = torch.full_like(left_padding, length - 1)
        if keeps_schedule:
            self.row_state[:, LAST_FULL] = last
        else:
            budgets = self.config.budgets(length - left_padding)
            self.row_state.copy_(torch.stack([last, budgets, left_padding, last + 1], dim=1))
        self.dropped = None
        self.mean_query.copy_(mean_query(latest[:, :, -1:]).squeeze(1))
        self.selected.copy_(self._select(latest, last, scaling, terms, look_ahead))
        # Only the order of the rankings matters: descending numbers give that of `selected`.
        self.ranking.copy_(torch.arange(self.width, 0, -1, device=self.device).expand_as(self.ranking))
        slots = torch.arange(length - window, length, device=latest.device) % window
        self._keep("observers", torch.zeros_like(latest).index_copy(2, slots, latest))
        self.full_steps[:, length - 1] = True
        self._start_decoding()
        self._join_layers()

    def _join_layers(self) -> None:
        """Joins the state of all layers, once the last one is ready."""
        if self.earlier_layers:
            join_layers((*self.earlier_layers, self))

    def _latest_queries(self, query: Tensor, length: int, window: int) -> Tensor:
        """The last O queries in order, (B, H, O, D): those of the block, preceded by earlier observers."""
        latest = query[:, :, -window:]
        missing = window - latest.shape[2]
        if missing == 0:
            return latest
        if self.prefix_length > max(0, length - window):
            raise ValueError(
                f"a block of {query.shape[2]} tokens follows what the cache was filled with, but "
                f"observation_window={window}: leave that many tokens of the prompt to compute"
            )
        if query.shape[2] == length:
            kept = query.new_zeros(*query.shape[:2], missing, query.shape[-1])
        else:
            before = length - query.shape[2]
            kept = self.observers[:, :, torch.arange(before - missing, before, device=query.device) % window]
        return torch.cat([kept, latest], dim=2)

    @property
    def attends_by_kernels(self) -> bool:
        return not self.has_look_ahead and super().attends_by_kernels

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        terms: SoftmaxTerms = PLAIN_SOFTMAX,
        look_ahead: Tensor | None = None,
    ) -> Tensor:
        """One decoding step: query (B, H, 1, D), key and value (B, Hkv, 1, D) -> (B, 1, H, D); look_ahead (B, H, m, D):
        its look-ahead queries, None without any."""
        self.phase = Phase.DECODING
        if self.joint is not None:
            return self.joint.step(self, query, key, value, scaling, terms)
        if not self.has_operator:
            return self._plain_step(query, key, value, scaling, terms, look_ahead)  # pyright: ignore[reportAttributeAccessIssue]  # disable()
        operator, options = self.operator(decode_step), self.config.step_options()
        return operator(query, key, value, self.state(), options, scaling, self.selecting_state(), terms)

    @property
    def has_operator(self) -> bool:
        """Whether `decode_step` computes the steps: it needs keys and values of one size, and no look-ahead queries."""
        return not self.has_look_ahead and self.keys.shape[-1] == self.values.shape[-1]

    @torch.compiler.disable
    def _plain_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        terms: SoftmaxTerms,
        look_ahead: Tensor | None,
    ) -> Tensor:
        options, chosen = self.config.step_options(), self.selecting_state()
        further = {"terms": terms, "look_ahead": look_ahead}
        return naive.decode_step(query, key, value, self.state(), options, scaling, chosen, **further)

    def selecting_state(self) -> SelectingState | None:
        """The layer's state for selecting steps; None without selecting steps."""
        if not self.has_selecting_steps:
            return None
        codes, scales = (self.score_codes, self.score_scales) if self.score_state else (None, None)
        return SelectingState(codes, scales, self.selecting_steps)

    def state(self) -> LayerState:
        """The layer's state, as a decoding step takes it."""
        names = ("cumulative_length" if name == "length" else name for name in LayerState._fields)
        return LayerState(*(getattr(self, name) for name in names))

    def state_changed_by_step(self, length: int) -> tuple[str, ...]:
        # Only these steps may select. A step overwrites the oldest observer, which no later step looks at. The rankings
        # are read only where ranks are put in order, and the mean query only to decide.
        decides = self._is_decision_step(length)
        if not (decides or self._is_at_select_stride(length)):
            return ()
        ranking = ("ranking",) if self.reads_rankings else ()
        return ("row_state", "selected", *ranking, *(("mean_query",) if decides else ()))

    def _is_decision_step(self, position: int) -> bool:
        """Whether the schedule decides at the step that processes the token at `position`."""
        return (position - (self.block_end - 1)) % self.config.stride == 0

    def _is_at_select_stride(self, position: int) -> bool:
        """Whether the step that processes the token at `position` is a selecting step, unless it is full."""
        stride = self.config.select_stride
        return stride is not None and (position - (self.block_end - 1)) % stride == 0

    def forget_step(self, length: int) -> None:
        super().forget_step(length)
        self.full_steps[:, length:] = False
        if self.has_selecting_steps:
            self.selecting_steps[:, length:] = False

    def _select(
        self, observers: Tensor, last: Tensor, scaling: float, terms: SoftmaxTerms, look_ahead: Tensor | None
    ) -> Tensor:
        """The positions that the last token selects, (B, Hkv, W), best first; the ranks that the queue may drop before
        the next full step are sorted."""
        keys = self._known_keys()
        _, budgets, left_padding, _ = (column.contiguous() for column in self.row_state.unbind(1))
        droppable = self.width if self.drops_many else self.config.step_options().longest_segment
        ahead = None if look_ahead is None else look_ahead.unsqueeze(2)
        steps = FullSteps(last.unsqueeze(-1), budgets, left_padding, self.width, droppable, ahead)
        options = self.config.selection_options()
        if not self.has_operator:
            return naive.select(observers, keys, steps, options, scaling, terms=terms).squeeze(2)
        return ops.select(observers, keys, steps, options, scaling, terms).squeeze(2)

    def _known_keys(self) -> Tensor:
        """All tokens' keys so far, (B, Hkv, L, D)."""
        return self.keys[:, :, : self.length]

    def reset(self) -> None:
        super().reset()
        self.dropped = None
        self._end_drafts(None)
        if self.is_initialized:
            self.full_steps.zero_()
            if self.has_selecting_steps:
                self.selecting_steps.zero_()

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change_batch(change)
        if self.phase in (Phase.DECODING, Phase.CONTINUING):
            self._join_layers()
