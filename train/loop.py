"""The training loop: read it from top to bottom."""

import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from refreshkv.config import Simulation
from refreshkv.data.rows import load_rows
from refreshkv.loading import find_tokenizer
from refreshkv.settings import SettingsError
from refreshkv.train.checkpoint import (
    State,
    check_output,
    claim_output,
    finished_checkpoints,
    load_newest,
    save_checkpoint,
)
from refreshkv.train.config import RunConfig
from refreshkv.train.engine import build_engine, check_batch, init_processes, read_deepspeed_json, zero_stage
from refreshkv.train.evaluation import Strategy, evaluate
from refreshkv.train.log import RunLog
from refreshkv.train.loss import answer_targets, loss_sums
from refreshkv.train.model import build_model, check_rows, model_configuration
from refreshkv.train.order import RowOrder
from refreshkv.train.simulation import draw_simulation


class TrainingStopped(SettingsError):
    """Training cannot go on; the last good checkpoint stands."""


def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Trains as `config` says, on every process of the job; checkpoints and curves go to `training.output`.

    Raises `SettingsError` before anything is written if the settings cannot work, and `TrainingStopped` when a loss or
    a gradient is not finite.
    """
    training, output = config.training, Path(config.training.output)
    is_first = os.environ.get("RANK", "0") == "0"
    rows = load_rows(config.data.folder)
    check_config(config, rows.info)
    check_batch(training, int(os.environ.get("WORLD_SIZE", "1")))
    stage = zero_stage(read_deepspeed_json(training.deepspeed))
    model_config = model_configuration(config)
    check_rows(config, model_config, rows)
    if is_first:
        check_output(output, config, resume, overwrite)
    model = build_model(config, model_config)
    tokenizer = find_tokenizer(rows.tokenizer_folder)
    if is_first:
        claim_output(output, config, overwrite)

    rank, world = init_processes()
    engine = build_engine(model, training, world)
    state = load_newest(engine, output, world, stage, rows.info["fingerprint"]) if resume else None
    start, tokens_seen = (state.step, state.tokens) if state else (0, 0)
    order = RowOrder(len(rows.train), training.global_batch, training.seed)
    log = RunLog(output, training.steps, start, training.log_every, is_writer=rank == 0)
    if resume:
        log.say(
            f"continuing after step {start}" if state else "no finished checkpoint yet: starting from the beginning"
        )
    for warning in warnings(config):
        log.say(f"warning: {warning}")

    for step in range(start + 1, training.steps + 1):
        began = time.perf_counter()
        torch.manual_seed(training.seed * 1_000_003 + step * world + rank)  # for models with dropout
        simulation = draw_simulation(config.simulation, config.refresh, config.data.row_length, training.seed, step)
        batches = [
            load_batch(rows.train[indices], training.loss_on, engine.device)
            for indices in order.micro_batches(step - 1, rank, world, training.micro_batch)
        ]
        learning_rate = engine.get_lr()[0]
        values = train_step(engine, batches, simulation, output, step)
        tokens_seen += int(values.pop("tokens"))
        values["learning rate"] = learning_rate
        values["tokens/s"] = training.global_batch * config.data.row_length / (time.perf_counter() - began)
        log.step(step, values)

        if training.evaluate_every and (step % training.evaluate_every == 0 or step == training.steps):
            log.evaluation(step, evaluate_in_training(engine, rows.validation, config, rank, world))
        if step % training.save_every == 0 or step == training.steps:
            state = State(step, tokens_seen, world, stage, rows.info["fingerprint"])
            folder = save_checkpoint(engine, output, config, state, tokenizer)
            log.say(f"step {step}  saved {folder}")
    log.close()
    dist.destroy_process_group()


def load_batch(rows: dict[str, Tensor], loss_on: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """A micro-batch: ids (rows, T) int64, and the next tokens whose losses count, (rows, T-1) bool."""
    ids = rows["input_ids"].to(device, torch.int64)
    if loss_on == "all":
        return ids, torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return ids, answer_targets(rows["prompt_length"].to(device), rows["answer_length"].to(device), ids.shape[1])


def train_step(
    engine, batches: list[tuple[Tensor, Tensor]], simulation: Simulation | None, output: Path, step: int
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches of `load_batch`; returns its values, equal on all ranks.

    The loss is the mean over the counted tokens of all ranks, whatever their share of each.
    """
    engine.train()
    tokens = torch.tensor(float(sum(int(counted.sum()) for _, counted in batches)), device=engine.device)
    dist.all_reduce(tokens)
    totals = torch.zeros(4, device=engine.device)
    for index, (ids, counted) in enumerate(batches):
        logits = engine(input_ids=ids, refresh=simulation, use_cache=False).logits
        sums = loss_sums(logits, ids, simulation, counted)
        # DeepSpeed averages gradients over ranks; the division by the global number of tokens is ours
        engine.backward(sums.total * (dist.get_world_size() / tokens), scale_wrt_gas=False)
        totals += torch.stack([part.detach() for part in sums])
        if index < len(batches) - 1:
            engine.step()
    dist.all_reduce(totals)
    total, count, partial, partial_count = totals.tolist()
    if not math.isfinite(total):
        raise TrainingStopped(f"the loss of step {step} is not finite; {_advice(output)}")
    norm = step_and_norm(engine)
    if not math.isfinite(norm):
        raise TrainingStopped(f"the gradient of step {step} is not finite; {_advice(output)}")
    full_count = count - partial_count
    return {
        "loss": total / count,
        "loss full": (total - partial) / full_count if full_count else math.nan,
        "loss partial": partial / partial_count if partial_count else math.nan,
        "grad norm": norm,
        "tokens": count,
    }


