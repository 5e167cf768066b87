"""The schedule and the selection, as one small dataclass saved under "refreshkv" in a model's config.json."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from refreshkv.ops import schedule
from refreshkv.ops.state import Plan, SelectionOptions, StepOptions
from refreshkv.ranges import LARGEST_COUNT, show
from refreshkv.settings import SettingsError, settings_from_dict

NEVER = 2**31 - 1
"""A stride larger than any text: the small cache is selected once, after the prompt, and never refreshed. Written
`never` in YAML and in config.json."""
RECOMMENDED: dict[str, Any] = {
    "stride": "never",
    "select_stride": 1,
    "score_bits": 4,
    "pool_ahead": True,
    "pool_kernel": None,
}
"""What `RefreshConfig.recommended` changes in the paper's settings. docs/results.md says how it was chosen."""
PRESETS = {"paper": {}, "recommended": RECOMMENDED}
"""Named settings: `refresh: NAME` in YAML files, refresh=NAME on command lines, or `preset: NAME` beside others."""


@dataclass(frozen=True)
class RefreshConfig:
    """When the small cache is refreshed, and what it keeps. The defaults are the paper's (section 2.2, appendix A.3).

    Raises `ValueError` for values outside the ranges below.
    """

    budget: int | float = 0.125
    """Size K of the small cache. An `int` is a number of tokens (>= 1), a `float` a share of the prompt (0 < f <= 1). A
    text such as "12.5%" is stored as the share 0.125."""
    stride: int = 10
    """Every `stride`-th decoding step is a decision step (>= 1); without a threshold each decision step is a full step.
    `NEVER` (or the text "never") turns refreshing off."""
    threshold: float | None = None
    """Similarity schedule: a decision step is full if the cosine between the layer's mean query now and at its last
    full step is at most this. None: fixed schedule."""
    pool_kernel: int | None = 7
    """Width of the max-pooling over neighbouring positions' scores (>= 1; odd, unless `pool_ahead`). None, with
    `pool_ahead`: the number of steps that a selection serves, `select_stride` or else `stride`."""
    observation_window: int = 1
    """Number of last queries whose scores are averaged for the selection (>= 1)."""
    recent_window: int = 0
    """Number of last positions that are selected before all others (>= 0)."""
    sink_tokens: int = 0
    """Number of first positions that are selected before all others (>= 0)."""
    select_stride: int | None = None
    """Every `select_stride`-th decoding step (>= 1) that is not full is a *selecting step*: its query selects a new
    small cache, and it attends to exactly that (docs/specification.md, section 10). None: there are none."""
    score_bits: Literal[16, 8, 4] = 16
    """Bits per number of the score keys, with which selecting steps select; 16: the keys themselves."""
    pool_ahead: bool = False
    """Whether the pooling window of a position ends there instead of being centred on it: the positions after an
    attended one are then kept with it."""
    rectify: bool = False
    """Whether a full step computes the tokens since the last full step again, with full attention, so that afterwards
    the cache is that of full attention (docs/specification.md, section 11). Fixed schedule only."""

    def __post_init__(self) -> None:
        for name, value in self.plain_values({"budget": self.budget, "stride": self.stride}).items():
            object.__setattr__(self, name, value)
        _validate_budget(self.budget)
        validate_whole("stride", self.stride, 1)
        if self.pool_kernel is not None:
            validate_whole("pool_kernel", self.pool_kernel, 1)
        validate_whole("observation_window", self.observation_window, 1)
        validate_whole("recent_window", self.recent_window, 0)
        validate_whole("sink_tokens", self.sink_tokens, 0)
        self._validate_selecting()
        if not self.pool_ahead and (self.pool_kernel is None or self.pool_kernel % 2 == 0):
            raise SettingsError(
                f"pool_kernel must be odd so that it is centred, got {self.pool_kernel}; with pool_ahead=True it may "
                "be even, or null"
            )
        if not (self.threshold is None or _is_finite(self.threshold)):
            raise SettingsError(f"threshold must be a cosine or null for the fixed schedule, got {self.threshold!r}")
        if not isinstance(self.rectify, bool):
            raise SettingsError(f"rectify must be true or false, got {self.rectify!r}")
        if self.rectify and self.threshold is not None:
            raise SettingsError(
                "rectify=True needs the fixed schedule, in which all layers take full steps together: set "
                "threshold=None, or rectify=False"
            )

    def _validate_selecting(self) -> None:
        if self.select_stride is not None:
            validate_whole("select_stride", self.select_stride, 1)
        if isinstance(self.score_bits, bool) or self.score_bits not in (16, 8, 4):
            raise SettingsError(f"score_bits must be one of 16, 8, 4, got {self.score_bits!r}")
        if self.score_bits != 16 and self.select_stride is None:
            raise SettingsError(
                f"score_bits={self.score_bits} means nothing without selecting steps: set select_stride, or "
                "score_bits=16"
            )
        if not isinstance(self.pool_ahead, bool):
            raise SettingsError(f"pool_ahead must be true or false, got {self.pool_ahead!r}")

    @classmethod
    def recommended(cls, **changes: Any) -> "RefreshConfig":
        """The settings that lose least for the bytes they read, by measurements on a real model (docs/results.md).

        Every token selects its K keys by its own query and keys of 4 bits; there are no full steps. `changes` are
        further settings, such as `budget=1024`. With `select_stride=2` a selection serves two tokens, which takes less
        time and loses more. The defaults of the class stay the paper's.
        """
        return cls(**{**RECOMMENDED, **changes})

    @staticmethod
    def presets() -> dict[str, dict[str, Any]]:
        """The named settings, for `settings_from_dict`: name -> values."""
        return PRESETS

    @staticmethod
    def plain_values(values: dict[str, Any]) -> dict[str, Any]:
        """The settings `values`, with a budget such as "12.5%" as a share and a stride "never" as a number."""
        budget, stride = values.get("budget"), values.get("stride")
        if isinstance(budget, str) and budget.strip().endswith("%"):
            values = {**values, "budget": _share_from_percent(budget)}
        if isinstance(stride, str) and stride.strip().lower() == "never":
            values = {**values, "stride": NEVER}
        return values

    def budgets(self, prompt_lengths: Tensor) -> Tensor:
        """The budget K of each batch row, (B,) int64, from the rows' numbers of real prompt tokens, (B,) int64."""
        if isinstance(self.budget, float):
            return (prompt_lengths.double() * self.budget).ceil().long()
        return prompt_lengths.new_full(prompt_lengths.shape, self.budget)

    def largest_budget(self, prompt_length: int) -> int:
        """The budget K of a batch row without padding: `budgets` for one length, without a tensor."""
        return math.ceil(self.budget * prompt_length) if isinstance(self.budget, float) else self.budget

    @property
    def pool_width(self) -> int:
        """Positions of a pooling window: `pool_kernel`, or the steps that a selection serves."""
        if self.pool_kernel is not None:
            return self.pool_kernel
        served = self.select_stride or self.stride
        return 1 if served == NEVER else served

    def selection_options(self) -> SelectionOptions:
        """The settings of the selection, as the operations take them."""
        windows = (self.observation_window, self.recent_window, self.sink_tokens)
        return SelectionOptions(self.pool_width, *windows, self.pool_ahead)

    def step_options(self) -> StepOptions:
        """The settings of a decoding step, as the operations take them."""
        return StepOptions(self.stride, self.threshold, self.selection_options(), self.select_stride)

    def plan(
        self,
        query: Tensor,
        prompt_length: int,
        left_padding: Tensor | None = None,
        *,
        recurring: bool = False,
        average_heads: Callable[[Tensor], Tensor] | None = None,
    ) -> Plan:
        """The refresh pattern of T known tokens after a prompt of `prompt_length`, from a layer's queries (B, H, T, D).

        left_padding (B,) int64, None without any; recurring: whether later passes have the same prompt length and
        stride; average_heads: as in `refreshkv.ops.schedule.plan`.
        """
        length = query.shape[2]
        full_positions, latest = schedule.plan(
            query.detach(), prompt_length, self.stride, self.threshold, average_heads
        )
        padding = full_positions.new_zeros(len(query)) if left_padding is None else left_padding
        segment = min(self.stride if self.threshold is None else length, self.select_stride or length)
        shape = {
            "stride": min(self.stride, length),
            "width": min(self.largest_budget(prompt_length), length),
            "droppable": min(segment, length - prompt_length),
            "uniform": self.threshold is None and left_padding is None,
            "recurring": recurring,
            "score_bits": self.score_bits,
            "select_stride": self.select_stride,
        }
        if self.select_stride is not None:
            shape["selecting_positions"] = schedule.selecting_positions(
                full_positions, prompt_length, length, self.select_stride
            )
        return Plan(full_positions, latest, self.budgets(prompt_length - padding), padding, prompt_length, **shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; a stride of `NEVER` is written "never"."""
        values = dataclasses.asdict(self)
        return {**values, "stride": "never" if self.stride == NEVER else self.stride}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RefreshConfig":
        """Reads what `to_dict` wrote, also with the number `NEVER`; raises `SettingsError` for unknown keys and wrong
        types, by name."""
        return settings_from_dict(cls, values, prefix="refreshkv.")


@dataclass(frozen=True)
class Simulation:
    """Settings of one teacher-forced pass with the refresh pattern: `model(ids, simulation=Simulation(P, config))`.

    The logits at every position equal those of decoding the same tokens one by one through `RefreshCache` after a
    prompt of `prompt_length` columns, left padding included (docs/specification.md, section 8).
    """

    prompt_length: int
    """Columns of the prompt, P >= 1."""
    config: RefreshConfig = field(default_factory=RefreshConfig)
    recurring: bool = False
    """Whether later passes have the same prompt length and stride. On a GPU their full steps then go to cuDNN, which
    takes about 100 ms to plan for each new shape: that pays only where the shape comes again."""
    chunks: Sequence[int] | Sequence[Sequence[int]] | None = None
    """Ends of the prompt's chunks in columns, ascending, the last one `prompt_length`: the same for all batch rows, or
    one list for each. Tokens of the last chunk and later ones attend to everything; those of other chunks attend only
    to their own chunk and the first `sink_tokens` tokens (docs/specification.md, section 12). None: one chunk."""

    def __post_init__(self) -> None:
        validate_whole("prompt_length", self.prompt_length, 1)
        if self.chunks is None:
            return
        if self.config.rectify:
            raise SettingsError("chunks and rectify=True exclude each other: set rectify=False, or leave out chunks")
        is_shared = all(isinstance(end, int) for end in self.chunks)
        rows = [tuple(row) for row in ([self.chunks] if is_shared else self.chunks)]  # pyright: ignore[reportArgumentType]
        for row in rows:
            _validate_ends(row, self.prompt_length)
            if len(row) > 1 and row[-1] - row[-2] < self.config.observation_window:
                raise SettingsError(
                    f"the last of chunks={list(row)} has fewer tokens than "
                    f"observation_window={self.config.observation_window}: make it longer, or the window smaller"
                )
        object.__setattr__(self, "chunks", rows[0] if is_shared else tuple(rows))  # hashable, as the whole

    def chunk_ends(self, rows: int) -> list[tuple[int, ...]]:
        """The ends of the chunks of each of `rows` batch rows; `SettingsError` if `chunks` is for another number."""
        chunks: Any = self.chunks
        if chunks is None:
            return [(self.prompt_length,)] * rows
        if isinstance(chunks[0], int):
            return [chunks] * rows
        if len(chunks) != rows:
            raise SettingsError(f"chunks are given for {len(chunks)} rows, and the batch has {rows}: give one for each")
        return list(chunks)


@dataclass
class Trace:
    """What a simulated pass records, for the caller that hands it in: `model(ids, simulation=..., trace=trace)`."""

    full_steps: dict[int, Tensor] = field(default_factory=dict)
    """For each full-attention layer, by its number, which positions were full steps: (B, T) bool. The last position of
    the prompt counts as one."""
    selecting_steps: dict[int, Tensor] = field(default_factory=dict)
    """Likewise, which positions were selecting steps; empty without a `select_stride`."""
    dense_states: Tensor | None = None
    """With `rectify`, the last hidden states under full attention, (B, T, E), which the pass computes anyway. The
    model's output layer turns them into full-attention logits. Not detached. None without `rectify`."""
    measured_steps: int = 0
    """For a model with look-ahead queries: the divergence is computed for at most this many full steps, and as many
    selecting steps, of each layer. The caller sets it; 0 for none."""
    look_ahead_divergences: dict[int, Tensor] = field(default_factory=dict)
    """For each layer with look-ahead queries, the mean divergence of their scores, a scalar with gradients for the
    look-ahead queries only (docs/specification.md, section 13)."""


def _share_from_percent(text: str) -> float:
    """The share of the prompt that a text such as "12.5%" stands for."""
    try:
        return float(text.strip().removesuffix("%")) / 100
    except ValueError:
        raise SettingsError(f'budget must be a number or a text such as "12.5%", got {text!r}') from None


def _validate_budget(budget: Any) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise SettingsError(f"budget must be a number of tokens >= 1 or a fraction of the prompt, got {show(budget)}")
    if isinstance(budget, int) and budget > LARGEST_COUNT:
        raise SettingsError(f"budget={show(budget)} must be <= {LARGEST_COUNT}; for all of a prompt write 1.0")
    if isinstance(budget, float) and not budget <= 1:
        raise SettingsError(
            f"budget={budget!r} is a fraction of the prompt and must be <= 1; write a whole number for tokens"
        )
    if isinstance(budget, int) and budget == 1:
        warnings.warn('budget=1 keeps one token; for all of the prompt write 1.0 or "100%"', stacklevel=4)


def _validate_ends(ends: tuple[Any, ...], prompt_length: int) -> None:
    """Raises `SettingsError` unless the ends of chunks are positive and ascending, and the last is the prompt's."""
    for end in ends:
        validate_whole("chunks", end, 1)
    if not ends or ends[-1] != prompt_length or any(end >= later for end, later in itertools.pairwise(ends)):
        raise SettingsError(
            f"chunks={list(ends)} must be ascending ends of chunks, the last of them prompt_length={prompt_length}"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def validate_whole(name: str, value: Any, least: int) -> None:
    """Raises `SettingsError` unless `value` is a whole number of at least `least`, and of 32 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{name} must be a whole number >= {least}, got {show(value)}")
    if value > LARGEST_COUNT:
        raise SettingsError(f"{name} must be <= {LARGEST_COUNT}, got {show(value)}")
