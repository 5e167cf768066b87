"""What each rank of tests/simulation/test_ranks.py runs: trainers of one's own, over the rows of a run of ours."""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_scheduler

from refreshkv import simulate
from refreshkv.data.rows import load_rows
from refreshkv.settings import settings_from_dict
from refreshkv.train.config import RunConfig
from refreshkv.train.order import RowOrder


class StepRows(torch.utils.data.Dataset):
    """The rows of a run, in the order of its steps."""

    def __init__(self, config: RunConfig):
        training, self.rows = config.training, load_rows(config.data.folder).train
        order = RowOrder(len(self.rows), training.global_batch, training.seed)
        self.numbers = [number for step in range(training.steps) for number in order.step(step)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.as_tensor(self.rows[self.numbers[index]]["input_ids"]).long()
        return {"input_ids": ids, "labels": ids}


def train_on_rank(kind: str, settings: dict[str, Any], results: str) -> None:
    """Trains as `settings` say with another trainer; rank 0 writes the values of each step to `results`."""
    config = settings_from_dict(RunConfig, settings)
    if "zero" in kind:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ compiler builds it for minutes
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    with simulated(model, config) as simulation:
        run = with_trainer if kind.startswith("trainer") else in_a_plain_loop
        run = with_accelerate if kind.startswith("accelerate") else run
        steps = run(kind, model, simulation, config, Path(results))
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(steps))
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def simulated(model, config: RunConfig):
    distillation = config.distillation if config.distillation.weight else None
    with simulate(model, config.simulation, config.training.seed, config.refresh, distillation) as simulation:
        yield simulation


def with_trainer(kind: str, model, simulation, config: RunConfig, results: Path) -> list[dict[str, float]]:
    """transformers' Trainer, which wraps the model for the ranks that the environment tells of."""
    training, rows = config.training, StepRows(config)
    sharded = {}
    if "fsdp2" in kind:
        wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        sharded = {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}
    if "zero" in kind:
        sharded = {"deepspeed": deepspeed_settings(stage_of(kind), config)}
    arguments = TrainingArguments(
        output_dir=str(results.with_suffix("")),
        max_steps=training.steps,
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.global_batch // training.micro_batch // 2,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_schedule,
        warmup_steps=training.warmup_steps,
        max_grad_norm=training.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        **sharded,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[simulation.callback])
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    if "zero" in kind:
        assert trainer.model_wrapped.zero_optimization_stage() == stage_of(kind)
    return [line for line in trainer.state.log_history if "loss" in line]


def stage_of(kind: str) -> int:
    """The ZeRO stage in the name of a case."""
    return int(kind.split("zero")[1][0])


def deepspeed_settings(stage: int, config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for float32 on a CPU; ZeRO takes the optimizer of the trainer."""
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": config.training.micro_batch,
        "gradient_accumulation_steps": config.training.global_batch // config.training.micro_batch // 2,
        "gradient_clipping": config.training.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def with_accelerate(kind: str, model, simulation, config: RunConfig, results: Path) -> list[dict[str, float]]:
    """A loop around accelerate's DeepSpeed."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_settings(stage_of(kind), config))
    # the schedule steps once a step, not once for each rank
    accelerator = Accelerator(deepspeed_plugin=plugin, step_scheduler_with_optimizer=False)
    wrapped, optimizer, schedule = accelerator.prepare(model.train(), *optimizer_and_schedule(model, config))
    assert wrapped.zero_optimization_stage() == stage_of(kind)
    return loop(wrapped, optimizer, schedule, simulation, config, accelerator.backward)


def in_a_plain_loop(kind: str, model, simulation, config: RunConfig, results: Path) -> list[dict[str, float]]:
    """A loop of one's own around DDP or FSDP2."""
    dist.init_process_group("gloo")
    model.train()
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else model

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), config.training.max_grad_norm)

    return loop(wrapped, *optimizer_and_schedule(wrapped, config), simulation, config, backward)


def optimizer_and_schedule(model, config: RunConfig):
    training = config.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=0.0)
    return optimizer, get_scheduler(training.lr_schedule, optimizer, training.warmup_steps, training.steps)


def loop(wrapped, optimizer, schedule, simulation, config: RunConfig, backward) -> list[dict[str, float]]:
    """The run's steps with a model that its library has wrapped; returns the mean loss of the ranks at each step.

    `backward(loss)` computes the gradients and clips them.
    """
    training, rows = config.training, StepRows(config)
    rank, world = dist.get_rank(), dist.get_world_size()  # accelerate counts one process on CPUs
    losses = []
    for step in range(training.steps):
        mine = [rows[step * training.global_batch + number] for number in range(rank, training.global_batch, world)]
        ids = torch.stack([row["input_ids"] for row in mine])
        loss = wrapped(input_ids=ids, labels=ids).loss
        backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        simulation.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        losses.append({"loss": float(mean)})
    return losses
