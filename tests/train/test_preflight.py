"""What a run will need: figures worked by hand, advice that helps, work counted position by position; the mock step."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import Gemma2Config

from refreshkv import NEVER, RefreshConfig, Simulation, Trace
from refreshkv.settings import settings_from_dict
from refreshkv.train.chunked_loss import LOGITS_AT_ONCE
from refreshkv.train.config import RunConfig, SimulationConfig
from refreshkv.train.flops import Work, model_work, step_flops, visible_keys
from refreshkv.train.job import resolve
from refreshkv.train.memory import allocated, memory_needed
from refreshkv.train.preflight import advice, changes, report
from refreshkv.train.step_time import step_seconds
from tests.helpers.jobs import ROOT
from tests.helpers.models import random_ids, tiny_enabled

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
DEEPSPEED = ROOT / "configs" / "deepspeed"
JOB = resolve(
    settings_from_dict(
        RunConfig, {"model": {"scratch": LLAMA}, "training": {"deepspeed": str(DEEPSPEED / "zero2.json")}}
    ),
    world=1,
    dry=True,
)
"""Any run of Llama-3.1-8B's shape: the cases change its settings and its ranks."""
SHAPE = JOB.shape


def run_config(tmp_path, stage=3, sequence=1, **training):
    path = tmp_path / f"zero{stage}.json"
    zero = {"stage": stage, **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})}
    path.write_text(json.dumps({"zero_optimization": zero}))
    values = {
        "data": {"row_length": 8192},
        "refresh": {"budget": 2048},
        "simulation": {"pattern": "paper", "stride": 50},
        "training": {"deepspeed": str(path), "global_batch": 8, **training},
        "parallel": {"sequence": sequence},
    }
    return settings_from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 2, 2, 12), (1, 2, 2, 6), (2, 2, 1, 6), (3, 1, 1, 6)]
)
def test_states_by_hand(tmp_path, stage, weights, gradients, optimizer):
    """Bytes per parameter in bfloat16 on two GPUs: float32 master weights and two moments."""
    needs = memory_needed(JOB.with_settings(run_config(tmp_path, stage), 2))
    assert SHAPE.parameters == 8_030_261_248
    found = [needs[name] / SHAPE.parameters for name in ("weights", "gradients", "optimizer")]
    assert found == [weights, gradients, optimizer]


@pytest.mark.parametrize(
    ("stage", "dtype", "optimizer", "expected"),
    [
        *((stage, "bf16", "adamw-8bit", (2 if stage < 3 else 1, 2 if stage < 2 else 1, 3)) for stage in (1, 2, 3)),
        (0, "bf16", "adamw-8bit", (2, 2, 6)),
        (0, "fp32", "adamw-8bit", (4, 4, 2)),
        *((stage, "fp32", "adamw-8bit", (4 if stage < 3 else 2, 4 if stage < 2 else 2, 3)) for stage in (1, 2, 3)),
        (0, "fp32", "adamw", (4, 4, 8)),
        (2, "fp32", "adamw", (4, 2, 6)),
    ],
)
def test_states_of_other_kinds_by_hand(tmp_path, stage, dtype, optimizer, expected):
    """Two moments of a byte each; in float32 ZeRO keeps a second copy of its part of the weights."""
    needs = memory_needed(JOB.with_settings(run_config(tmp_path, stage, dtype=dtype, optimizer=optimizer), 2))
    assert tuple(needs[name] / SHAPE.parameters for name in ("weights", "gradients", "optimizer")) == expected


MEASURED = [
    (8192, {"pattern": "off"}, 1, 1.506, 75.3),
    (8192, {"pattern": "paper", "stride": 50}, 1, 1.580, 75.3),
    (32768, {"pattern": "off"}, 1, 6.414, 84.9),
    (32768, {"pattern": "whole", "prompt_length": 16384, "stride": 10}, 1, 5.630, 85.2),
    (131072, {"pattern": "whole", "prompt_length": 65536, "stride": 10}, 2, 18.737, 103.7),
]
"""T, pattern, GPUs per row, seconds a step, GB: two H200s, torch 2.11, ZeRO 3, all layers recomputed, one row a GPU or
pair, K = 2048 (benchmarks/training.py, 22 November 2026); a matrix product ran at 800 TFLOP/s."""


