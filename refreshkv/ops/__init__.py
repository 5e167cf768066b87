"""The operations of the refresh pattern: tensors and numbers in, tensors out.

`naive` is the readable truth, in plain PyTorch on any device; every other form is tested against it. Which form
computes what is decided in `choice`, once, by this table (16 bits: float16 and bfloat16; Triton: also float32):

| operation | form | when |
|---|---|---|
| all | `naive` | on CPUs, in float64, with REFRESHKV_OPS=naive in the environment |
| all but `write_score_keys` | `naive` | values of another size than the keys |
| `refresh_rows`, `select`, decoding steps | `naive` | look-ahead queries |
| `prompt_block`: a prompt, no gradient | `rows/cudnn.py` | 256 queries or more, 16 bits, no padding, eager |
| `short_block`: a few tokens behind many | `rows/short_block.py`: Triton | 16 bits, eager, no gradient |
| `whole_sequence`: all positions | `rows/whole_sequence.py` | at most 1/64 of it decoded, uniform, 16 bits, eager |
| `refresh_rows`: decoded positions | `rows/after_prompt.py`, of the following four: | otherwise |
| `rectified_rows`: decoded positions with `rectify` | `naive` | always |
| full steps | `rows/full_steps_cudnn.py` | uniform, 16 bits, shapes that recur, no sinks or softcap |
| full steps | `rows/full_steps.py`: Triton | otherwise |
| selecting, partial steps | `rows/block_steps.py`, `rows/key_lists.py`: Triton | short segments |
| selecting, partial steps | `rows/partial_steps.py`: Triton | otherwise |
| `select`: full, selecting steps of a pass | `selection/scores.py`, `selection/ranking.py`: Triton | always |
| `step.operators.*`: decoding steps | `step/launches.py`, `selection/step.py`: Triton | always |
| selecting steps of decoding, between the two | `step/selecting/launches.py`: Triton | with `select_stride` |
| `write_score_keys`: a prompt's | `selection/score_keys.py`: Triton | 8 or 4 bits |
| `copy_tokens`, `gather_tokens`: host memory; `move_tokens` | `step/transfer.py`: Triton | always |

*Uniform* means the fixed schedule without padding. Both selections are `selection/top_k.py`. Structs that operations
take are in `state`; the schedule is in `schedule`.
"""

from collections.abc import Sequence

from torch import Tensor

from refreshkv.ops import naive
from refreshkv.ops.choice import CHOICE
from refreshkv.ops.state import PLAIN_SOFTMAX, FullSteps, Plan, SelectionOptions, SoftmaxTerms


def refresh_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    options: SelectionOptions,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Attention of all positions after the prompt, full and partial steps (specification, section 8).

    Args:
        query: (B, H, Q, D): the last Q positions, those after the prompt and the ones that observe at its end.
        key, value: (B, Hkv, T, D): the whole sequence.
        plan: the refresh pattern of this layer.
        options: how full steps rank positions.
        scaling: factor of the logits.
        terms: attention sinks and softcap of the model.

    Returns (B, R, H, D), differentiable in query, key, value and the terms' sinks; the selection is not differentiated.
    """
    if CHOICE.attends_by_kernels(key, value) and plan.full_look_ahead is None:
        from refreshkv.ops.rows import after_prompt  # imports Triton, which machines without a GPU may lack

        return after_prompt.refresh_rows(query, key, value, plan, options, scaling, terms)
    return naive.refresh_rows(query, key, value, plan, options, scaling, terms)


def rectified_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    options: SelectionOptions,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """Attention of the decoded stream of a rectified pass (specification, section 11), in plain PyTorch on any device.

    Args:
        query: (B, H, T + R, D): the T positions under full attention, then the R decoded ones.
        key, value: (B, Hkv, T + R, D).
        plan: the refresh pattern of the T positions, with the fixed schedule.
        options: how full steps rank positions.
        scaling: factor of the logits.
        terms: attention sinks and softcap of the model.

    Returns (B, R, H, D), differentiable in query, key, value and the terms' sinks; the selection is not differentiated.
    """
    return naive.rectified_rows(query, key, value, plan, options, scaling, terms)


def whole_sequence(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: SelectionOptions, scaling: float
) -> Tensor:
    """Attention of a whole sequence, prompt included, where `CHOICE.takes_whole_sequence` is true.

    Args as in `refresh_rows`, but for query (B, H, T, D). Returns (B, T, H, D).
    """
    from refreshkv.ops.rows import whole_sequence as form

    return form.whole_sequence(query, key, value, plan, options, scaling)


def prompt_block(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of a prompt or a block of it, where `CHOICE.takes_prompt_block` is true.

    Args:
        query: (B, H, n, D): the last n positions.
        key, value: (B, Hkv, L, D), L >= n.
        scaling: factor of the logits.

    Returns (B, H, n, D), without gradient.
    """
    from refreshkv.ops.rows import cudnn

    return cudnn.prompt_block(query, key, value, scaling)


