"""Refuses calls of a model whose inputs disagree.

transformers looks for packed sequences only without a mask and without a cache, compares no lengths if a mask is all
ones, and silently omits outputs that an attention does not return. So a hook checks the inputs before each pass:
tokens, mask, positions and cache must agree in length, each batch row must be one sequence, and outputs that the
attention cannot return are refused.

While torch.compile traces a pass, the values of tensors are not known. Shapes are checked then, and the compiled code
asserts that each row is one sequence. The hook does so itself, and leaves nothing to the attention: torch may trace the
hook and run the attention uncompiled, after a graph break at its recompile limit.

Shapes: `B` batch rows, `n` tokens of the call, `L` tokens with the cached ones.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from refreshkv.attention.masks import padding_from_mask
from refreshkv.cache.keyword import given_cache
from refreshkv.cache.preallocated import PreallocatedCache, RowStart
from refreshkv.cache.preallocated_layer import validate_room

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keywords that tell flash attention where the sequences of a packed row begin."""

NOT_RETURNED = {
    "output_attentions": 'leave it out, or call model.set_attn_implementation("eager") for such passes',
    "head_mask": "leave it out",
}
"""Arguments that the refresh attention would ignore, and what to do instead."""


def validate_inputs(module: Any, inputs: dict[str, Any]) -> None:
    """Refuses a call of `module` if its inputs (name -> value) disagree; notes in the cache how its rows begin.

    Raises `ValueError`; compiled code raises `RuntimeError`. In a decoding step it reads no values from a GPU, so the
    host does not wait. A compiled decoding step is not checked: the prompt's pass was.
    """
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    is_compiling = torch.compiler.is_compiling()
    if is_compiling and isinstance(tokens, Tensor) and tokens.ndim >= 2 and tokens.shape[1] == 1:
        return
    if getattr(module.config, "is_causal", True) is False:
        raise ValueError("the refresh attention is causal: config.is_causal=False is not supported")
    for name, way_out in NOT_RETURNED.items():
        wanted = inputs.get(name)
        if wanted is None:
            wanted = getattr(module.config, name, None)
        if wanted is not None and wanted is not False:
            raise ValueError(
                f"{name} is not supported by the refresh attention, which has no weights to show: {way_out}"
            )
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return  # the model itself says what is wrong
    (rows, new), cache = tokens.shape[:2], given_cache(inputs)
    if new == 0:
        raise ValueError(
            "the call has no tokens that the cache does not hold: give each row at least one, and to begin another "
            "text, call reset() first"
        )
    _refuse_packing(inputs, rows, new)
    if isinstance(cache, PreallocatedCache) and cache.inputs_are_known:
        return  # tokens that are computed again
    mask = inputs.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    is_traced_block = is_compiling and isinstance(cache, PreallocatedCache)
    past = _masked_length(mask, new) if is_traced_block else _past_length(cache, new)
    if past is None:
        return
    _validate_mask_shape(mask, rows, new, past)
    hidden, positions = _hidden(mask, past + new), inputs.get("position_ids")
    if positions is not None and positions.ndim == 2:  # those of images, (3, B, n), are not checked
        _validate_positions(positions, hidden, rows, new, past)
    if is_compiling:
        return
    starts = _row_starts(positions, hidden, rows, new, past)
    if isinstance(cache, PreallocatedCache) and cache.has_own_layers:  # these change before a full layer can refuse
        validate_room(past + new, cache.capacity)
    if starts is not None and isinstance(cache, PreallocatedCache):
        _validate_start(cache, starts, past, new)


