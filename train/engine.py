"""The DeepSpeed engine of a run: its configuration from ours, and the process group."""

import json
import logging
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel, get_scheduler

from refreshkv.settings import SettingsError
from refreshkv.train.config import TrainingConfig

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
    try:
        settings = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise SettingsError(f"training.deepspeed: there is no file {path}") from None
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


def init_processes() -> tuple[int, int]:
    """Joins the process group (alone if no launcher started us); returns rank and world size."""
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
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_batch(training: TrainingConfig, world: int) -> int:
    """Micro-batches per rank and step; `SettingsError` if the global batch does not divide into them."""
    rows = training.micro_batch * world
    if training.global_batch % rows:
        raise SettingsError(
            f"training.global_batch={training.global_batch} must be a multiple of training.micro_batch="
            f"{training.micro_batch} times {world} ranks"
        )
    return training.global_batch // rows


def build_engine(model: PreTrainedModel, training: TrainingConfig, world: int) -> deepspeed.DeepSpeedEngine:
    """The engine with AdamW and a transformers learning-rate schedule."""
    settings = read_deepspeed_json(training.deepspeed) | {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": check_batch(training, world),
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
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=settings,
        lr_scheduler=lambda optimizer: get_scheduler(
            training.schedule, optimizer, num_warmup_steps=training.warmup_steps, num_training_steps=training.steps
        ),
    )
    return engine
