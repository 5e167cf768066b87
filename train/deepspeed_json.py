"""The user's part of DeepSpeed's configuration: the JSON file that `training.deepspeed` names."""

from typing import Any

from refreshkv.ranges import show
from refreshkv.reading import LARGEST_SETTINGS, read_json
from refreshkv.settings import SettingsError, find_config

OURS = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch and training.micro_batch",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.learning_rate, training.betas and training.weight_decay",
    "scheduler": "training.lr_schedule",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
}
"""DeepSpeed keys that follow from the run's own settings. One number written in two files could contradict itself."""


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """Reads the file; raises `SettingsError` for what would be silently wrong."""
    file = find_config(path, ("deepspeed",), "training.deepspeed")
    settings = read_json(file, "training.deepspeed", LARGEST_SETTINGS)
    if not isinstance(settings, dict):
        raise SettingsError(f"training.deepspeed: {path} must hold a JSON object")
    for key, ours in OURS.items():
        if key in settings:
            raise SettingsError(f"training.deepspeed: remove {key} from {path}; it follows from {ours}")
    _validate_zero(settings, path)
    gathers = settings.get("zero_optimization", {}).get("stage3_gather_16bit_weights_on_model_save", False)
    if zero_stage(settings) == 3 and not gathers:
        raise SettingsError(
            f"training.deepspeed: {path} has ZeRO stage 3 without gathered saving, so no loadable model could be "
            'written; set "stage3_gather_16bit_weights_on_model_save": true'
        )
    return settings


def _validate_zero(settings: dict[str, Any], path: str) -> None:
    zero = settings.get("zero_optimization", {})
    where = f"training.deepspeed: zero_optimization in {path}"
    if not isinstance(zero, dict):
        raise SettingsError(f"{where} must be an object, got {show(zero)}")
    if zero.get("stage", 0) not in (0, 1, 2, 3) or isinstance(zero.get("stage", 0), bool):
        raise SettingsError(f"{where} has stage {show(zero['stage'])}: it must be 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key, {}), dict):
            raise SettingsError(f'{where}: {key} must be an object such as {{"device": "cpu"}}')


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration, 0 if it names none."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def offloads(settings: dict[str, Any], what: str) -> bool:
    """Whether the "optimizer" states or the "param"eters wait in the CPU's memory or on a disk."""
    return settings.get("zero_optimization", {}).get(f"offload_{what}", {}).get("device", "none") != "none"
