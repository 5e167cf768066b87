"""What a harness run cost: seconds, decoding steps, full and selecting steps of each layer, bytes of the caches."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from refreshkv.cache.refresh import RefreshCache
from refreshkv.config import Trace
from refreshkv.evaluation.costs import held_bytes


@dataclass
class HarnessCosts:
    """Sums over everything that was generated and scored."""

    seconds: float = 0.0
    """Time in the model's passes, prompts and compilation included."""
    steps: int = 0
    """Decoding steps after the prompts, over all sequences: decoded ones, and simulated ones."""
    full_steps: Counter[int] = field(default_factory=Counter)
    """Refreshed layer -> full steps among them."""
    selecting_steps: Counter[int] = field(default_factory=Counter)
    """Refreshed layer -> selecting steps among them."""
    cache_bytes: int = 0
    """Bytes of all caches at their end."""
    cached_sequences: int = 0
    """Sequences that were decoded from these caches; scored ones have none."""

    def add(self, other: "HarnessCosts") -> None:
        """Adds the costs of another process, or of another batch."""
        self.seconds += other.seconds
        self.steps += other.steps
        self.full_steps.update(other.full_steps)
        self.selecting_steps.update(other.selecting_steps)
        self.cache_bytes += other.cache_bytes
        self.cached_sequences += other.cached_sequences

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the metadata of the harness; a stride is None for a layer without such a step."""
        return {
            "seconds": self.seconds,
            "decoding_steps": self.steps,
            "effective_strides": self._strides(self.full_steps),
            "effective_select_strides": self._strides(self.selecting_steps),
            "cache_bytes": self.cache_bytes / self.cached_sequences if self.cached_sequences else None,
        }

    def _strides(self, counts: Counter[int]) -> dict[str, float | None]:
        return {str(layer): self.steps / count if count else None for layer, count in sorted(counts.items())}


def costs_of_decoding(cache: Cache, sequences: int, start: int, seconds: float) -> HarnessCosts:
    """The costs of a batch that was decoded from `cache` after a prompt of `start` columns."""
    costs = HarnessCosts(seconds, cache_bytes=held_bytes(cache), cached_sequences=sequences)
    costs.steps = sequences * (int(cache.get_seq_length()) - start)
    if isinstance(cache, RefreshCache):
        for name in ("full_steps", "selecting_steps"):
            flags = getattr(cache, name)[:, :, start:].sum((1, 2)).tolist()
            layers = {layer: count for layer, count in enumerate(flags) if not cache.is_sliding[layer]}
            if name == "full_steps" or cache.config.select_stride is not None:
                getattr(costs, name).update(layers)
    return costs


def costs_of_pass(trace: Trace, prompt_length: int, lengths: list[int], seconds: float) -> HarnessCosts:
    """The costs of one simulated pass. lengths: columns of each batch row that are no padding behind the text."""
    costs = HarnessCosts(seconds, steps=sum(length - prompt_length for length in lengths))
    for name in ("full_steps", "selecting_steps"):
        for layer, flags in getattr(trace, name).items():
            getattr(costs, name)[layer] += int(_before(flags, lengths)[:, prompt_length:].sum())
    return costs


def _before(flags: Tensor, lengths: list[int]) -> Tensor:
    """flags (B, T) bool, False from each batch row's length on."""
    columns = torch.arange(flags.shape[1], device=flags.device)
    return flags & (columns < torch.tensor(lengths, device=flags.device)[:, None])
