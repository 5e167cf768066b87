"""Look-ahead queries of one layer, a small module within its attention module (docs/specification.md, section 13).

They are computed from the step's own query before the rotary embedding. To find it, the query that the attention gets
is rotated back by the cosines and sines that the layer gets.

Shapes: `B` batch rows, `T` positions, `N` steps that select, `H` query heads, `Hkv` key/value heads, `G = H / Hkv`,
`D` head size, `m` look-ahead queries, `R` rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refreshkv.errors import NotRefreshable, SettingsError

CHILD = "look_ahead"
"""Name of the module within an attention module."""


class Rotation(NamedTuple):
    """The rotary embedding of a call's positions, as the attention module gets it."""

    cos: Tensor
    """(B or 1, T, D)."""
    sin: Tensor

    def at(self, columns: Tensor) -> "Rotation":
        """The rotary embedding at the columns (B, N)."""
        index = columns.unsqueeze(-1).expand(-1, -1, self.cos.shape[-1])
        return Rotation(*(part.expand(len(columns), -1, -1).gather(1, index) for part in self))


class LookAhead(nn.Module):
    """The look-ahead queries `RoPE(a + delta_i) (r + r A_i B_i)` of one layer, m for each key/value head. Initially
    `B_i = 0` and `delta_i = 0`, and each query equals the step's own query bit for bit."""

    def __init__(self, kv_heads: int, head_dim: int, queries: int, rank: int, **placement: Any):
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(kv_heads, queries, **placement))
        """delta, in positions."""
        self.down = nn.Parameter(torch.randn(kv_heads, queries, head_dim, rank, **placement) * head_dim**-0.5)
        """A."""
        self.up = nn.Parameter(torch.zeros(kv_heads, queries, rank, head_dim, **placement))
        """B."""
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.zeros(head_dim // 2, **placement))
        """(D / 2,): radians a position."""

    def forward(self, query: Tensor, rotation: Rotation) -> Tensor:
        """The look-ahead queries of N steps: query (B, H, N, D) after the rotary embedding, the steps' rotation ->
        (B, H, N, m, D), at least float32."""
        wide = torch.promote_types(query.dtype, torch.float32)
        kv_heads, queries = self.offsets.shape
        if query.shape[1] % kv_heads:
            raise SettingsError(
                f"parallel.sequence: the layer has look-ahead queries for {kv_heads} key/value heads and was called "
                f"with {query.shape[1]} query heads: set parallel.sequence=1"
            )
        if rotation.cos.shape[-1] != query.shape[-1]:
            raise NotRefreshable(
                f"look-ahead: the model gives its layers {rotation.cos.shape[-1]} cosines for the {query.shape[-1]} "
                "dimensions of a head, and look-ahead queries need one for each: use the model without look-ahead"
            )
        cos, sin = (part[:, None].to(wide) for part in rotation)  # (B or 1, 1, N, D)
        query = query.to(wide)
        before = turned_back(query, cos, sin).unflatten(1, (kv_heads, -1))
        change = torch.einsum("bkgnd,kmdr,kmre->bkgnme", before, self.down.to(wide), self.up.to(wide)).flatten(1, 2)
        change = turned(change, cos.unsqueeze(3), sin.unsqueeze(3))
        # (Hkv, m, D): the further rotation by delta
        angles = (self.offsets.to(wide).unsqueeze(-1) * self.frequencies.to(wide)).repeat(1, 1, 2)
        angles = angles.repeat_interleave(query.shape[1] // kv_heads, dim=0)[None, :, None]  # (1, H, 1, m, D)
        return turned(query.unsqueeze(3) + change, angles.cos(), angles.sin())


def turned(vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding in its usual form, which rotates the dimensions `d` and `d + D / 2` as a pair: (...,
    D)."""
    return vector * cos + _half_turned(vector) * sin


def turned_back(vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `turned`, also if cosines and sines include a factor (yarn)."""
    return (vector * cos - _half_turned(vector) * sin) / (cos * cos + sin * sin)


def _half_turned(vector: Tensor) -> Tensor:
    first, second = vector.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def look_ahead_of(module: nn.Module) -> LookAhead | None:
    """The look-ahead queries of an attention module; None without any."""
    return module._modules.get(CHILD)  # pyright: ignore[reportReturnType]  # what add_look_ahead put there


def rotation_of(keywords: dict[str, Any]) -> Rotation:
    """The rotary embedding among an attention module's keywords; `NotRefreshable` without one of the usual form."""
    embeddings = keywords.get("position_embeddings")
    if not isinstance(embeddings, tuple) or len(embeddings) != 2 or any(part.dim() != 3 for part in embeddings):
        raise NotRefreshable(
            "look-ahead: the model gives its layers no cosines and sines of a rotary embedding, and look-ahead queries "
            "need them: use the model without look-ahead"
        )
    return Rotation(*embeddings)
