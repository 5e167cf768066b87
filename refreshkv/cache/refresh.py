"""RefreshCache: a transformers cache that holds the full keys and values, and each layer's current selection."""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from refreshkv.cache.buffers import BufferedCache
from refreshkv.cache.layer import RefreshLayer
from refreshkv.cache.offload import OffloadedLayer
from refreshkv.config import RefreshConfig
from refreshkv.settings import SettingsError


class RefreshCache(BufferedCache):
    """The cache of a model with the refresh attention: `model.generate(..., past_key_values=RefreshCache(...))`.

    The full keys and values stay in buffers allocated at the first token; each full-attention layer decodes from its
    own selection of them. Sliding-window layers keep a transformers cache of their own.

    On a GPU, `generate` compiles the decoding step and captures it into a CUDA graph by itself, unless a layer has a
    sliding window; nothing in it waits for the device. `reset()` and use the same cache again: another one, or another
    number of rows, is captured anew. Cut off from generate() and its mask, a step beyond `max_cache_len` in a captured
    graph gives outputs that are not numbers, and the next look at the length raises.

    Several tokens at once are a prompt, or a new turn; a single one is a decoding step. So a prompt that is given in
    chunks (`prefill_chunk_size`) must not end in a chunk of one token: generate() refuses it.

    Args:
        model_config: the model's configuration.
        max_cache_len: most tokens per row, prompt and generated ones together.
        config: schedule and selection; None takes the ones saved under "refreshkv" in `model_config`.
        offload: keep the full keys and values in pinned host memory, and only the small caches on the GPU. Steps are
            then not captured, and full steps take as long as the bus does.
    """

    def __init__(
        self,
        model_config: PretrainedConfig,
        max_cache_len: int,
        config: RefreshConfig | None = None,
        *,
        offload: bool = False,
    ):
        self.config = config or saved_config(model_config)
        layer = OffloadedLayer if offload else RefreshLayer
        super().__init__(model_config, max_cache_len, lambda: layer(max_cache_len, self.config))
        layers = self._refresh_layers()
        if layers and not offload:  # those decide on the host which buffers a step reads
            layers[-1].before = tuple(layers[:-1])

    @property
    def full_steps(self) -> Tensor:
        """Which positions were full: (layers, B, L) bool; the last position of a prompt counts as one.

        Sliding-window layers have no full steps. Raises `ValueError` before the first token.
        """
        layers = self._refresh_layers()
        if not layers or layers[0].length == 0:
            raise ValueError("full_steps: the cache is empty; run the model with it first")
        none = torch.zeros_like(layers[0].full_steps[:, : layers[0].length])
        rows = [
            layer.full_steps[:, : layer.length] if isinstance(layer, RefreshLayer) else none for layer in self.layers
        ]
        return torch.stack([row.to(none.device) for row in rows])

    def _refresh_layers(self) -> list[RefreshLayer]:
        return [layer for layer in self.layers if isinstance(layer, RefreshLayer)]


def saved_config(model_config: PretrainedConfig) -> RefreshConfig:
    """The `RefreshConfig` under "refreshkv" in a model's configuration; `SettingsError` if there is none."""
    values = getattr(model_config, "refreshkv", None)
    if values is None:
        raise SettingsError('the model has no "refreshkv" in its config.json: pass config=RefreshConfig(...)')
    return RefreshConfig.from_dict(values)
