"""A hybrid, a mixture of experts and a model with softcaps through the whole road: prepare, train on 2 ranks, export,
evaluate, generate; all weights, and adapters beside them.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.jobs import ROOT, SCRATCH, make_rows, read_metrics, run_job, run_settings

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "hybrid": {
        **SCRATCH,
        **EXPERTS,
        "model_type": "qwen3_next",
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 8,
    },
    "experts": {
        **SCRATCH,
        **EXPERTS,
        "model_type": "qwen3_moe",
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    },
    "softcaps": {
        **SCRATCH,
        "model_type": "gemma2",
        "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 16,
        "attn_logit_softcapping": 5.0,
    },
}


def refreshkv(folder, *arguments):
    """A command in a process of its own: what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "refreshkv", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


def base_of(name, rows, folder):
    """A model with random weights and the tokenizer of the rows."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name])).save_pretrained(folder)
    shutil.copytree(rows / "tokenizer", folder, dirs_exist_ok=True)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["all weights", "adapters"])
@pytest.mark.parametrize("name", MODELS)
def test_prepare_train_export_evaluate_generate(name, trained, rows, tmp_path):
    training = {"steps": 4, "save_every": 4, "log_every": 1, "activation_checkpointing": True}
    export = ["export", "run", "model"]
    settings = run_settings(rows, tmp_path / "run", training=training)
    settings["model"] = {"scratch": MODELS[name]}
    if trained == "adapters":
        settings["model"] = {"path": base_of(name, rows, tmp_path / "base")}
        settings["training"] |= {"adapter": {"rank": 4, "alpha": 8.0}, "learning_rate": 1e-2}
        export.append("--merge")
    code, printed = run_job(settings, "--dry-run", ranks=1)
    assert code == 0, printed
    assert ("active a token" in printed) == (name != "softcaps")
    assert ("load-balancing loss times 0.01" in printed) == (name == "experts")
    code, printed = run_job(settings)
    assert code == 0, printed
    losses = [values["loss"] for values in read_metrics(tmp_path / "run").values()]
    assert len(losses) == 4 and losses[-1] < losses[0]

    assert "decoding against the parallel form" in refreshkv(tmp_path, *export)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == MODELS[name]["model_type"] and config["refreshkv"]["budget"] == 8
    strategies = "full,refresh" + ("" if name == "softcaps" else ",streaming")  # which follows no softcap
    refreshkv(
        tmp_path, "evaluate", "--model", "model", "--data", rows, "--split", "train", "--rows", 2, "--last-tokens", 8,
        "--output", "report", "--strategies", strategies,
    )  # fmt: skip
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert ("streaming" in json.dumps(report).lower()) == ("streaming" in strategies)
    assert "NaN" not in json.dumps(report)
    (tmp_path / "prompt.txt").write_text("word00 word01 word02 " * 4)
    generate = ("generate", "--model", "model", "--prompt-file", "prompt.txt", "--max-new-tokens", 4)
    assert refreshkv(tmp_path, *generate)
