"""What one rank does in a run: take a step, evaluate, save."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from refreshkv.config import Simulation, Trace
from refreshkv.evaluation.perplexity import evaluate
from refreshkv.evaluation.strategies import full_attention, refreshing
from refreshkv.loading import find_tokenizer
from refreshkv.settings import SettingsError
from refreshkv.simulation.draw import draw_simulation, effective_strides, new_trace
from refreshkv.train.adapter import base_of
from refreshkv.train.batch import Batch, make_batch
from refreshkv.train.checkpoint import save_checkpoint
from refreshkv.train.flops import peak_flops, step_flops
from refreshkv.train.job import Job
from refreshkv.train.log import peak_memory
from refreshkv.train.mock import mock_step
from refreshkv.train.order import RowOrder
from refreshkv.train.run_folder import State, finished_checkpoints, run_id
from refreshkv.train.step import NotFinite, train_step


class TrainingStopped(SettingsError):
    """Training cannot go on; the last good checkpoint stands."""


@dataclass
class Run:
    """One rank of a run."""

    job: Job
    engine: Any
    """DeepSpeed's engine of a `CausalLossModel`."""
    rank: int
    note: Callable[[str], None]
    """Reports progress to the watchdog."""
    tokens_seen: int = 0
    """Tokens of all ranks whose losses counted, since the beginning of the run."""

    @cached_property
    def order(self) -> RowOrder:
        """The order of the rows."""
        training = self.job.config.training
        return RowOrder(len(self.job.prepared.train), training.global_batch, training.seed)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the rows, which every checkpoint holds."""
        return find_tokenizer(self.job.prepared.tokenizer_folder, self.job.config.model.origin.of_folder)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step: its columns of its group's rows."""
        job, training = self.job, self.job.config.training
        size = job.sequence_parallel_size
        rows = self.order.micro_batches(step - 1, self.rank // size, job.data_parallel_size, training.micro_batch)
        return [
            make_batch(job.prepared.train[indices], training.loss_on, self.engine.device).columns(self.rank, size)
            for indices in rows
        ]

    def mock_step(self, step: int) -> None:
        """Takes `step` with the most demanding simulation, without changing anything (`train.mock`)."""
        self.note(f"the mock step before step {step}")
        mock_step(self.engine, self.batches(step)[0], self.job.config)

    def step(self, step: int) -> dict[str, float]:
        """Takes an optimizer step; returns its values by readable name.

        Raises `TrainingStopped` if a loss or a gradient is not finite.
        """
        job, config, training = self.job, self.job.config, self.job.config.training
        began = time.perf_counter()
        self.note(f"step {step}")
        data_rank = self.rank // job.sequence_parallel_size
        # dropout's masks depend on the seed, the step and the rows alone, so a resumed run draws the same
        torch.manual_seed(training.seed * 1_000_003 + step * job.data_parallel_size + data_rank)
        simulation = draw_simulation(config.simulation, config.refresh, config.data.row_length, training.seed, step)
        learning_rate, trace, size = self.engine.get_lr()[0], new_trace(simulation), job.sequence_parallel_size
        try:
            values = train_step(self.engine, self.batches(step), simulation, size, self.note, trace)
        except NotFinite as error:
            raise TrainingStopped(f"the {error} of step {step} is not finite; {_advice(job.output)}") from None
        self.tokens_seen += int(values.pop("tokens"))
        strides = effective_strides(simulation, config.data.row_length, trace)
        speed = self._speed(time.perf_counter() - began, simulation, trace)
        return {**values, **strides, "learning rate": learning_rate, **speed}

    def _speed(self, seconds: float, simulation: Simulation | None, trace: Trace | None) -> dict[str, float]:
        """Tokens per second, the share of the GPUs' peak that went into model work, and memory."""
        job, config, rows = self.job, self.job.config, self.job.config.training.global_batch
        values = {"tokens/s": rows * config.data.row_length / seconds}
        if peak := peak_flops(self.engine.device, config.training.dtype):
            flops = step_flops(
                job.shape.work,
                rows,
                config.data.row_length,
                simulation,
                full_steps=trace.full_steps if trace else {},
                distilled=config.distillation.weight > 0,
            )
            values["MFU"] = flops / seconds / job.world / peak
        return {**values, "memory GB": peak_memory()}

    def evaluate(self, step: int) -> tuple[dict[str, float], float | None]:
        """Evaluates the last `training.evaluate_tokens` tokens of validation rows, in full and in refresh mode.

        Returns the perplexities by mode, and the acceptance: the share of these tokens' positions at which the most
        likely token is the same in both modes, so that lossless decoding would accept a greedy draft.
        """
        training, validation = self.job.config.training, self.job.prepared.validation
        self.note(f"the evaluation after step {step}")
        result = evaluate(
            self.engine.module,
            validation.select(range(min(training.evaluate_rows, len(validation)))),
            [full_attention(), refreshing("refresh", self.job.config.refresh)],
            last_tokens=training.evaluate_tokens,
            batch_size=training.micro_batch,
            progress=False,
            rank=self.rank,
            world=self.job.world,
        )
        return {item.name: item.perplexity for item in result.results}, result.results[-1].agreement

    def save(self, step: int) -> Path:
        """Writes the checkpoint of a step; returns its folder."""
        job = self.job
        self.note(f"the checkpoint of step {step}")
        rows, run = job.prepared.info["fingerprint"], run_id(job.output) or ""
        base = base_of(job.config, job.model_config) if self.rank == 0 else ""  # rank 0 writes the state
        state = State(step, self.tokens_seen, job.world, job.zero_stage, rows, run, base)
        return save_checkpoint(self.engine, job.output, job.config, state, self.tokenizer)


def _advice(output: Path) -> str:
    finished = finished_checkpoints(output)
    last = f"the last good checkpoint is {finished[-1]}" if finished else "no checkpoint was written yet"
    return f"{last}; lower training.learning_rate or look at the rows"
