"""The plugin for axolotl: with a stand-in for its base class, and, where axolotl is installed, in a run of it."""

import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from refreshkv import RefreshConfig, SettingsError, SimulationConfig, enable
from refreshkv.simulation.draw import draw_simulation, fitted
from refreshkv.simulation.padding import LeftPadding
from tests.helpers.jobs import ROOT
from tests.helpers.models import random_ids, tiny_model

PLUGIN = "refreshkv.simulation.axolotl_plugin"
BASE = ROOT / "base" / "python-4m"
SECTION = {"seed": 5, "simulation": {"stride": [2, 3, 5]}, "refresh": {"budget": 8}}
STEPS, LENGTHS = 3, (40, 33, 64, 51)


@pytest.fixture
def plugin(monkeypatch):
    pytest.importorskip("pydantic")
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = object
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield importlib.import_module(PLUGIN).RefreshPlugin()
    sys.modules.pop(PLUGIN, None)


def test_what_the_plugin_does_to_a_model_and_a_trainer(plugin):
    """It simulates as simulate() does; the padding of all batches goes to the left."""
    model, other = tiny_model().train(), enable(tiny_model(), RefreshConfig(budget=8)).train()
    cfg, ids = {"seed": 3, "refreshkv": {**SECTION, "seed": None}}, random_ids(2, 40)
    assert plugin.get_input_args() == f"{PLUGIN}.RefreshArgs"
    plugin.pre_model_load(cfg)
    plugin.post_model_load(cfg, model)
    drawn = draw_simulation(SimulationConfig(stride=[2, 3, 5]), RefreshConfig(budget=8), 40, 3, 1)
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids, simulation=drawn, use_cache=False).logits)
    trainer = SimpleNamespace(data_collator=list, eval_data_collator=list, bench_data_collator=None)
    (callback,) = plugin.add_callbacks_post_trainer(cfg, trainer)
    assert callback.simulation is plugin.simulation and trainer.bench_data_collator is None
    assert isinstance(trainer.data_collator, LeftPadding) and isinstance(trainer.eval_data_collator, LeftPadding)
    plugin.post_train(cfg, model)
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_packing", True),
        ("eval_sample_packing", True),
        ("pretraining_sample_concatenation", True),
        ("batch_flattening", True),
        ("batch_flattening", "auto"),
        ("dpo_padding_free", True),
    ],
)
def test_packing_is_refused(plugin, name, value):
    words = f"^{name}: {str(value).lower()} puts several sequences into a row.* set {name}: false$"
    with pytest.raises(SettingsError, match=words):
        plugin.pre_model_load({name: value})
    plugin.pre_model_load({name: False})


def test_unknown_settings_are_refused(plugin):
    with pytest.raises(SettingsError, match="unknown setting refreshkv.simulation.strides; did you mean"):
        plugin.pre_model_load({"refreshkv": {"simulation": {"strides": 5}}})


def write_run(folder):
    """A run of axolotl in which each step takes all rows, with a learning rate of 0; its rows."""
    rows = [random_ids(1, length, length)[0].tolist() for length in LENGTHS]
    lines = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * 9 + row[9:]} for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    settings = {
        "base_model": str(BASE),
        "plugins": [f"{PLUGIN}.RefreshPlugin"],
        "refreshkv": SECTION,
        "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": None}],
        "special_tokens": {"pad_token": "<|endoftext|>"},
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "sequence_len": 64,
        "micro_batch_size": len(LENGTHS),
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_steps": STEPS,
        "learning_rate": 0.0,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "val_set_size": 0,
        "test_datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": None, "split": "train"}],
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "output_dir": "out",
        "dataset_prepared_path": "prepared",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return rows


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="needs the package axolotl")
def test_a_run_of_axolotl(tmp_path):
    """LoRA, checkpointing, padded batches: the losses of the same rows with the simulation handed in, and evaluation
    in full."""
    rows = write_run(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "axolotl.cli.train", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "loss" in line]
    model = enable(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), RefreshConfig(budget=8)).train()
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    labels = ids.where(mask.cumsum(1) > 9, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    settings, padding = SimulationConfig(stride=[2, 3, 5]), width - min(LENGTHS)
    with torch.no_grad():
        full = float(model(**batch).loss)
        for step, line in enumerate(lines, 1):
            fit = fitted(settings, width, padding, SECTION["seed"], step)
            drawn = draw_simulation(fit, RefreshConfig(budget=8), width, SECTION["seed"], step)
            expected = float(model(**batch, simulation=drawn).loss)
            assert line["loss"] == pytest.approx(expected, abs=1e-4) and abs(expected - full) > 1e-3
            assert "loss partial" in line and line["plain share"] == 0
    evaluated = [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]
    assert len(lines) == STEPS and evaluated[-1] == pytest.approx(full, abs=1e-4)
