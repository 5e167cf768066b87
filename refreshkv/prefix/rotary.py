"""Turns stored keys to another place of a prompt by the model's rotary embedding.

A rotary embedding turns each pair of a key's numbers by its position times a frequency, so a further turn by the
difference of two positions moves a key from one to the other. A factor of the attention (yarn) stays as it is in the
stored key. Which numbers form pairs, and which frequencies a layer has, is found by computing a few tokens at two
places and comparing: a model whose keys no candidate explains is refused.

Shapes: `B` batch rows, `Hkv` key/value heads, `D` head size, `F` frequencies, `n` tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from refreshkv.cache.keyword import as_keyword
from refreshkv.settings import SettingsError

PROBE_TOKENS, PROBE_START = 8, 997
"""Tokens that are computed at two places, and the second place: far enough to show the lower frequencies too."""

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest relative error of turned keys against computed ones."""
TOLERANCE_OF_16_BITS = 0.1


def _halves(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keys.chunk(2, dim=-1)  # pyright: ignore[reportReturnType]  # as many as asked for


def _interleaved(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keys[..., 0::2], keys[..., 1::2]


PAIRS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]] = {
    "halves": (_halves, lambda first, second: torch.cat([first, second], dim=-1)),
    "interleaved": (_interleaved, lambda first, second: torch.stack([first, second], dim=-1).flatten(-2)),
}
"""How the numbers of a key form pairs: by name, the first and second numbers of the pairs, and the inverse."""


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of one layer's keys."""

    pairs: str
    """Name in `PAIRS`."""
    frequencies: Tensor
    """(F,): turn of each pair from one position to the next; the other D - 2F numbers are not turned."""

    def turn(self, keys: Tensor, start: int) -> Tensor:
        """Keys (B, Hkv, n, D) that were computed at the positions 0 .. n-1, as at start .. start+n-1."""
        if start == 0:
            return keys
        split, join = PAIRS[self.pairs]
        frequencies = self.frequencies.to(keys.device, torch.float32)
        position = torch.arange(keys.shape[2], device=keys.device, dtype=torch.float32).unsqueeze(-1)
        # the model rounds each angle to float32, so the difference of two such angles is what separates its keys
        angle = ((position + start) * frequencies).double() - (position * frequencies).double()
        size = 2 * len(frequencies)
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos, sin = (turn.to(wide.dtype) for turn in (angle.cos(), angle.sin()))
        first, second = split(wide[..., :size])
        turned = join(first * cos - second * sin, second * cos + first * sin)
        return torch.cat([turned, wide[..., size:]], dim=-1).to(keys.dtype)


@torch.no_grad()
def find_rotations(model: PreTrainedModel) -> list[Rotation | None]:
    """The rotation of each layer's keys; None for a layer whose keys do not depend on their positions.

    Raises `SettingsError` if a layer's keys are turned in another way, or not by their position alone.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2 * PROBE_START
    start = max(1, min(PROBE_START, most - PROBE_TOKENS))
    at_zero, there = _keys_of_probe(model, 0), _keys_of_probe(model, start)
    candidates: list[Rotation | None] = [None]
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            both_ways = (buffer.detach(), -buffer.detach())  # NanoChat turns keys the other way
            candidates += [Rotation(pairs, turn) for pairs in PAIRS for turn in both_ways]
    return [_best(number, candidates, *keys, start) for number, keys in enumerate(zip(at_zero, there, strict=True))]


def _best(number: int, candidates: list[Rotation | None], keys: Tensor, there: Tensor, start: int) -> Rotation | None:
    """The candidate that turns layer `number`'s keys to those computed `there`, both (1, Hkv, n, D)."""
    errors = []
    for candidate in candidates:
        fits = candidate is None or 2 * len(candidate.frequencies) <= keys.shape[-1]
        turned = keys if candidate is None or not fits else candidate.turn(keys, start)
        errors.append(float((turned - there).float().norm() / there.float().norm().clamp(min=1e-30)))
    if min(errors) > TOLERANCE.get(keys.dtype, TOLERANCE_OF_16_BITS):
        raise SettingsError(
            f"the keys of layer {number} do not follow from their position by a rotary embedding that is known here "
            f"(error {min(errors):.2g}), so chunks cannot be moved: compute prompts of this model whole"
        )
    return candidates[errors.index(min(errors))]


def _keys_of_probe(model: PreTrainedModel, start: int) -> list[Tensor]:
    """The keys of a few tokens at the positions from `start` on, (1, Hkv, n, D) of each layer."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    ids = torch.arange(PROBE_TOKENS, device=model.device).unsqueeze(0) * 7 % vocabulary
    positions = torch.arange(start, start + PROBE_TOKENS, device=model.device).unsqueeze(0)
    cache = DynamicCache()
    model.base_model(input_ids=ids, position_ids=positions, **as_keyword(cache), use_cache=True)
    layers: list[Any] = cache.layers
    return [layer.keys for layer in layers]
