"""What our harness uses of kvpress, and one press: kvpress itself asks for an older transformers than ours.

A press that is installed is tested in its place.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch


class BasePress:
    def forward_hook(self, module, inputs, keywords, output):
        """Prunes a layer of the cache, in prompts."""
        columns = keywords["hidden_states"].shape[1]
        if int(keywords["cache_position"][-1]) + 1 == columns:
            layer = keywords["past_key_values"].layers[module.layer_idx]
            best = self.score(layer.keys).topk(int(columns * (1 - self.compression_ratio))).indices
            best = best[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, best), layer.values.gather(2, best)

    @contextmanager
    def __call__(self, model):
        modules = [layer.self_attn for layer in model.model.layers]
        hooks = [module.register_forward_hook(self.forward_hook, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class ScorerPress(BasePress):
    compression_ratio: float = 0.0


@dataclass
class StreamingLLMPress(ScorerPress):
    """Keeps the first four tokens and the last ones."""

    n_sink: int = 4

    def score(self, keys):
        assert keys.shape[2] > self.n_sink, "Input should contain more tokens"
        scores = torch.arange(keys.shape[2], dtype=torch.float32).expand(keys.shape[:3]).clone()
        scores[..., : self.n_sink] = torch.inf
        return scores


@dataclass
class AnswerPress(ScorerPress):
    """A hook of its own, as presses have that prune while they decode."""

    def forward_hook(self, *arguments):
        raise AssertionError


def kvpress_or_like(monkeypatch):
    """Makes sure that `import kvpress` works."""
    try:
        import kvpress  # noqa: F401
    except ImportError:
        module = ModuleType("kvpress")
        for own in (BasePress, ScorerPress, StreamingLLMPress, AnswerPress):
            setattr(module, own.__name__, own)
        monkeypatch.setitem(sys.modules, "kvpress", module)
