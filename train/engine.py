"""The DeepSpeed engine of a run: its configuration from ours, and the process group."""

import json
import logging
import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel, get_scheduler

from refreshkv.settings import SettingsError, find_config
from refreshkv.train.config import RunConfig, TrainingConfig

OURS = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch and training.micro_batch",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.learning_rate, training.betas and training.weight_decay",
    "scheduler": "training.schedule",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
}
"""DeepSpeed keys that follow from the run's own settings; two places for one number would contradict each other."""


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The user's part of DeepSpeed's configuration; `SettingsError` for what would be silently wrong."""
    file = find_config(path, ("deepspeed",), "training.deepspeed")
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"training.deepspeed: {path} is not readable JSON: {error}") from None
    if not isinstance(settings, dict):
        raise SettingsError(f"training.deepspeed: {path} must hold a JSON object")
    for key, ours in OURS.items():
        if key in settings:
            raise SettingsError(f"training.deepspeed: remove {key} from {path}; it follows from {ours}")
    zero = settings.get("zero_optimization", {})
    if zero.get("stage", 0) == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save", False):
        raise SettingsError(
            f"training.deepspeed: {path} has ZeRO stage 3 without gathered saving, so no loadable model could be "
            'written; set "stage3_gather_16bit_weights_on_model_save": true'
        )
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed JSON, 0 if it names none."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def init_processes(timeout: float = TrainingConfig.timeout) -> tuple[int, int]:
    """Joins the process group (alone if no launcher started us); returns rank and world size.

    timeout: seconds after which waiting for the other processes is an error.
    """
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # compiled at run time with a C++ compiler, for a gain on CPUs only; gloo needs neither
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        get_accelerator().communication_backend_name(), verbose=False, timeout=timedelta(seconds=timeout)
    )
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_batch(config: RunConfig, world: int) -> int:
    """Micro-batches per rank and step; `SettingsError` if the global batch does not divide into them."""
    training, sequence = config.training, config.parallel.sequence
    groups = world // sequence
    rows = training.micro_batch * groups
    if training.global_batch % max(1, rows) or not rows:
        who = f"{world} ranks" if sequence == 1 else f"{groups} groups of {sequence} ranks (parallel.sequence)"
        raise SettingsError(
            f"training.global_batch={training.global_batch} must be a multiple of training.micro_batch="
            f"{training.micro_batch} times {who}"
        )
    return training.global_batch // rows


def build_engine(
    model: PreTrainedModel, config: RunConfig, world: int, mpu: Any = None, universal: bool = False
) -> deepspeed.DeepSpeedEngine:
    """The engine with AdamW and a transformers learning-rate schedule.

    mpu: from `refreshkv.attention.sequence_parallel.start`. universal: it will load a checkpoint of another layout
    (`train.layout`).
    """
    training = config.training
    settings = engine_settings(config, world)
    if universal:
        settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = None
    if training.optimizer == "adamw-8bit":
        del settings["optimizer"]
        settings["zero_allow_untested_optimizer"] = True
        optimizer = eight_bit_adamw(parameters, training)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        optimizer=optimizer,
        config=settings,
        mpu=mpu,
        lr_scheduler=lambda optimizer: get_scheduler(
            training.schedule, optimizer, num_warmup_steps=training.warmup_steps, num_training_steps=training.steps
        ),
    )
    return engine


def engine_settings(config: RunConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's whole configuration: the user's part and what follows from the run's settings."""
    training = config.training
    settings = read_deepspeed_json(training.deepspeed) | {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": check_batch(config, world),
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.dtype == "bf16"},
        # torch's own AdamW: DeepSpeed's fused one needs a compiler on every machine
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,
                "lr": training.learning_rate,
                "betas": training.betas,
                "weight_decay": training.weight_decay,
            },
        },
    }
    settings.setdefault("steps_per_print", 10**9)
    if offloads_optimizer(settings):
        settings["zero_force_ds_cpu_optimizer"] = False  # its own CPU optimizer needs a compiler, too
    return settings


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether the optimizer's states lie in the CPU's memory or on a disk."""
    return settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def check_optimizer(training: TrainingConfig) -> None:
    """Raises `SettingsError` if the optimizer's library is missing."""
    if training.optimizer == "adamw-8bit":
        _adamw_8bit()


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise SettingsError(
            "training.optimizer=adamw-8bit needs the package bitsandbytes: pip install 'refreshkv[8bit]', or set "
            "training.optimizer=adamw"
        ) from None
    return AdamW8bit


def eight_bit_adamw(parameters: list[torch.nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments, of the library bitsandbytes."""
    return _adamw_8bit()(
        parameters, lr=training.learning_rate, betas=tuple(training.betas), weight_decay=training.weight_decay
    )
