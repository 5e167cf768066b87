"""Loads models, tokenizers and saved schedules from folders or the Hub; errors are one line that names the setting."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from refreshkv.cache.refresh import saved_config
from refreshkv.config import RefreshConfig
from refreshkv.gguf import dequantize_options, forget_quantization, is_gguf, pretrained_location
from refreshkv.quantized import keep_packed_form
from refreshkv.ranges import LARGEST_COUNT, show
from refreshkv.reading import refuse_special_files
from refreshkv.settings import SettingsError

LARGEST_SIZES = {
    "num_hidden_layers": 10_000,
    "vocab_size": 100_000_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 100_000_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "max_position_embeddings": LARGEST_COUNT,
}
"""Numbers of a model's configuration, and the largest that a machine could hold."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Settings of generation that are numbers of tokens."""
OPTIONS = ("--revision", "--trust-remote-code")
ORIGIN_SETTINGS = {
    "model.path": ("model.revision", "model.trust_remote_code=true"),
    "data.tokenizer": ("data.tokenizer_revision", "data.trust_remote_code=true"),
    "pretrained": ("revision", "trust_remote_code=True"),
}
"""Setting that names a model or a tokenizer -> the settings of its `Origin`; for all others `OPTIONS`."""

CHECKPOINT_FILES, RUN_FILES = ("manifest.json", "state.json"), ("run.yaml", "checkpoints")
"""What a checkpoint of training, and a run with checkpoints, hold and no model does."""


@dataclass(frozen=True)
class Origin:
    """Which state of a Hub repository is loaded, and whether Python code in it, or in a folder, may run."""

    revision: str | None = None
    """Branch, tag or commit of a Hub repository; None for its main branch. Folders and GGUF files have none."""
    trust_remote_code: bool = False
    """Run the code that a model or a tokenizer brings along; without it such a one is refused."""

    @property
    def of_folder(self) -> "Origin":
        """The same for a folder of this machine."""
        return Origin(trust_remote_code=self.trust_remote_code)

    def keywords(self, name: str | Path, setting: str) -> dict[str, Any]:
        """The keywords of `from_pretrained`. Raises `SettingsError` for a revision of what has none."""
        if self.revision is None:
            return {"trust_remote_code": self.trust_remote_code}
        if Path(name).expanduser().exists() or is_gguf(name):
            option = ORIGIN_SETTINGS.get(setting, OPTIONS)[0]
            raise SettingsError(
                f"{option}={self.revision}: {name} is on this machine and has no revisions: leave it out"
            )
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}

    def settings(self) -> dict[str, Any]:
        """What reports say of it; nothing for the defaults."""
        found = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return {name: value for name, value in found.items() if value}


PLAIN = Origin()
"""The main branch, without its code."""


