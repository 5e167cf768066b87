"""Loads or makes the model of a run, with the refresh attention on, and checks that its rows fit it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

import refreshkv
from refreshkv.data.rows import Rows, validate_same_tokens, validate_token_ids
from refreshkv.loading import load_configuration, load_model
from refreshkv.settings import SettingsError
from refreshkv.train.config import RunConfig
from refreshkv.train.engine import engine_settings, init_processes, read_deepspeed_json, zero_stage
from refreshkv.train.kernels import use_liger
from refreshkv.train.recomputation import recompute_layers


def model_configuration(config: RunConfig) -> PretrainedConfig:
    """The transformers configuration of the run's model; `SettingsError` if there is none."""
    if config.model.path is not None:
        return load_configuration(config.model.path, "model.path")
    fields = dict(config.model.scratch)
    model_type = fields.pop("model_type")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        raise SettingsError(f"model.scratch.model_type: transformers knows no {model_type!r}") from None
    for name in fields:
        if not hasattr(default, name):
            raise SettingsError(f"unknown setting model.scratch.{name}: a {model_type} configuration has no such field")
    return AutoConfig.for_model(model_type, **fields)


def check_rows(config: RunConfig, model_config: PretrainedConfig, rows: Rows) -> None:
    """Refuses rows that the model cannot have been meant for: other tokens, or longer than its positions reach."""
    if config.model.path is not None:
        validate_same_tokens(config.model.path, rows)
    decoder = model_config.get_text_config(decoder=True)
    validate_token_ids(rows.info, decoder.vocab_size)
    reach = getattr(decoder, "max_position_embeddings", None)
    if reach is not None and config.data.row_length > reach:
        raise SettingsError(
            f"data.row_length={config.data.row_length} is longer than the model's max_position_embeddings={reach}"
        )


def build_model(config: RunConfig, model_config: PretrainedConfig) -> PreTrainedModel:
    """The run's model, with the refresh attention on.

    An existing one in the run's precision, of which DeepSpeed makes its float32 master weights; at ZeRO stage 3 no
    process holds it whole. A new one in float32, the same on every layout.
    """
    if config.model.path is not None:
        dtype = torch.bfloat16 if config.training.dtype == "bf16" else torch.float32
        with divided_while_loading(config):
            model = load_model(config.model.path, "model.path", dtype=dtype)
    else:
        torch.manual_seed(config.training.seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    refreshkv.enable(model, config.refresh, prompt_attention=config.model.prompt_attention)
    if config.training.kernels == "liger":
        use_liger(model)
    if config.training.activation_checkpointing:
        recompute_layers(model, config.training.activation_checkpointing, config.training.activation_offload)
    return model


@contextmanager
def divided_while_loading(config: RunConfig) -> Iterator[None]:
    """At ZeRO stage 3 with several ranks: models made in here are divided over them layer by layer, all together."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or zero_stage(read_deepspeed_json(config.training.deepspeed)) != 3:
        yield
        return
    init_processes(2 * config.training.timeout)
    told = HfDeepSpeedConfig(engine_settings(config, world))  # transformers looks for it as long as it lives
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del told
