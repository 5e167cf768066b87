"""Refuses settings that cannot work, before anything is written, by a `SettingsError` of one line.

What a single section contradicts in itself is refused where the section is declared (`train.config`).
"""

from typing import Any

import torch
from transformers import PretrainedConfig, get_scheduler

from refreshkv.data.rows import Rows, validate_same_tokens, validate_token_ids
from refreshkv.settings import SettingsError
from refreshkv.simulation.draw import with_budget
from refreshkv.train.config import RunConfig, TrainingConfig


def validate_settings(config: RunConfig) -> None:
    """Refuses sections that contradict each other."""
    training, length = config.training, config.data.row_length
    _validate_simulation(config)
    _validate_schedule(config.training)
    if config.distillation.weight and config.simulation.pattern == "off":
        raise SettingsError(
            f"distillation.weight={config.distillation.weight} draws predictions from the small cache to those of full "
            "attention, and simulation.pattern=off has none: set it to whole or paper, or the weight to 0"
        )
    if training.evaluate_every and training.evaluate_tokens >= length:
        raise SettingsError(
            f"training.evaluate_tokens={training.evaluate_tokens} must be less than data.row_length={length}"
        )


def _validate_simulation(config: RunConfig) -> None:
    simulation, length = config.simulation, config.data.row_length
    if simulation.pattern == "whole":
        simulation.prompt_range(length)
    if simulation.pattern == "paper" and max(simulation.strides) >= length:
        raise SettingsError(f"simulation.stride={simulation.stride} leaves no prompt in rows of {length} tokens")


def _validate_schedule(training: TrainingConfig) -> None:
    """Refuses learning-rate schedules that need settings which a run has none of, by taking a step of one."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        schedule = get_scheduler(training.lr_schedule, optimizer, training.warmup_steps, training.steps)
        optimizer.step()
        schedule.step()
    except Exception as error:  # each schedule has checks of its own
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"training.lr_schedule={training.lr_schedule} does not work with training.warmup_steps and training.steps "
            f"alone ({reason}): choose another, such as linear or cosine"
        ) from None


def validate_preparation(config: RunConfig, info: dict[str, Any]) -> None:
    """Refuses settings that contradict how the rows were prepared. info: rows.json of their folder."""
    length, prepared = config.data.row_length, info["data"]["row_length"]
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


def validate_rows(config: RunConfig, available: int) -> None:
    """Refuses a step that would take a row twice. available: rows of the train split."""
    batch = config.training.global_batch
    if available == 0:
        raise SettingsError(f"data.folder={config.data.folder} has no rows in its train split: prepare more documents")
    if batch > available:
        raise SettingsError(
            f"training.global_batch={batch} is more than the {available} rows of the train split in "
            f"{config.data.folder}: choose a smaller one, or prepare more documents"
        )


def validate_tokens(config: RunConfig, model_config: PretrainedConfig, sequences: Rows) -> None:
    """Refuses rows made with another tokenizer than the model's."""
    if config.model.path is not None:
        validate_same_tokens(config.model.path, sequences, config.model.origin)
    validate_token_ids(sequences.info, model_config.get_text_config(decoder=True).vocab_size)


def validate_length(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Refuses rows that are longer than the model's positions reach."""
    reach = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if reach is not None and config.data.row_length > reach:
        raise SettingsError(
            f"data.row_length={config.data.row_length} is longer than the model's max_position_embeddings={reach}"
        )


def micro_batches(config: RunConfig, world: int) -> int:
    """Micro-batches of each rank in a step; refuses a global batch that does not divide into them."""
    training, sequence_parallel_size = config.training, config.parallel.sequence
    groups = world // sequence_parallel_size
    rows = training.micro_batch * groups
    if not rows or training.global_batch % rows:
        who = f"{world} ranks"
        if sequence_parallel_size > 1:
            who = f"{groups} groups of {sequence_parallel_size} ranks (parallel.sequence)"
        raise SettingsError(
            f"training.global_batch={training.global_batch} must be a multiple of training.micro_batch="
            f"{training.micro_batch} times {who}"
        )
    return training.global_batch // rows


def setting_warnings(config: RunConfig) -> list[str]:
    """One line for each setting that is allowed but surely a mistake."""
    length, simulation, found = config.data.row_length, config.simulation, []
    budgets = [with_budget(config.refresh, budget) for budget in simulation.budgets]
    if simulation.pattern != "off" and min(refresh.largest_budget(1) for refresh in budgets) >= length:
        name = "refresh.budget" if simulation.budget is None else "simulation.budget"
        value = config.refresh.budget if simulation.budget is None else simulation.budget
        found.append(
            f"warning: {name}={value} is never smaller than the context "
            f"(data.row_length={length}): nothing is simulated"
        )
    if simulation.pattern == "whole" and config.refresh.select_stride and simulation.select_strides == [None]:
        found.append(
            f"warning: refresh.select_stride={config.refresh.select_stride}, but simulation.select_stride is null: "
            "selecting steps are evaluated and exported, not trained for"
        )
    return found