def model_folder(name: str, setting: str) -> str:
    """The folder of a model inside an experiment's folder (`name`/model), or else `name` itself.

    Raises `SettingsError`, which names `setting`, for a checkpoint of training.
    """
    folder = Path(name)
    _validate_no_checkpoint(folder, setting)
    nested = (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file()
    return str(folder / "model") if nested else name


def _validate_no_checkpoint(folder: Path, setting: str) -> None:
    if any(all((folder / name).exists() for name in names) for names in (CHECKPOINT_FILES, RUN_FILES)):
        raise SettingsError(
            f"{setting}: {folder} holds checkpoints of training, and no model; make one: launch/export.py {folder} OUT"
        )


def load_configuration(name: str, setting: str, origin: Origin = PLAIN) -> PretrainedConfig:
    """Loads a model's configuration from a folder, Hub id or GGUF file.

    Raises `SettingsError` naming `setting` if there is none.
    """
    _validate_no_checkpoint(Path(name), setting)
    location = pretrained_location(name, setting)
    refuse_special_files(name, setting)
    keywords = origin.keywords(name, setting)
    try:
        config = AutoConfig.from_pretrained(**location, **keywords)
    except Exception as error:  # the type depends on what is missing, and on where the model comes from
        raise SettingsError(
            f"{setting}: no model could be loaded from {_source(name)}: {_reason(error, setting)}"
        ) from error
    validate_sizes(config, f"{setting}: the model {name}")
    return config


def own_class(config: PretrainedConfig, name: str | Path, origin: Origin) -> Any:
    """The decoder's class in the code of the folder or Hub repository `name`; None if it brings none, or none may run.

    A model of this class that is saved saves its code too.
    """
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if reference is None or not origin.trust_remote_code:
        return None
    is_elsewhere = "--" in reference and reference.partition("--")[0] != str(name)
    revision = None if is_elsewhere else origin.revision
    found = get_class_from_dynamic_module(reference, str(name), code_revision=revision)
    found.register_for_auto_class("AutoModelForCausalLM")
    return found


def hub_commit(name: str, origin: Origin = PLAIN) -> str | None:
    """The commit of a Hub repository whose configuration was loaded last, from the cache; None if there is none."""
    file = None if Path(name).exists() else try_to_load_from_cache(name, "config.json", revision=origin.revision)
    return Path(file).parent.name if isinstance(file, str) else None  # snapshots/COMMIT/config.json


def validate_sizes(config: PretrainedConfig, whose: str) -> None:
    """Raises `SettingsError` for layers, heads or sizes that are no whole numbers, or that no machine holds.

    whose: how the error begins. Building such a model would take all memory, or hours, before it fails.
    """
    decoder = config.get_text_config(decoder=True)
    for name, most in LARGEST_SIZES.items():
        value = getattr(decoder, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise SettingsError(f"{whose} has {name}={show(value)}: it must be a whole number from 1 to {most}")
    heads, groups = (getattr(decoder, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and groups and heads % groups:
        raise SettingsError(f"{whose} has {heads} heads: they must be a multiple of num_key_value_heads={groups}")


def load_model(name: str, setting: str, origin: Origin = PLAIN, **options: Any) -> PreTrainedModel:
    """Loads a decoder with all its weights from a folder, Hub id or GGUF file; `options` go to `from_pretrained`.

    A GGUF file's weights are dequantized. Raises `SettingsError` naming `setting` if none loads, or if weights are
    missing: transformers would draw them at random.
    """
    if not is_gguf(name):
        load_configuration(name, setting, origin)
    options |= pretrained_location(name, setting) | dequantize_options(name) | origin.keywords(name, setting)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(output_loading_info=True, **options)
        model, loading = loaded
    except Exception as error:  # as above
        raise SettingsError(
            f"{setting}: no model could be loaded from {_source(name)}: {_reason(error, setting)}"
        ) from error
    validate_whole(loading, f"{setting}: {name}")
    validate_finite(model, f"{setting}: {name}")
    _validate_token_ids(model, f"{setting}: {name}")
    keep_packed_form(model)
    if is_gguf(name):
        forget_quantization(model)
    vars(model).pop("generate", None)  # a loop in custom_generate/ would take the place of ours
    return model


def _validate_token_ids(model: PreTrainedModel, whose: str) -> None:
    """Raises `SettingsError`, which begins with `whose`, for special tokens that are no numbers of tokens."""
    for name in TOKEN_IDS:
        value = getattr(model.generation_config, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise SettingsError(
                    f"{whose} has {name}={show(value)} in generation_config.json or config.json: it must be the number "
                    "of a token, or a list of such numbers"
                )


def validate_whole(loading: dict[str, Any], whose: str) -> None:
    """Raises `SettingsError`, which begins with `whose`, if the loading info of `from_pretrained` has missing weights:
    transformers draws them at random."""
    if missing := sorted(loading["missing_keys"]):
        raise SettingsError(f"{whose} lacks {len(missing)} weights, the first being {missing[0]}")


def validate_finite(model: PreTrainedModel, whose: str) -> None:
    """Raises `SettingsError`, which begins with `whose`, for a model with NaN or infinity among its weights."""
    if broken := _first_not_finite(model):
        raise SettingsError(f"{whose} has weights that are not finite, the first in {broken}: copy it again")


def _first_not_finite(model: PreTrainedModel) -> str | None:
    """The name of the first weight that holds NaN or infinity; None if there is none."""
    for name, weight in model.named_parameters():
        is_here = weight.numel() > 0 and weight.device.type != "meta"  # at ZeRO stage 3 other ranks have it
        is_plain = type(weight.data) is torch.Tensor  # quantized ones are classes of their own, without sums
        if is_here and is_plain and weight.is_floating_point() and weight.element_size() > 1:
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            # the sum reads the weight once and makes no copy; large weights that overflow in it are looked at again
            if not weight.detach().sum(dtype=wide).isfinite() and not weight.detach().isfinite().all():
                return name
    return None


def load_tokenizer(name: str | Path, setting: str, origin: Origin = PLAIN) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, Hub id or GGUF file; `SettingsError` naming `setting` if there is none."""
    location = pretrained_location(name, setting)
    refuse_special_files(name, setting)
    keywords = origin.keywords(name, setting)
    try:
        return AutoTokenizer.from_pretrained(**location, **keywords)
    except Exception as error:  # as above, and on the tokenizer's own library
        raise SettingsError(
            f"{setting}: no tokenizer could be loaded from {_source(name)}: {_reason(error, setting)}"
        ) from error


def find_tokenizer(name: str | Path, origin: Origin = PLAIN) -> PreTrainedTokenizerBase | None:
    """Loads a tokenizer from a folder or Hub id; None if there is none."""
    try:
        return load_tokenizer(name, "", origin)
    except SettingsError:
        return None


def own_config(model_config: PretrainedConfig) -> RefreshConfig:
    """The refresh schedule and selection saved in a model's config.json, or the paper's defaults if it has none."""
    if getattr(model_config, "refreshkv", None) is None:
        return RefreshConfig()
    return saved_config(model_config)


def _source(name: str | Path) -> str:
    return f"the folder {name}" if Path(name).is_dir() else f"{name} (no such folder; taken for a Hub id)"


def _reason(error: Exception, setting: str) -> str:
    if "trust_remote_code" in str(error):
        option = ORIGIN_SETTINGS.get(setting, OPTIONS)[1]
        return f"it needs Python code of its own, which may do anything and is not run without {option}: read it first"
    if "weights_only" in str(error).lower() or isinstance(error, UnpicklingError):
        return "its weights are a pickle with more in it than tensors, which could run code and is not loaded"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