def without_packing(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without the keywords of packed rows; `validate_inputs` has checked that each row is one sequence."""
    return {name: value for name, value in inputs.items() if name not in PACKING}


def _masked_length(mask: Any, new: int) -> int:
    """Tokens in the cache as the mask says, and 0 without one: for each length that the host counts torch would compile
    the pass again."""
    return max(0, mask.shape[1] - new) if isinstance(mask, Tensor) and mask.ndim == 2 else 0


def _past_length(cache: Any, new: int) -> int | None:
    """Tokens in the cache; None if only the device knows, and the host should not wait for it."""
    if cache is None:
        return 0
    if isinstance(cache, PreallocatedCache):
        return cache.length if new > 1 else cache.known_length
    length = cache.get_seq_length() if isinstance(cache, Cache) else None
    return length if isinstance(length, int) else None


def _validate_mask_shape(mask: Any, rows: int, new: int, past: int) -> None:
    if not isinstance(mask, Tensor):
        return
    if mask.ndim != 2:
        padding_from_mask(mask)  # refuses all but what `left_padding_mask` returned
        return
    if mask.shape[1] != past + new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {past + new} tokens: it covers the cached ones too, and "
            "no others; to begin another text, call reset() first"
        )
    if mask.shape[0] != rows:
        raise ValueError(f"attention_mask has {mask.shape[0]} rows, and the tokens have {rows}")


def _hidden(mask: Any, columns: int) -> Tensor | None:
    """(B, L) bool: which columns are padding; None if that is not known."""
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return ~mask.bool()
    if mask.dtype == torch.int64 and mask.shape[1:] == (1, 1, 1):  # what `left_padding_mask` returned
        return torch.arange(columns, device=mask.device) < mask[:, 0, 0]
    return None


def _refuse_packing(inputs: dict[str, Any], rows: int, new: int) -> None:
    """Refuses keywords that cut rows into several sequences."""
    for name in PACKING:
        value = inputs.get(name)
        if value is None:
            continue
        if name.startswith("max_length"):
            is_whole = value == new
        elif name == "seq_idx":
            is_whole = (value == value[..., :1]).all()
        else:
            starts = torch.arange(0, rows * new + 1, new, device=value.device)
            is_whole = value.shape == starts.shape and (value == starts).all()
        _require_whole_rows(is_whole, f"{name} cuts rows into several sequences")


def _require_whole_rows(is_whole: Tensor | bool, otherwise: str) -> None:
    """Refuses packed rows, which `otherwise` describes, unless `is_whole`: at once, or in the compiled code if torch
    traces this and the value is a tensor."""
    message = f"{otherwise}: packed sequences and custom masks are not supported: give each row one sequence"
    if isinstance(is_whole, Tensor) and torch.compiler.is_compiling():
        torch._assert_async(is_whole, message)  # pyright: ignore[reportPrivateImportUsage]  # has no public name
    elif not bool(is_whole):
        raise ValueError(message)


def _validate_positions(positions: Tensor, hidden: Tensor | None, rows: int, new: int, past: int) -> None:
    """Refuses positions, (B or 1, n), that do not count up by one within a row."""
    if positions.shape[0] not in (1, rows) or positions.shape[1] != new:
        raise ValueError(
            f"position_ids have shape {tuple(positions.shape)} for {rows} rows of {new} tokens that a cache of {past} "
            "does not hold: give one position for each, and to begin another text, call reset() first"
        )
    if new == 1:
        return
    follows = positions.diff(dim=-1) == 1
    if hidden is not None:
        follows = follows | hidden[:, past:-1].to(follows.device)
    _require_whole_rows(follows.all(), "position_ids do not count up by one within a row")


def _row_starts(
    positions: Tensor | None, hidden: Tensor | None, rows: int, new: int, past: int
) -> list[RowStart] | None:
    """How the rows begin, by positions (B or 1, n), or None for the model's own, which count columns.

    Returns None for positions of images, (3, B, n), and where the host would have to wait for the device.
    """
    if positions is not None and positions.ndim != 2:
        return None
    on_device = any(tensor is not None and tensor.device.type != "cpu" for tensor in (positions, hidden))
    if on_device and new == 1:
        return None
    if hidden is not None and bool((hidden.int().diff(dim=-1) > 0).any()):
        return None  # the mask function refuses other padding than that on the left
    last = [past + new - 1] * rows if positions is None else positions[:, -1].expand(rows).tolist()
    padding: list[int | None] = [None] * rows if hidden is None else hidden.sum(dim=-1).tolist()
    ends_hidden = [False] * rows if hidden is None else hidden[:, -1].tolist()
    offsets = [None if is_hidden else end - (past + new - 1) for end, is_hidden in zip(last, ends_hidden, strict=True)]
    return [RowStart(*row) for row in zip(padding, offsets, strict=True)]


def _validate_start(cache: PreallocatedCache, starts: list[RowStart], past: int, new: int) -> None:
    """Refuses tokens whose padding or positions do not continue the cached ones, and notes those of new rows."""
    known = cache.row_starts if past > 0 else None
    if past > 0 and known is None and cache.has_prefix:  # stored prompts are computed from position 0
        known = [RowStart(None, -(start.padding or 0)) for start in starts]
    if known is not None and len(known) != len(starts) and cache.has_own_layers:
        raise ValueError(f"RefreshCache holds {len(known)} rows and was given {len(starts)}: call reset() first")
    if known is None or len(known) != len(starts):  # another number of rows is refused by the layers
        # without a mask the first tokens have no padding
        cache.row_starts = [start._replace(padding=start.padding or 0) for start in starts] if past == 0 else starts
        return
    # a step needs no mask, because the layers know their padding; a block without a mask would attend to padding
    default = 0 if new > 1 else None
    hidden = [default if start.padding is None else start.padding for start in starts]
    expected = [start.padding for start in known]
    if any(None not in pair and pair[0] != pair[1] for pair in zip(hidden, expected, strict=True)):
        raise ValueError(
            f"the attention_mask hides {hidden} tokens at the rows' beginnings, that of the tokens in the RefreshCache "
            f"{expected}: it covers the cached ones too"
        )
    for row, (before, now) in enumerate(zip(known, starts, strict=True)):
        moved = None if before.offset is None or now.offset is None else now.offset - before.offset
        if moved:
            raise ValueError(
                f"the position_ids of row {row} are {moved:+} from those that follow the "
                f"{past} tokens in the cache: give positions that count on (None counts columns, padding too), and to "
                "begin another text, call reset() first"
            )
    cache.row_starts = [before.merged(now) for before, now in zip(known, starts, strict=True)]
