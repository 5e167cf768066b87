"""Identifies models and tokenizers by all that they consist of: finished work is used again with the same ones only.

A model's identity holds whatever changes a key, a value or a logit: its configuration without names and paths, its
active adapters and their strength, a checksum of all bytes of every weight, and of code that it brought along.
"""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from refreshkv.checksums import digest, file_checksum
from refreshkv.layers import layer_kinds
from refreshkv.quantized import int8_scales, quantized_parts
from refreshkv.settings import SettingsError

LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length of the whole input: a prefix has other keys in each."""

NAMES = frozenset(
    "_name_or_path name_or_path base_model_name_or_path transformers_version _commit_hash revision auto_map id2label "
    "label2id peft_version".split()
)
"""Keys of configurations that hold names, paths and versions."""
MANNERS = frozenset(
    "architectures dtype torch_dtype refreshkv use_cache _attn_implementation attn_implementation "
    "_attn_implementation_autoset _experts_implementation return_dict output_attentions output_hidden_states "
    "inference_mode".split()
)
"""Keys that are compared by themselves (class, dtype), that every strategy brings along (the schedule), or that say how
the work is done."""

STEPS_OF_FREQUENCIES = 1 << 12
"""Buffers that a model computes from its configuration are compared to this many steps of each power of two: two kinds
of device round their last bits differently."""


# ---- models


def fingerprint(model: PreTrainedModel) -> str:
    """A hash, in hex, of all that a model's logits depend on besides the tokens (`describe`)."""
    return digest(describe(model))


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that a prompt's keys and values depend on besides its tokens, as JSON values by name.

    Raises `SettingsError` for rotary embeddings that depend on the length of the whole input.
    """
    config = model.config.get_text_config(decoder=True)
    rotary = _rotary(model.config)
    for kind in sorted(_rotary_kinds(rotary) & set(LENGTH_DEPENDENT_ROTARY)):
        raise SettingsError(
            f"rope_type={kind}: the keys of a prefix change with the length of the prompt, so they cannot be reused; "
            "leave out the prefix store for this model"
        )
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "rotary": _plain(rotary),
        "layers": [kind.window or kind.name for kind in layer_kinds(model.config)],
        "heads": [config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)],
        **describe(model),
    }


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """A model's class, dtype, configuration, active adapters and weights, as JSON values by name.

    The schedule and the attention's kernels are left out: the first is part of every strategy, the second rounds.
    Raises `SettingsError` if weights are not in memory.
    """
    whole = _base_model(model)
    code = own_code(whole)
    return {
        "class": type(whole).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": plain_config(model.config),
        "adapters": adapters(model),
        "weights": weights(model),
        **({} if code is None else {"code": code}),
    }


def own_code(model: Any) -> str | None:
    """A hash of the Python files of a model or tokenizer that brought its code along; None for one of a package."""
    if not type(model).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
        return None
    file = inspect.getfile(type(model))
    return digest({Path(name).name: file_checksum(Path(name)) for name in [file, *get_relative_import_files(file)]})


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """All of a configuration except names, paths, and how the work is done, as JSON values."""
    return _without(_plain(config.to_dict()), NAMES | MANNERS)


def weights(model: nn.Module) -> str:
    """A hash, in hex, of all bytes of every weight and buffer, without those of adapters that are not active.

    Raises `SettingsError` if some are not in memory.
    """
    left_out = _inactive_weights(model)
    derived = _derived_buffers(model)
    found: dict[str, list] = {}
    parts = [part for n, whole in _named_tensors(model) if n not in left_out for part in quantized_parts(n, whole)]
    for name, value in [*parts, *int8_scales(model)]:
        found[_bare(name)] = [str(value.dtype), list(value.shape), _checksum(name, value, name in derived)]
    return digest(found)


def adapters(model: nn.Module) -> dict[str, list]:
    """The active adapters of a model of the package peft: by module, those in force, their strengths, those merged."""
    found = {}
    for name, module in _adapted_modules(model):
        active = _active_adapters(module)
        merged = list(getattr(module, "merged_adapters", ()) or ())
        if active or merged:
            strengths = getattr(module, "scaling", None) or {}
            strength = {key: strengths[key] for key in sorted({*active, *merged}) if key in strengths}
            found[_bare(name)] = _plain([active, merged, strength])
    kinds = getattr(model, "peft_config", None) or {}
    if found and isinstance(kinds, dict):
        names = {adapter for active, merged, _ in found.values() for adapter in (*active, *merged)}
        settings = {name: kinds[name].to_dict() for name in sorted(names) if hasattr(kinds.get(name), "to_dict")}
        found["settings"] = _without(_plain(settings), NAMES | MANNERS)
    return found


def changes(model: nn.Module) -> tuple:
    """What tells cheaply that a model was changed in place: its adapters, and each weight's address and version."""
    versions = tuple(
        (value.data_ptr(), 0 if value.is_inference() else value._version) for _, value in model.named_parameters()
    )
    return json.dumps(adapters(model), sort_keys=True), versions


