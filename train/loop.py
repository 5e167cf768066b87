"""The training loop: read it from top to bottom."""

import os
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from refreshkv.attention import sequence_parallel
from refreshkv.data.rows import load_rows
from refreshkv.evaluation.perplexity import evaluate
from refreshkv.evaluation.strategies import full_attention, refreshing
from refreshkv.loading import find_tokenizer
from refreshkv.settings import SettingsError
from refreshkv.train import layout
from refreshkv.train.batch import make_batch
from refreshkv.train.checkpoint import (
    State,
    check_output,
    claim_output,
    finished_checkpoints,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from refreshkv.train.config import RunConfig
from refreshkv.train.engine import (
    build_engine,
    check_batch,
    check_optimizer,
    init_processes,
    read_deepspeed_json,
    zero_stage,
)
from refreshkv.train.faults import STOPPED, StopRequest, Watchdog, named
from refreshkv.train.flops import model_work, peak_flops, step_flops
from refreshkv.train.hub import BackgroundPush, check_push
from refreshkv.train.kernels import check_kernels
from refreshkv.train.log import RunLog, peak_memory
from refreshkv.train.loss import attach_loss
from refreshkv.train.mock import mock_step
from refreshkv.train.model import build_model, check_rows, model_configuration
from refreshkv.train.order import RowOrder
from refreshkv.train.simulation import draw_simulation
from refreshkv.train.step import NotFinite, train_step


class TrainingStopped(SettingsError):
    """Training cannot go on; the last good checkpoint stands."""


def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Trains as `config` says, on every process of the job; checkpoints and curves go to `training.output`.

    Raises `SettingsError` before anything is written if the settings cannot work, `TrainingStopped` when a loss or a
    gradient is not finite, and `SystemExit(STOPPED)` once everything is saved after SIGTERM or SIGUSR1. When a process
    of the job dies or hangs or a disk is full, the others end within `training.timeout` with one message
    (`train.faults`).
    """
    training, output = config.training, Path(config.training.output)
    world, sequence = int(os.environ.get("WORLD_SIZE", "1")), config.parallel.sequence
    is_first = os.environ.get("RANK", "0") == "0"
    rows = load_rows(config.data.folder)
    check_config(config, rows.info)
    model_config = model_configuration(config)
    check_rows(config, model_config, rows)
    sequence_parallel.check_sequence(sequence, world, config.data.row_length, model_config)
    check_batch(config, world)
    check_optimizer(training)
    check_kernels(training, model_config)
    stage = zero_stage(read_deepspeed_json(training.deepspeed))
    if is_first:
        check_output(output, config, resume, overwrite)
        if resume and (finished := finished_checkpoints(output)):
            layout.needs_conversion(read_state(finished[-1]), world, stage, training.optimizer)
        if config.hub.repo:
            check_push(config.hub.repo, "hub.repo")
    model = build_model(config, model_config)
    attach_loss(model, training.loss, config.distillation)
    tokenizer = find_tokenizer(rows.tokenizer_folder)
    if is_first:
        claim_output(output, config, overwrite)

    with named(output), Watchdog(training.timeout, output) as watchdog, ExitStack() as connected:
        # longer than the watchdog's, which knows what was going on
        watchdog.note("connecting to the other processes")
        rank, world = init_processes(2 * training.timeout)
        # not before: SIGTERM from the launcher ends at once a process that waits for one that has refused to start
        stop = connected.enter_context(StopRequest())
        watchdog.note("looking for a checkpoint")
        checkpoint, notes = newest_checkpoint(output, rank, world, rows.info["fingerprint"]) if resume else (None, [])
        state = read_state(checkpoint) if checkpoint else None
        watchdog.note("setting up the engine")
        convert = state is not None and layout.needs_conversion(state, world, stage, training.optimizer)
        mpu = sequence_parallel.start(model, sequence, training.micro_batch)
        engine = build_engine(model, config, world, mpu, convert)
        if checkpoint:
            watchdog.note(f"loading {checkpoint}")
            layout.load(engine, checkpoint, convert, state.zero_stage)
        start, tokens_seen = (state.step, state.tokens) if state else (0, 0)
        data_rank, data_world = rank // sequence, world // sequence
        work = model_work(model)
        order = RowOrder(len(rows.train), training.global_batch, training.seed)
        log = RunLog(output, training.steps, start, training.log_every, is_writer=rank == 0)
        push = BackgroundPush(config.hub, output, log.say) if rank == 0 and config.hub.repo else None
        if resume:
            log.say(
                f"continuing after step {start}" if state else "no finished checkpoint yet: starting from the beginning"
            )
        for warning in [*notes, *warnings(config)]:
            log.say(f"warning: {warning}")

        def batches_of(step):
            return [
                make_batch(rows.train[indices], training.loss_on, engine.device).columns(rank, sequence)
                for indices in order.micro_batches(step - 1, data_rank, data_world, training.micro_batch)
            ]

        if start < training.steps:
            watchdog.note("the mock step before step 1")
            mock_step(engine, batches_of(start + 1)[0], config)
        for step in range(start + 1, training.steps + 1):
            began = time.perf_counter()
            watchdog.note(f"step {step}")
            torch.manual_seed(training.seed * 1_000_003 + step * data_world + data_rank)  # for models with dropout
            simulation = draw_simulation(config.simulation, config.refresh, config.data.row_length, training.seed, step)
            learning_rate = engine.get_lr()[0]
            try:
                values = train_step(engine, batches_of(step), simulation, sequence, watchdog.note)
            except NotFinite as error:
                raise TrainingStopped(f"the {error} of step {step} is not finite; {_advice(output)}") from None
            tokens_seen += int(values.pop("tokens"))
            seconds = time.perf_counter() - began
            values["learning rate"] = learning_rate
            values["tokens/s"] = training.global_batch * config.data.row_length / seconds
            if peak := peak_flops(engine.device, training.dtype):
                distilled = config.distillation.weight > 0
                flops = step_flops(work, training.global_batch, config.data.row_length, simulation, distilled)
                values["MFU"] = flops / seconds / world / peak
            values["memory GB"] = peak_memory()
            log.step(step, values)

            stopped_by = stop.agreed(engine.device)
            is_last = step == training.steps or stopped_by is not None
            if training.evaluate_every and (step % training.evaluate_every == 0 or step == training.steps):
                watchdog.note(f"the evaluation after step {step}")
                log.evaluation(step, evaluate_in_training(engine, rows.validation, config, rank, world))
                if push:
                    push.metrics(step)
            if step % training.save_every == 0 or is_last:
                watchdog.note(f"the checkpoint of step {step}")
                state = State(step, tokens_seen, world, stage, rows.info["fingerprint"])
                folder = save_checkpoint(engine, output, config, state, tokenizer)
                log.say(f"step {step}  saved {folder}")
                if push:
                    push.checkpoint(folder)
            if stopped_by and step < training.steps:
                log.say(f"{stopped_by}: saved and stopped after step {step}; continue with --resume")
                break
        if push:
            push.close()
    log.close()
    dist.destroy_process_group()
    if start < training.steps and step < training.steps:
        raise SystemExit(STOPPED)


def evaluate_in_training(engine, validation, config: RunConfig, rank: int, world: int) -> dict[str, float]:
    """Perplexity of the last `training.evaluate_tokens` tokens of validation rows, in full and in refresh mode."""
    training = config.training
    result = evaluate(
        engine.module,
        validation.select(range(min(training.evaluate_rows, len(validation)))),
        [full_attention(), refreshing("refresh", config.refresh)],
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
    if config.distillation.weight and config.simulation.pattern == "off":
        raise SettingsError(
            f"distillation.weight={config.distillation.weight} draws predictions from the small cache to those of full "
            "attention, and simulation.pattern=off has none: set it to whole or paper, or the weight to 0"
        )
    if config.distillation.weight and config.training.loss == "liger":
        raise SettingsError("distillation needs training.loss=chunked or logits: Liger's loss has none")
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
