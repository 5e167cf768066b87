"""RefreshCache: a transformers cache that holds the full keys and values, and each layer's current selection.

Shapes: `B` batch rows, `H` query heads, `Hkv` key/value heads, `D` head size, `L` tokens so far, `W` selected
positions, `O` observation window.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from refreshkv.config import RefreshConfig
from refreshkv.layers import layer_windows
from refreshkv.ops import naive
from refreshkv.schedule import is_refresh, mean_query
from refreshkv.settings import SettingsError


class RefreshLayer(CacheLayerMixin):
    """One full-attention layer: keys and values of all tokens, and what the layer decided.

    All state is tensors of fixed size: `keys`, `values` (B, Hkv, max_cache_len, D), `full_steps` (B, max_cache_len),
    `selected` (B, Hkv, W), `observers` (B, H, O, D), `anchors`, `budgets`, `left_padding` (B,), `mean_query` (B, D).
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    row_state = (
        "keys",
        "values",
        "full_steps",
        "selected",
        "observers",
        "anchors",
        "budgets",
        "left_padding",
        "mean_query",
    )

    def __init__(self, max_cache_len: int, config: RefreshConfig):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.config = config
        self.length = 0
        self.prompt_length = 0
        self.awaits_attention = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads, _, head_dim = key_states.shape
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.keys = key_states.new_zeros(batch, kv_heads, self.max_cache_len, head_dim)
        self.values = value_states.new_zeros(batch, kv_heads, self.max_cache_len, value_states.shape[-1])
        self.full_steps = torch.zeros(batch, self.max_cache_len, dtype=torch.bool, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends (B, Hkv, n, D) keys and values; returns views of all tokens' so far, (B, Hkv, L, D)."""
        self._check_refreshed()
        if self.length > 0 and self.batch_size != key_states.shape[0]:
            raise ValueError(
                f"RefreshCache holds {self.batch_size} rows and was given {key_states.shape[0]}: call reset() first"
            )
        fits = (
            self.is_initialized and self.keys.shape[:2] == key_states.shape[:2] and self.keys.dtype == key_states.dtype
        )
        if self.length == 0 and not (fits and self.keys.device == key_states.device):
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.max_cache_len:
            raise ValueError(
                f"RefreshCache is full: {end} tokens, but max_cache_len={self.max_cache_len}; make it at least the "
                "prompt plus max_new_tokens"
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        self.awaits_attention = True
        return self.keys[:, :, :end], self.values[:, :, :end]

    def begin(self, query: Tensor, left_padding: Tensor, scaling: float) -> None:
        """Ends a prompt block: its last position is a full step, and steps count from there (specification, section 7).

        query (B, H, n, D): the block's queries; left_padding (B,) int64.
        """
        self.left_padding = left_padding
        self.budgets = self.config.budgets(self.length - left_padding)
        self.prompt_length = self.length
        if query.shape[2] == self.length:
            observing = self.config.observation_window
            self.observers = query.new_zeros(*query.shape[:2], observing, query.shape[-1])
        self._observe(query)
        self.anchors = torch.full_like(left_padding, self.length - 1)
        self.mean_query = mean_query(query[:, :, -1:]).squeeze(1)
        self.selected = self._select(scaling)
        self.full_steps[:, self.length - 1] = True
        self.awaits_attention = False

    def decide(self, query: Tensor) -> Tensor:
        """Whether this step is full, per row: query (B, H, 1, D) -> (B,) bool (specification, section 2)."""
        step = self.length - self.prompt_length
        if step % self.config.stride != 0:
            return torch.zeros(query.shape[0], dtype=torch.bool, device=query.device)
        return is_refresh(mean_query(query).squeeze(1), self.mean_query, self.config.threshold)

    def end_step(self, query: Tensor, is_full: Tensor, scaling: float) -> None:
        """Takes note of a decoding step's query (B, H, 1, D); rows whose step was full select anew."""
        self._observe(query)
        self.awaits_attention = False
        if not bool(is_full.any()):
            return
        position = self.length - 1
        self.anchors = torch.where(is_full, position, self.anchors)
        self.mean_query = torch.where(is_full[:, None], mean_query(query).squeeze(1), self.mean_query)
        self.selected = torch.where(is_full[:, None, None], self._select(scaling), self.selected)
        self.full_steps[:, position] = is_full

    def _observe(self, query: Tensor) -> None:
        """Keeps the last O queries: in a tensor of their own, a view would keep those of the whole prompt alive."""
        observing = self.config.observation_window
        latest = torch.cat([self.observers, query[:, :, -observing:]], dim=2)
        self.observers = latest[:, :, -observing:].clone()

    def _select(self, scaling: float) -> Tensor:
        """The best positions at the last token, (B, Hkv, W); W has room for a context that still grows."""
        return naive.select(
            self.observers,
            self.keys[:, :, : self.length],
            torch.full_like(self.left_padding, self.length - 1).unsqueeze(-1),
            self.budgets,
            self.left_padding,
            width=min(self.config.largest_budget(self.prompt_length), self.max_cache_len),
            droppable=self.max_cache_len,
            scaling=scaling,
            **self.config.selection_options(),
        ).squeeze(2)

    def _check_refreshed(self) -> None:
        if self.awaits_attention:
            raise RuntimeError(
                "RefreshCache was filled but never refreshed: call refreshkv.enable(model) before using it"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        """Forgets all tokens and decisions; the buffers stay allocated."""
        self.length = self.prompt_length = 0
        self.awaits_attention = False
        if self.is_initialized:
            self.full_steps.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "RefreshCache cannot take tokens back (a selection may rest on them): use generate() without an assistant"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_rows(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def _change_rows(self, change) -> None:
        if self.length == 0:
            return
        self._check_refreshed()
        for name in self.row_state:
            setattr(self, name, change(getattr(self, name)))
        self.batch_size = self.keys.shape[0]


class RefreshCache(Cache):
    """The cache of a model with the refresh attention: `model.generate(..., past_key_values=RefreshCache(...))`.

    The full keys and values stay in buffers allocated at the first token; each full-attention layer decodes from its
    own selection of them. Sliding-window layers keep a transformers cache of their own.

    Several tokens at once are a prompt, or a new turn; a single one is a decoding step. So a prompt that is given in
    chunks (`prefill_chunk_size`) must not end in a chunk of one token.

    Args:
        model_config: the model's configuration.
        max_cache_len: most tokens per row, prompt and generated ones together.
        config: schedule and selection; None takes the ones saved under "refreshkv" in `model_config`.
    """

    def __init__(self, model_config: PretrainedConfig, max_cache_len: int, config: RefreshConfig | None = None):
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise SettingsError(f"max_cache_len must be a whole number >= 1, got {max_cache_len!r}")
        self.config = config or saved_config(model_config)
        super().__init__(
            layers=[
                RefreshLayer(max_cache_len, self.config)
                if window is None
                else DynamicSlidingWindowLayer(sliding_window=window)
                for window in layer_windows(model_config)
            ]
        )

    @property
    def full_steps(self) -> Tensor:
        """Which positions were full: (layers, B, L) bool; the last position of a prompt counts as one.

        Sliding-window layers have no full steps. Raises `ValueError` before the first token.
        """
        layers = [layer for layer in self.layers if isinstance(layer, RefreshLayer)]
        if not layers or layers[0].length == 0:
            raise ValueError("full_steps: the cache is empty; run the model with it first")
        none = torch.zeros_like(layers[0].full_steps[:, : layers[0].length])
        rows = [
            layer.full_steps[:, : layer.length] if isinstance(layer, RefreshLayer) else none for layer in self.layers
        ]
        return torch.stack([row.to(none.device) for row in rows])


def saved_config(model_config: PretrainedConfig) -> RefreshConfig:
    """The `RefreshConfig` under "refreshkv" in a model's configuration; `SettingsError` if there is none."""
    values = getattr(model_config, "refreshkv", None)
    if values is None:
        raise SettingsError('the model has no "refreshkv" in its config.json: pass config=RefreshConfig(...)')
    return RefreshConfig.from_dict(values)
