"""The DeepSpeed engine of a run: its configuration from ours, and the process group."""

import logging
import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import get_scheduler

from refreshkv.train.config import TrainingConfig
from refreshkv.train.deepspeed_json import offloads
from refreshkv.train.job import Job
from refreshkv.train.look_ahead import parameter_groups
from refreshkv.train.optimizer import eight_bit_adamw


def init_processes(timeout: float = TrainingConfig.timeout) -> tuple[int, int]:
    """Joins the process group, alone if no launcher started this process; returns rank and number of ranks.

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
    # DeepSpeed has no setting for it: this operator would be compiled at run time with a C++ compiler, for a gain on
    # CPUs only; gloo needs neither
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    assert accelerator is not None
    deepspeed.init_distributed(
        accelerator.communication_backend_name(), verbose=False, timeout=timedelta(seconds=timeout)
    )
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def build_engine(model: nn.Module, job: Job, mpu: Any = None, universal: bool = False) -> deepspeed.DeepSpeedEngine:
    """The engine of `model` with AdamW and a transformers learning-rate schedule.

    mpu: from `refreshkv.attention.sequence_parallel.start`. universal: the engine will load a checkpoint of another
    layout (`train.resume`).
    """
    training = job.config.training
    settings = engine_settings(job)
    if universal:
        settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
    parameters = parameter_groups(model, training)
    optimizer = None
    if training.optimizer == "adamw-8bit":
        del settings["optimizer"]
        settings["zero_allow_untested_optimizer"] = True
        optimizer = eight_bit_adamw(parameters, training)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(
            training.lr_schedule, optimizer, num_warmup_steps=training.warmup_steps, num_training_steps=training.steps
        )

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,  # pyright: ignore[reportArgumentType]  # annotated as a module; lists are documented
        optimizer=optimizer,
        config=settings,
        mpu=mpu,
        lr_scheduler=schedule,  # pyright: ignore[reportArgumentType]  # annotated with a class that torch has renamed
    )
    return engine


def engine_settings(job: Job) -> dict[str, Any]:
    """DeepSpeed's whole configuration: the user's part and what follows from the run's settings."""
    training = job.config.training
    settings = job.deepspeed | {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": job.micro_batches,
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
    if offloads(settings, "optimizer"):
        settings["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own CPU optimizer needs a compiler, too
    return settings
