"""Loads or makes the model of a run, with the refresh attention on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

import refreshkv
from refreshkv.loading import load_model
from refreshkv.settings import SettingsError
from refreshkv.train.adapter import add_adapters, quantization_options
from refreshkv.train.engine import engine_settings, init_processes
from refreshkv.train.job import Job
from refreshkv.train.kernels import use_liger
from refreshkv.train.look_ahead import prepare_look_ahead
from refreshkv.train.recomputation import recompute_layers


def build_model(job: Job) -> PreTrainedModel:
    """The run's model, with the refresh attention on.

    An existing model is loaded in the run's precision, and DeepSpeed makes its float32 master weights from that. At
    ZeRO stage 3 no process holds it whole. A new model is made in float32, with the same weights on every layout.
    """
    config, training = job.config, job.config.training
    if config.model.path is not None:
        dtype = torch.bfloat16 if training.dtype == "bf16" else torch.float32
        with divided_while_loading(job):
            options = quantization_options(config, job.model_config, _device())
            model = load_model(config.model.path, "model.path", config.model.origin, dtype=dtype, **options)
    else:
        _validate_memory(job)
        torch.manual_seed(training.seed)
        model = AutoModelForCausalLM.from_config(job.model_config, dtype=torch.float32)
    refreshkv.enable(model, config.refresh, prompt_attention=config.model.prompt_attention)
    prepare_look_ahead(model, training)
    if training.kernels == "liger":
        use_liger(model)
    if training.adapter is not None:
        add_adapters(model, training.adapter, training.seed)
        if training.activation_offload:  # the reentrant form passes no gradients on where no input has one
            model.enable_input_require_grads()
    if training.activation_checkpointing:
        recompute_layers(model, training.activation_checkpointing, training.activation_offload)
    return model


def _device() -> torch.device:
    """Where this process trains."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def _validate_memory(job: Job) -> None:
    """Raises `SettingsError` for a new model that the machine's memory cannot hold: every rank makes all of it."""
    needed, there = 4 * job.shape.parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise SettingsError(
            f"model.scratch: {job.shape.parameters:,} parameters take {needed / 1e9:,.0f} GB in float32, and this "
            f"machine has {there / 1e9:,.0f}: choose fewer layers, a smaller vocabulary or a smaller hidden size"
        )


@contextmanager
def divided_while_loading(job: Job) -> Iterator[None]:
    """At ZeRO stage 3 on several ranks, models made inside are divided over the ranks layer by layer.

    All ranks must enter together.
    """
    if job.world == 1 or job.zero_stage != 3:
        yield
        return
    init_processes(2 * job.config.training.timeout)
    # transformers keeps a weak reference: the object must live as long as models are to be divided
    deepspeed_config = HfDeepSpeedConfig(engine_settings(job))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del deepspeed_config