def step_and_norm(engine) -> float:
    """Takes the optimizer step; returns the norm of its gradients before clipping."""
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():  # no DeepSpeed optimizer to ask
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm())


def evaluate_in_training(engine, validation, config: RunConfig, rank: int, world: int) -> dict[str, float]:
    """Perplexity of the last `training.evaluate_tokens` tokens of validation rows, in full and in refresh mode."""
    training = config.training
    result = evaluate(
        engine.module,
        validation.select(range(min(training.evaluate_rows, len(validation)))),
        [Strategy("full", None), Strategy("refresh", config.refresh)],
        last_tokens=training.evaluate_tokens,
        batch_size=training.micro_batch,
        progress=False,
        rank=rank,
        world=world,
    )
    return {item.name: item.perplexity for item in result.results}


def check_config(config: RunConfig, info: dict) -> None:
    """Refuses settings that contradict each other or the prepared rows."""
    length = config.data.row_length
    prepared = info["data"]["row_length"]
    if prepared != length:
        raise SettingsError(
            f"data.row_length={length}, but the rows in {config.data.folder} have {prepared} tokens: set it to that, "
            "or prepare them again in another folder"
        )
    if config.training.loss_on == "answers" and "prompt_length" not in info:
        raise SettingsError(
            f"training.loss_on=answers: the rows in {config.data.folder} have no answers; prepare them with "
            "data.path=tasks"
        )
    if config.simulation.pattern == "whole":
        config.simulation.prompt_range(length)
    if config.simulation.pattern == "paper" and max(config.simulation.strides) >= length:
        raise SettingsError(f"simulation.stride={config.simulation.stride} leaves no prompt in rows of {length} tokens")
    if config.training.evaluate_every and config.training.evaluate_tokens >= length:
        raise SettingsError(
            f"training.evaluate_tokens={config.training.evaluate_tokens} must be less than data.row_length={length}"
        )


def warnings(config: RunConfig) -> list[str]:
    """What is allowed but surely not meant."""
    length = config.data.row_length
    if config.simulation.pattern != "off" and config.refresh.largest_budget(1) >= length:
        return [
            f"refresh.budget={config.refresh.budget} is never smaller than the context (data.row_length={length}): "
            "nothing is simulated"
        ]
    return []


def _advice(output: Path) -> str:
    finished = finished_checkpoints(output)
    last = f"the last good checkpoint is {finished[-1]}" if finished else "no checkpoint was written yet"
    return f"{last}; lower training.learning_rate or look at the rows"