@pytest.mark.parametrize(("length", "simulation", "sequence", "seconds", "gigabytes"), MEASURED)
def test_what_was_measured_is_predicted(length, simulation, sequence, seconds, gigabytes):
    training = {"deepspeed": str(ROOT / "configs" / "deepspeed" / "zero3.json"), "activation_checkpointing": True}
    values = {"data": {"row_length": length}, "refresh": {"budget": 2048}, "simulation": simulation}
    values |= {"training": {**training, "global_batch": 2 // sequence}, "parallel": {"sequence": sequence}}
    job = JOB.with_settings(settings_from_dict(RunConfig, values), 2)
    assert allocated(memory_needed(job)) / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert step_seconds(job, 800e12) == pytest.approx(seconds, rel=0.1)


FASTER = [
    (8192, {"pattern": "off"}, 2, 0.25, 1.881, 129.4),
    (8192, {"pattern": "paper", "stride": 50}, 2, 0.25, 1.905, 129.4),
    (32768, {"pattern": "off"}, 1, 0.625, 5.492, 134.1),
    (32768, {"pattern": "whole", "prompt_length": 16384, "stride": 10}, 1, 0.625, 4.988, 138.6),
]
"""T, pattern, rows per GPU, recomputed share, seconds a step, GB: likewise, with Liger's kernels and whole layers."""


@pytest.mark.parametrize(("length", "simulation", "rows", "share", "seconds", "gigabytes"), FASTER)
def test_what_was_measured_with_faster_settings_is_predicted(length, simulation, rows, share, seconds, gigabytes):
    """What Liger's kernels and whole layers save in time is not predicted."""
    training = {"deepspeed": str(ROOT / "configs" / "deepspeed" / "zero3-layers.json"), "kernels": "liger"}
    training |= {"activation_checkpointing": share, "micro_batch": rows, "global_batch": 2 * rows}
    values = {"data": {"row_length": length}, "refresh": {"budget": 2048}, "simulation": simulation}
    job = JOB.with_settings(settings_from_dict(RunConfig, {**values, "training": training}), 2)
    assert allocated(memory_needed(job)) / 1e9 == pytest.approx(gigabytes, rel=0.03)
    assert seconds < step_seconds(job, 800e12) < 1.2 * seconds


def test_less_is_needed_where_it_should_be(tmp_path):
    def total(name=None, length=None, **settings):
        config = run_config(tmp_path, **settings)
        config.data = replace(config.data, row_length=length or config.data.row_length)
        needs = memory_needed(JOB.with_settings(config, 4))
        return needs[name] if name else sum(needs.values())

    checkpointed = {"activation_checkpointing": True}
    assert total("activations", **checkpointed) < total("activations") / 5
    shares = [total(activation_checkpointing=share) for share in (False, 0.25, 0.5, 0.75, True)]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 5
    assert total("activations", 4 * 8192, activation_offload=True, **checkpointed) == 0
    half = {"activation_checkpointing": 0.5}
    assert 0 < total("activations", activation_offload=True, **half) < total("activations", **half)
    assert total(kernels="liger") < total()
    assert total("activations", length=4 * 8192, sequence=4) == pytest.approx(total("activations"), rel=0.05)
    assert total("logits and loss", **checkpointed) < total("logits and loss", loss="logits", **checkpointed) / 2
    assert total("optimizer", optimizer="adamw-8bit") == total("optimizer") / 2
    assert total("optimizer's step", length=256, **checkpointed) == 8e9


@pytest.mark.parametrize("loss", ["chunked", "logits"])
def test_the_slope_of_a_softcap_takes_memory(tmp_path, loss):
    """Four bytes for each of the logits, of which "chunked" has 512 MiB in float32 at once."""
    settings = {"activation_checkpointing": True, "loss": loss}
    config = run_config(tmp_path, **settings)
    config.distillation.weight = 1.0  # its forward pass is then the larger part of "chunked"
    job = JOB.with_settings(config, 4)
    plain = memory_needed(job)["logits and loss"]
    capped = replace(job, model_config=Gemma2Config(vocab_size=128256))
    logits = 8192 * 128256 if loss == "logits" else LOGITS_AT_ONCE
    assert memory_needed(capped)["logits and loss"] - plain == 4 * logits


def test_what_is_not_recomputed_costs_no_time(tmp_path):
    def seconds(**training):
        return step_seconds(JOB.with_settings(run_config(tmp_path, **training), 2), 800e12)

    none, half, every = (seconds(activation_checkpointing=share) for share in (False, 0.5, True))
    assert every - half == pytest.approx(half - none)
    assert 1.15 < every / none < 4 / 3
    assert seconds(global_batch=16) > 2 * seconds(global_batch=8) - seconds(global_batch=2)


def test_the_advice_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = run_config(tmp_path, loss="logits")
    before = deepcopy(config)
    for gigabytes in (60, 80, 100):
        needed = sum(memory_needed(JOB.with_settings(config, 4)).values())
        found = advice(JOB.with_settings(config, 4), gigabytes * 1e9)
        assert needed > gigabytes * 1e9 and found is not None and config == before
        changed = deepcopy(config)
        for setting in found.split(" (")[0].split():
            name, value = setting.split("=")
            section, key = name.split(".")
            setattr(getattr(changed, section), key, yaml.safe_load(value))
        assert sum(memory_needed(JOB.with_settings(changed, 4)).values()) <= gigabytes * 1e9
    job = JOB.with_settings(config, 4)
    assert advice(job, 1e9) is None
    text = report(job, 60e9, 700e12)
    assert "fits        no: 60.0 GB a GPU; set training.loss=chunked" in text
    assert "fits        yes" in report(job, 900e9, 700e12)
    names = [text.split("=")[0] for text, _ in changes(job)]
    assert names.index("training.activation_checkpointing") < names.index("parallel.sequence")
    config.training.activation_checkpointing = True
    job = JOB.with_settings(config, 4)
    assert "faster: training.activation_checkpointing=false" in report(job, 900e9, 700e12)
    assert "faster: training.activation_checkpointing=0.5" in report(job, 85e9, 700e12)
    assert "--gpu-memory" in report(job, None, 700e12)


def test_selecting_steps_are_in_the_report_and_in_the_memory():
    config = deepcopy(JOB.config)
    config.data = replace(config.data, row_length=32768)  # so that activations are the peak
    config.simulation = SimulationConfig(stride=NEVER, select_stride=[None, 7, 2])
    selecting = JOB.with_settings(config)
    assert "selecting at least every 2 tokens" in report(selecting, None, 700e12)
    config = deepcopy(config)
    config.simulation = SimulationConfig(stride=NEVER)
    without = JOB.with_settings(config)
    assert "selecting" not in report(without, None, 700e12)
    assert sum(memory_needed(selecting).values()) > sum(memory_needed(without).values())


@pytest.mark.parametrize(
    "config",
    [
        RefreshConfig(budget=6, stride=4),
        RefreshConfig(budget=40, stride=3),
        RefreshConfig(budget=5, stride=NEVER),
        RefreshConfig(budget=6, stride=4, select_stride=3),
    ],
)
def test_visible_keys_are_those_of_the_queue(config):
    """Against a queue that is pushed and dropped from, token by token."""
    length, prompt = 40, 9
    found = visible_keys(Simulation(prompt, config), length)[0].tolist()
    expected = list(range(1, prompt + 1))
    queue = min(config.budget, prompt)
    for step in range(1, length - prompt + 1):
        position = prompt - 1 + step
        if step % config.stride == 0:
            expected.append(position + 1)
            queue = min(config.budget, position + 1)
        elif config.select_stride is not None and step % config.select_stride == 0:
            queue = min(config.budget, position + 1)
            expected.append(queue)
        else:
            expected.append(queue + 1)
            queue = min(queue + 1, config.budget)
    assert found == expected


def test_recorded_full_steps_count(tmp_path):
    model = tiny_enabled(dtype=torch.float32)
    simulation = Simulation(9, RefreshConfig(budget=6, stride=3, threshold=0.1))
    trace = Trace()
    model(random_ids(2, 40), simulation=simulation, trace=trace, use_cache=False)
    work = model_work(model)
    assert work == Work(2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 32 * 61, 4 * 4 * 8, [None, None])
    full = step_flops(work, 1, 40, None)
    assert full == 3 * (2 * work.weights * 40 + work.pair * 2 * 40 * 41 / 2)
    every = step_flops(work, 1, 40, Simulation(9, RefreshConfig(budget=6, stride=3)))
    never = step_flops(work, 1, 40, Simulation(9, RefreshConfig(budget=6, stride=NEVER)))
    assert never < step_flops(work, 1, 40, simulation, trace.full_steps) < every < full
