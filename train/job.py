"""A run resolved: every setting is checked once, and everything that follows from the settings is computed once."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from refreshkv.attention import sequence_parallel
from refreshkv.data.rows import Rows, load_rows
from refreshkv.quantized import quantization_method
from refreshkv.train.adapter import validate_adapter, validate_quantized_model
from refreshkv.train.config import RunConfig
from refreshkv.train.deepspeed_json import read_deepspeed_json, zero_stage
from refreshkv.train.kernels import validate_kernels, validate_prompt_attention
from refreshkv.train.look_ahead import validate_look_ahead
from refreshkv.train.optimizer import validate_optimizer
from refreshkv.train.shape import Shape, model_configuration, model_shape
from refreshkv.train.trackers import validate_trackers
from refreshkv.train.validation import (
    micro_batches,
    validate_length,
    validate_preparation,
    validate_rows,
    validate_settings,
    validate_tokens,
)


@dataclass(frozen=True)
class Job:
    """A run on a number of ranks, whose settings are known to work together. Made by `resolve`."""

    config: RunConfig
    world: int
    """Ranks."""
    model_config: PretrainedConfig
    shape: Shape
    deepspeed: dict[str, Any]
    """The user's part of DeepSpeed's configuration."""
    zero_stage: int
    micro_batches: int
    """Micro-batches of each rank in a step."""
    sequences: Rows | None = None
    """The prepared rows; None in a dry run."""

    @property
    def prepared(self) -> Rows:
        """The prepared rows of a run that is no dry run."""
        assert self.sequences is not None
        return self.sequences

    @property
    def packed(self) -> str | None:
        """The format of linear layers' weights of 4 bits; None for ordinary weights."""
        return self.config.model.quantization or quantization_method(self.model_config)

    @property
    def output(self) -> Path:
        """Folder of the run."""
        return Path(self.config.training.output)

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that share each row."""
        return self.config.parallel.sequence

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that each take rows of their own."""
        return self.world // self.sequence_parallel_size

    def with_settings(self, config: RunConfig, world: int | None = None) -> "Job":
        """The same model and rows with other settings, and on another number of ranks if `world` is given."""
        world = world or self.world
        deepspeed = read_deepspeed_json(config.training.deepspeed)
        return replace(
            self,
            config=config,
            world=world,
            deepspeed=deepspeed,
            zero_stage=zero_stage(deepspeed),
            micro_batches=micro_batches(config, world),
        )


def resolve(config: RunConfig, world: int, dry: bool = False) -> Job:
    """Checks all settings of a run on `world` ranks, and reads what they name; nothing is written.

    dry: nothing will be trained here, so prepared rows, packages and a GPU need not be here either.

    Raises `SettingsError` with one line for the first setting that cannot work.
    """
    validate_settings(config)
    deepspeed = read_deepspeed_json(config.training.deepspeed)
    sequences = None if dry else load_rows(config.data.folder)
    if sequences is not None:
        validate_preparation(config, sequences.info)
        validate_rows(config, len(sequences.train))
    model_config = model_configuration(config.model)
    if sequences is not None:
        validate_tokens(config, model_config, sequences)
    validate_length(config, model_config)
    sequence_parallel.check_sequence(config.parallel.sequence, world, config.data.row_length, model_config)
    count = micro_batches(config, world)
    validate_adapter(config, zero_stage(deepspeed), dry)
    validate_quantized_model(config, model_config, zero_stage(deepspeed))
    validate_look_ahead(config, zero_stage(deepspeed))
    if not dry:
        validate_optimizer(config.training)
        validate_trackers(config.training.report_to)
        validate_kernels(config.training, model_config)
        validate_prompt_attention(config.model)
    return Job(
        config=config,
        world=world,
        model_config=model_config,
        shape=model_shape(model_config, config.training.adapter, config.model.origin),
        deepspeed=deepspeed,
        zero_stage=zero_stage(deepspeed),
        micro_batches=count,
        sequences=sequences,
    )
