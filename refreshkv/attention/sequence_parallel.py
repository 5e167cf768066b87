"""Sequence parallelism: the tokens of each sequence are spread over a group of processes (DeepSpeed Ulysses).

Outside the attention a process has `T / N` columns of a sequence. Around it Ulysses exchanges columns for heads: the
attention function sees all T positions and `H / N` query heads. Budgets, selection and partial steps are per key/value
head and need no communication. Two computations need it: the mean query of the similarity schedule, which is over all
heads; and, with more processes than key/value heads, the maximum over the query heads of a group, which are then on
several processes.

Shapes: `B` sequences, `T` positions, `H` query heads, `Hkv` key/value heads, `D` head size, `N` processes per sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refreshkv.attention.enable import NAME
from refreshkv.attention.function import refresh_attention
from refreshkv.layers import has_recurrent_layers
from refreshkv.settings import SettingsError


def check_sequence(size: int, world: int, row_length: int, model_config: PretrainedConfig) -> None:
    """Raises `SettingsError` unless `size` processes per sequence divide ranks, sequence length and heads."""
    decoder = model_config.get_text_config(decoder=True)
    if size > 1 and has_recurrent_layers(model_config):
        raise SettingsError(
            f"parallel.sequence={size}: a recurrent layer of {decoder.model_type} needs all earlier tokens of its "
            "sequence, and each process would have a part of them: set parallel.sequence=1"
        )
    heads, groups = decoder.num_attention_heads, decoder.num_key_value_heads
    problem = None
    if world % size:
        problem = f"does not divide the {world} ranks"
    elif row_length % size:
        problem = f"does not divide data.row_length={row_length}"
    elif heads % size:
        problem = f"does not divide the model's {heads} attention heads"
    elif groups % size and size % groups:
        problem = f"and the model's {groups} key/value heads: one must divide the other"
    if problem:
        raise SettingsError(f"parallel.sequence={size} {problem}; choose another number")


def start(model: PreTrainedModel, size: int, micro_batch: int) -> Any:
    """Spreads the sequences of `model` (after `refreshkv.enable`) over groups of `size` neighbouring ranks.

    From here on every training pass of an enabled model in this process takes `micro_batch` sequences of T / N columns
    with their `position_ids`, at the same time on all ranks of the group. In evaluation mode each process works alone,
    on whole sequences. Returns the argument of `deepspeed.initialize(mpu=...)`: None for `size=1`, which changes
    nothing. `stop` ends it.
    """
    if size == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    decoder = model.config.get_text_config(decoder=True)
    groups = _Groups(decoder.num_attention_heads, decoder.num_key_value_heads, size)

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        return _attend(groups, module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    mpu: Any = UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation=NAME,
        sequence_parallel_size=size,
        micro_batch_size=micro_batch,
        disable_in_eval=True,
    )
    groups.sequence = mpu.get_sequence_parallel_group()
    # DeepSpeed calls this when it loads a checkpoint of another layout: no layer is divided
    divided = {"get_tensor_model_parallel_world_size": lambda: 1, "get_tensor_model_parallel_rank": lambda: 0}
    return SimpleNamespace(**{name: item for name, item in vars(mpu).items() if callable(item)}, **divided)


def stop() -> None:
    """Removes what `start` registered, so that another layout can be started in this process."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups

    groups.mpu = None
    ALL_ATTENTION_FUNCTIONS[NAME] = refresh_attention
    parallel_state_sp._release_sequence_parallel_groups()


@contextmanager
def started(model: PreTrainedModel, size: int, micro_batch: int) -> Iterator[Any]:
    """Calls `start`, and `stop` at the end."""
    try:
        yield start(model, size, micro_batch)
    finally:
        if size > 1:
            stop()


def columns(tensor: Tensor, rank: int, size: int) -> Tensor:
    """This rank's columns of a (B, T) tensor: (B, T / N)."""
    return tensor.chunk(size, dim=1)[rank % size].contiguous()


class _Groups:
    """The N processes of a sequence, and which of them share a key/value head."""

    def __init__(self, heads: int, groups: int, size: int):
        self.heads, self.size = heads, size
        self.sharing = max(1, size // groups)
        """How many processes have query heads of the same key/value head."""
        self.sequence: dist.ProcessGroup | None = None

    def average_heads(self, mean_queries: Tensor) -> Tensor:
        """Mean over the processes, which have equally many heads: (B, C, D) -> (B, C, D) float32."""
        total = mean_queries.contiguous().clone()
        dist.all_reduce(total, group=self.sequence)
        return total / self.size

    def whole_group(self, query: Tensor) -> tuple[Tensor, slice]:
        """All query heads of this process's key/value head, (B, G, T, D), and the slice of this process's own heads.

        Only its own heads have gradients: the others are for the selection, which is not differentiated.
        """
        parts = [torch.empty_like(query) for _ in range(self.size)]
        dist.all_gather(parts, query.detach().contiguous(), group=self.sequence)
        rank = dist.get_rank(self.sequence)
        parts[rank] = query
        first = rank // self.sharing * self.sharing
        own, heads = rank - first, query.shape[1]
        return torch.cat(parts[first : first + self.sharing], dim=1), slice(own * heads, (own + 1) * heads)


def _attend(groups: _Groups, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    """`refresh_attention` on this process's share of the heads, or on all of them outside training."""
    own, is_shared = slice(None), query.shape[1] < groups.heads
    if is_shared and kwargs.get("s_aux") is not None:
        raise SettingsError("parallel.sequence: attention sinks are not spread over processes: set parallel.sequence=1")
    if is_shared and kwargs.get("simulation") is not None:
        kwargs["average_heads"] = groups.average_heads
        if groups.sharing > 1:
            query, own = groups.whole_group(query)
    # Ulysses may have set this for another number of heads
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    output, weights = refresh_attention(module, query, key, value, *args, **kwargs)
    return output[:, :, own], weights
