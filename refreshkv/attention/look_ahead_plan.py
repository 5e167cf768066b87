"""The look-ahead queries of a simulated pass, and the divergence between their scores and the attention that follows.

Shapes: `B` batch rows, `T` positions, `N` steps that select, `H` query heads, `Hkv` key/value heads, `D` head size,
`m` look-ahead queries.
"""

import torch
from torch import Tensor

from refreshkv.attention.dense import DenseAttention
from refreshkv.attention.look_ahead_module import LookAhead, Rotation
from refreshkv.config import Simulation, Trace
from refreshkv.ops.naive.look_ahead import look_ahead_divergence
from refreshkv.ops.naive.score_keys import score_keys_of
from refreshkv.ops.state import Plan


def plan_with_look_ahead(
    look_ahead: LookAhead,
    dense: DenseAttention,
    query: Tensor,
    key: Tensor,
    plan: Plan,
    simulation: Simulation,
    trace: Trace | None,
    rotation: Rotation | None,
) -> Plan:
    """The plan with the look-ahead queries of its full and selecting steps; writes their divergence into the trace, if
    it has `measured_steps`.

    query (B, H, T, D), key (B, Hkv, T, D): those of the whole sequence; dense: the layer, its scaling and softmax.
    """
    assert rotation is not None  # the attention module's hook adds it
    groups = [(plan.full_positions, key)]
    if plan.selecting_positions is not None:
        groups.append((plan.selecting_positions, score_keys_of(key.detach(), plan.score_bits)))
    queries = [queries_at(look_ahead, query, rotation, positions) for positions, _ in groups]
    if trace is not None and trace.measured_steps:
        padding, horizon = plan.left_padding, _horizon(simulation, query.shape[2])
        total, count = torch.zeros((), device=query.device), torch.zeros((), device=query.device)
        for (positions, score_key), found in zip(groups, queries, strict=True):
            some = _evenly_spread(positions.shape[1], trace.measured_steps, query.device)
            measured = (found[:, :, some], positions[:, some], padding, horizon, dense.scaling, dense.terms)
            divergence, steps = look_ahead_divergence(query, key, score_key, *measured)
            total, count = total + divergence, count + steps
        trace.look_ahead_divergences[dense.module.layer_idx] = total / count.clamp(min=1)
    full, *selecting = (found.detach() for found in queries)
    return plan._replace(full_look_ahead=full, selecting_look_ahead=selecting[0] if selecting else None)


def queries_at(look_ahead: LookAhead, query: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    """The look-ahead queries of the steps at positions (B, N), -1 where there is none: (B, H, N, m, D)."""
    columns = positions.clamp(min=0)
    index = columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return look_ahead(query.detach().gather(2, index), rotation.at(columns))


def _horizon(simulation: Simulation, length: int) -> int:
    """Positions after a step until the next one that selects, under the fixed schedule, or to the sequence's end."""
    config = simulation.config
    return min(config.stride, config.select_stride or length, length - simulation.prompt_length)


def _evenly_spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of the numbers below `count`, from the first to the last."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.linspace(0, count - 1, most, device=device).round().long().unique()