def first_difference(here: dict[str, Any], there: dict[str, Any]) -> str | None:
    """The first name in `here` whose value `there` lacks or has differently; None if there is none."""
    return next((name for name, value in here.items() if there.get(name) != value), None)


def _rotary(config: PretrainedConfig) -> dict[str, Any]:
    return getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}


def _rotary_kinds(rotary: dict[str, Any]) -> set[str]:
    parts = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]
    return {str(part.get("rope_type")) for part in parts}


def _plain(values: Any) -> Any:
    """Values as JSON gives them back."""
    return json.loads(json.dumps(values, sort_keys=True, default=_as_text))


def _as_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _without(values: Any, keys: frozenset[str]) -> Any:
    """JSON values without these keys, at any depth."""
    if isinstance(values, dict):
        return {key: _without(value, keys) for key, value in values.items() if key not in keys}
    return [_without(value, keys) for value in values] if isinstance(values, list) else values


def _base_model(model: Any) -> Any:
    """The model itself, or the one that peft's wrapper holds."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _bare(name: str) -> str:
    """A weight's name without what peft puts around it: with its adapters off, a model is the one it was."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").removesuffix(".base_layer")


def _derived_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that a saved model does not have: computed from the configuration, such as frequencies."""
    names = set()
    for prefix, module in model.named_modules():
        own = getattr(module, "_non_persistent_buffers_set", set())
        names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names


def _checksum(name: str, value: Tensor, derived: bool) -> str:
    """A hash of all bytes of a tensor. derived: of its values to `STEPS_OF_FREQUENCIES`."""
    if value.device.type == "meta":
        raise SettingsError(
            f"--model: the weight {name} is not in memory (offloaded to a disk or the CPU), so the model cannot be "
            "told from others: load it whole on one device"
        )
    value = value.detach()
    if derived and value.is_floating_point():
        mantissa, exponent = torch.frexp(value.double().cpu())
        value = torch.stack([(mantissa * STEPS_OF_FREQUENCIES).round(), exponent.double()])
    flat = value.contiguous().flatten().cpu()
    content = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return xxhash.xxh3_128_hexdigest(content)  # pyright: ignore[reportArgumentType]  # an array is a buffer


def _adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's modules: layers with adapters, and modules that an adapter replaces."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") or hasattr(module, "modules_to_save"):
            if not callable(getattr(module, "active_adapters", None)) and hasattr(module, "disable_adapters"):
                yield name, module


def _active_adapters(module: Any) -> list[str]:
    return [] if module.disable_adapters else list(module.active_adapters)


def _inactive_weights(model: nn.Module) -> set[str]:
    """Names of the weights of adapters that are not in force (merged ones are in the base's weights)."""
    names = set()
    for prefix, module in _adapted_modules(model):
        active = _active_adapters(module)
        merged = set(getattr(module, "merged_adapters", ()) or ())
        for part in (*getattr(module, "adapter_layer_names", ()), "modules_to_save"):
            holder = getattr(module, part, None)
            entries = holder.items() if isinstance(holder, (nn.ModuleDict, nn.ParameterDict)) else ()
            for key, value in entries:
                if key in active and key not in merged:
                    continue
                own = [name for name, _ in _named_tensors(value)] if isinstance(value, nn.Module) else [""]
                names |= {".".join(filter(None, (prefix, part, key, name))) for name in own}
    return names


# ---- tokenizers


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash, in hex, of what a tokenizer makes of texts and tokens: its vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if isinstance(rules, dict):
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    code = own_code(tokenizer)
    return digest([type(tokenizer).__name__, rules, special, cleans, *([] if code is None else [code])])


# ---- folders

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
OTHER_FILES = ("config.json", "generation_config.json", "adapter_config.json", "*.index.json", "quantize_config.json")
OTHER_FILES += (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.py",
)
"""The files of a model's folder, beside its weights, that its results depend on."""


def folder_identity(folder: Path) -> dict[str, str] | None:
    """Hashes of a model's folder by name; None if the folder holds no weights.

    `weights`: of all bytes of the files with weights. `rest`: of the configurations, without names and paths, and of
    the tokenizer's files. Checksums are kept as long as the files stay as they are (`refreshkv.checksums`).
    """
    found = {file.name: file_checksum(file) for file in _matching(folder, WEIGHT_FILES)}
    if not found:
        return None
    rest = {file.name: _without_paths(file) for file in _matching(folder, OTHER_FILES)}
    return {"weights": digest(found), "rest": digest(rest)}


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _without_paths(file: Path) -> Any:
    """A JSON file's values without names and paths; any other file's checksum."""
    if file.name.endswith("config.json"):
        try:
            return _without(json.loads(file.read_text(encoding="utf-8")), NAMES)
        except ValueError:
            pass
    return file_checksum(file)
