"""From a full step's queries to the positions it keeps: gathers the observers and calls the operation."""

import torch
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.ops import naive


def select_positions(
    observers: Tensor,
    key: Tensor,
    positions: Tensor,
    budgets: Tensor,
    left_padding: Tensor,
    config: RefreshConfig,
    scaling: float,
) -> Tensor:
    """The selection of each full step: (B, Hkv, N, W) int64 by rank, -1 past the end; W is the largest budget in use.

    observers (B, H, N, O, D), key (B, Hkv, L, D), positions (B, N), budgets and left_padding (B,), as in
    `refreshkv.ops.naive.select`.
    """
    return naive.select(
        observers,
        key,
        positions,
        budgets,
        left_padding,
        width=min(int(budgets.max()), key.shape[2]),
        pool_kernel=config.pool_kernel,
        recent_window=config.recent_window,
        sink_tokens=config.sink_tokens,
        scaling=scaling,
    )


def gather_observers(query: Tensor, positions: Tensor, observation_window: int) -> Tensor:
    """The queries of positions `a-O+1 .. a`: query (B, H, T, D), positions (B, N) -> (B, H, N, O, D).

    Positions before the first column get that column's query; the selection gives them no say.
    """
    back = torch.arange(observation_window - 1, -1, -1, device=query.device)
    columns = (positions.unsqueeze(-1) - back).clamp(min=0)  # (B, N, O)
    index = columns.flatten(1)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    return query.gather(2, index).unflatten(2, columns.shape[1:])