def short_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left_padding: Tensor | None,
    scaling: float,
    columns: Tensor | None = None,
) -> Tensor:
    """Causal attention of a few tokens behind many, where `CHOICE.takes_short_block` is true.

    Args:
        query: (B, H, n, D): the last n positions.
        key, value: (B, Hkv, L, D), L >= n.
        left_padding: (B,) int64, None without any.
        scaling: factor of the logits.
        columns: (n,) int64, ascending: the positions of the queries; None: the last n.

    Returns (B, H, n, D), without gradient.
    """
    from refreshkv.ops.rows import short_block as form

    return form.short_block(query, key, value, left_padding, scaling, columns)


def select(
    query: Tensor,
    key: Tensor,
    steps: FullSteps,
    options: SelectionOptions,
    scaling: float,
    terms: SoftmaxTerms = PLAIN_SOFTMAX,
) -> Tensor:
    """The positions that full steps keep (specification, sections 3 and 5).

    Args:
        query: (B, H, Q, D): the last Q of L positions.
        key: (B, Hkv, L, D).
        steps: the full steps, and how many positions each keeps.
        options: how they rank positions.
        scaling: factor of the logits.
        terms: attention sinks and softcap of the model.

    Returns (B, Hkv, C, W) integers by rank, best first, -1 past the end; ranks other than the `steps.droppable` lowest
    may come in any order.
    """
    if CHOICE.uses_kernels(query) and steps.look_ahead is None:
        from refreshkv.ops.selection import ranking

        return ranking.select(query, key, steps, options, scaling, terms=terms)
    return naive.select(query, key, steps, options, scaling, terms=terms)


def write_score_keys(key: Tensor, codes: Tensor, scales: Tensor, first: int | Tensor) -> None:
    """Stores the score keys of a prompt or a block of it (specification, section 10.5).

    Args:
        key: (B, Hkv, n, D).
        codes, scales: as in `refreshkv.ops.state.SelectingState`, of 8 or 4 bits; changed in place at the positions
            `first .. first + n - 1`.
        first: position of the first token, or a () int64 tensor, which the host does not read.
    """
    if CHOICE.uses_kernels(key):
        from refreshkv.ops.selection import score_keys as form
    else:
        form = naive
    form.write_score_keys(key, codes, scales, first)


def copy_tokens(source: Tensor, target: Tensor, source_first: int, target_first: int, count: int) -> None:
    """Copies tokens from one buffer to another, either of them on the device or in pinned host memory.

    Args:
        source: (B, Hkv, L, D).
        target: (B, Hkv, M, D), changed in place.
        source_first, target_first: the first token in each.
        count: how many tokens.
    """
    if CHOICE.uses_kernels(source) or CHOICE.uses_kernels(target):
        from refreshkv.ops.step import transfer as form
    else:
        form = naive
    form.copy_tokens(source, target, source_first, target_first, count)


def gather_tokens(source: Tensor, index: Tensor, wanted: Tensor, target: Tensor) -> None:
    """Copies chosen tokens to the front of a buffer on the device.

    Args:
        source: (B, Hkv, L, D), on the device or in pinned host memory.
        index: (B, Hkv, W) int32: the tokens; where it is negative nothing is copied.
        wanted: (B,) bool: the batch rows to copy.
        target: (B, Hkv, M, D), changed in place.
    """
    if CHOICE.uses_kernels(target):
        from refreshkv.ops.step import transfer as form
    else:
        form = naive
    form.gather_tokens(source, index, wanted, target)


def move_tokens(buffers: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    """Moves tokens within buffers; all are read before any is written.

    Args:
        buffers: (B, Hkv, L, D), (B, Hkv, L) or (B, L), changed in place; the first is of keys.
        source, target: (B, k) int64, the columns; a target that comes twice has the same source.
    """
    if CHOICE.uses_kernels(buffers[0]):
        from refreshkv.ops.step import transfer as form
    else:
        form = naive
    for buffer in buffers:
        whole = buffer if buffer.ndim > 2 else buffer[:, None]
        form.move_tokens(whole if whole.ndim == 4 else whole[..., None], source, target)
