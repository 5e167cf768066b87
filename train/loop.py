"""The training loop: read it from top to bottom."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch.distributed as dist

from refreshkv.train.adapter import base_of, validate_base
from refreshkv.train.checkpoint_reader import newest_described
from refreshkv.train.config import RunConfig
from refreshkv.train.engine import init_processes
from refreshkv.train.faults import Watchdog, reporting
from refreshkv.train.hub import validate_push
from refreshkv.train.job import Job, resolve
from refreshkv.train.launcher import job_size
from refreshkv.train.log import RunLog
from refreshkv.train.loss import CausalLossModel
from refreshkv.train.model import build_model
from refreshkv.train.resume import needs_conversion, start_engine
from refreshkv.train.run import Run
from refreshkv.train.run_folder import claim_output, validate_output
from refreshkv.train.run_lock import locked_run, validate_unlocked
from refreshkv.train.stop_request import STOPPED, StopRequest
from refreshkv.train.validation import setting_warnings


def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Runs a training job. Every process of the job calls this; all results go to the folder `training.output`.

    Raises `SettingsError` before anything is written if the settings cannot work, `TrainingStopped` when a loss or a
    gradient is not finite, and `SystemExit(STOPPED)` once everything is saved after SIGTERM or SIGUSR1. When a process
    of the job dies or hangs, or a disk is full, the other processes end within `training.timeout` with one message
    (`train.faults`).
    """
    job = resolve(config, job_size())
    training, output = config.training, job.output

    with (
        prepared(job, resume, overwrite) as model,
        reporting(output),
        Watchdog(training.timeout, output) as watchdog,
        ExitStack() as connected,
    ):
        # Connect. This times out later than the watchdog, whose message says more about what is missing.
        watchdog.note("connecting to the other processes")
        rank, _ = init_processes(2 * training.timeout)
        # From here on the loop handles SIGTERM at the end of a step. Until here SIGTERM must end the process at once:
        # if one process refuses to start, the launcher sends SIGTERM to the others, which wait for it.
        stop = connected.enter_context(StopRequest())

        # Resume.
        engine, done, messages = start_engine(model, job, rank, resume, watchdog.note)
        run = Run(job, engine, rank, watchdog.note, done.tokens)
        log = RunLog(config, done.step, is_writer=rank == 0)
        for message in [*messages, *setting_warnings(config)]:
            log.say(message)

        # Loop.
        stopped_by = None
        if done.step < training.steps:
            run.mock_step(done.step + 1)
        for step in range(done.step + 1, training.steps + 1):
            log.step(step, run.step(step))
            is_last = step == training.steps
            stopped_by = None if is_last else stop.agreed(engine.device)
            if training.evaluate_every and (step % training.evaluate_every == 0 or is_last):
                log.evaluation(step, *run.evaluate(step))
            if step % training.save_every == 0 or is_last or stopped_by:
                log.checkpoint(step, run.save(step))
            if stopped_by:
                log.say(f"{stopped_by}: saved and stopped after step {step}; continue with --resume")
                break
        log.close()
    dist.destroy_process_group()
    if stopped_by:
        raise SystemExit(STOPPED)


@contextmanager
def prepared(job: Job, resume: bool, overwrite: bool) -> Iterator[CausalLossModel]:
    """Yields the built model, and locks the run's folder meanwhile. A refused run has written nothing."""
    config, is_first = job.config, os.environ.get("RANK", "0") == "0"
    if is_first:
        validate_unlocked(job.output)
        validate_output(job.output, config, resume, overwrite)
        if resume and (checkpoint := newest_described(job.output)):
            training = config.training
            has_adapters = training.adapter is not None
            needs_conversion(checkpoint.state, job.world, job.zero_stage, training.optimizer, has_adapters)
            base = base_of(config, job.model_config)
            validate_base(checkpoint.state.base, base, config.model.path, "--resume")
        if config.hub.repo:
            validate_push(config.hub.repo, "hub.repo")
    model = CausalLossModel(build_model(job), config.training.loss, config.distillation, config.training.look_ahead)
    with locked_run(job.output) if is_first else nullcontext():
        if is_first:
            validate_output(job.output, config, resume, overwrite)  # another job may have used it since
            claim_output(job.output, config, overwrite)
        yield model
