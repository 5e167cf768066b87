"""Adapters in our own loop: only they are trained and saved, resumed exactly, merged, exported; 4-bit base models."""

import json
import re
import shutil
import signal
import time
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import refreshkv
from refreshkv import RefreshConfig, SettingsError
from refreshkv.settings import load_settings, settings_from_dict
from refreshkv.simulation.draw import draw_simulation
from refreshkv.train.adapter import add_adapters
from refreshkv.train.adapter_config import AdapterConfig
from refreshkv.train.adapter_shape import adapter_shape
from refreshkv.train.batch import make_batch
from refreshkv.train.card import model_card
from refreshkv.train.checkpoint_reader import find_checkpoint
from refreshkv.train.config import RunConfig
from refreshkv.train.export import _validate_form, export
from refreshkv.train.export_adapter import adapted_model
from refreshkv.train.export_error import ExportError
from refreshkv.train.job import resolve
from refreshkv.train.loss import CausalLossModel, LossSums
from refreshkv.train.memory import memory_needed
from refreshkv.train.preflight import report
from refreshkv.train.recomputation import recompute_layers
from refreshkv.train.resume import needs_conversion
from refreshkv.train.run_folder import State, finished_checkpoints
from tests.helpers.adapter_runs import SAVE_EVERY, STEPS, adapter_settings, finish, make_base, start
from tests.helpers.jobs import ROOT, make_rows, read_metrics
from tests.helpers.models import random_ids, tiny_enabled, tiny_model
from tests.helpers.scripts import load_script

peft = pytest.importorskip("peft")

LOSSES = ("loss", "loss full", "loss partial", "grad norm")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def base(rows, tmp_path_factory):
    return make_base(rows, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(rows, base, tmp_path_factory):
    """A run of two ranks that nothing interrupts."""
    output = tmp_path_factory.mktemp("trained") / "run"
    finish(adapter_settings(rows, base, output))
    return output


def losses(output):
    return {step: [values.get(name) for name in LOSSES] for step, values in read_metrics(output).items()}


def resume_from(trained, output, step):
    """A copy of a run that was ended after the checkpoint of `step`."""
    shutil.copytree(trained, output)
    for folder in finished_checkpoints(output):
        if folder.name > f"step-{step:07d}":
            shutil.rmtree(folder)
    identity = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**identity, "saved": step}))


def test_a_resumed_run_repeats_the_uninterrupted_one(rows, base, trained, tmp_path):
    """Dropout in the adapters, norms trained beside them."""
    output = tmp_path / "run"
    resume_from(trained, output, SAVE_EVERY)
    printed = finish(adapter_settings(rows, base, output), "--resume")
    assert f"continuing after step {SAVE_EVERY}" in printed
    assert losses(output) == losses(trained) and sorted(losses(output)) == list(range(1, STEPS + 1))


def test_checkpoints_hold_the_trained_weights_alone(trained, base):
    folder = finished_checkpoints(trained)[-1]
    saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert saved and all("lora_" in name or "modules_to_save" in name for name in saved)
    adapted = adapted_model(find_checkpoint(trained))
    untouched = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, weight in adapted.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        if plain in untouched:
            assert torch.equal(weight, untouched[plain]), name
    assert any(weight.abs().max() > 0 for name, weight in adapted.state_dict().items() if "lora_B" in name)


@torch.no_grad()
def test_both_exports_are_the_trained_model(trained, base, tmp_path, monkeypatch):
    adapted = adapted_model(find_checkpoint(trained))
    ids = random_ids(2, 40)
    expected = adapted(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert (expected - plain).abs().max() > 0.01, "training has changed nothing"

    merged = export(trained, tmp_path / "merged", form="merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert merged.merge_difference < 1e-5 and merged.reload_difference == 0 and merged.decode_difference < 1e-5
    assert RefreshConfig.from_dict(model.config.refreshkv).budget == 8 and "merged against" in str(merged)
    assert merged.parameters == model.num_parameters()

    result = export(trained, tmp_path / "adapter", form="adapter")
    found = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(found.eval()(ids).logits, expected, rtol=0, atol=1e-5)
    assert result.reload_difference == 0 and result.decode_difference < 1e-5 and result.merge_difference is None
    assert "adapter_model.safetensors" in result.sizes and "model.safetensors" not in result.sizes
    assert str(base) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "PeftModel" in card and "adapter rank" in card
    monkeypatch.chdir(tmp_path)
    run_snippet(card.replace('"BASE"', repr(str(base))))


def run_snippet(card):
    """Runs the usage example of a model card; it writes more tokens, and transformers warns of no older name."""
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`past_key_values`", FutureWarning)
        exec(snippet, names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_another_base_model_is_refused(rows, trained, tmp_path):
    """At the path of the one beside which the adapters were trained."""
    other = make_base(rows, tmp_path / "base", initializer_range=0.2)
    checkpoint = find_checkpoint(trained)
    checkpoint.settings.model.path = str(other)
    with pytest.raises(SettingsError, match="model.path=.* holds other weights than those beside which the adapters"):
        adapted_model(checkpoint)


def test_resuming_beside_another_base_model_is_refused(rows, base, trained, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    output = tmp_path / "run"
    settings = adapter_settings(rows, copy, output)
    finish({**settings, "training": {**settings["training"], "steps": 1}}, ranks=1)
    make_base(rows, tmp_path / "new", initializer_range=0.2)
    shutil.copyfile(tmp_path / "new" / "model.safetensors", copy / "model.safetensors")
    ranks = start({**settings, "training": {**settings["training"], "steps": 1}}, "--resume", ranks=1)
    assert ranks.wait() == [2]
    assert "error: --resume: model.path=" in ranks.printed and "holds other weights" in ranks.printed


@pytest.mark.parametrize("offload", [False, True])
def test_only_adapters_have_gradients_and_recomputation_changes_nothing(offload):
    ids = random_ids(2, 40)
    batch = make_batch({"input_ids": ids}, "all", torch.device("cpu"))
    config = settings_from_dict(RunConfig, {"data": {"row_length": 40}, "refresh": {"budget": 6, "stride": 3}})
    simulation = draw_simulation(config.simulation, config.refresh, 40, 0, 1)
    found = []
    for share in (0.0, 1.0):
        model = tiny_enabled(RefreshConfig(budget=6, stride=3)).train()
        add_adapters(model, AdapterConfig(rank=3, also_train=["norm"]), seed=1)
        for name, part in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(part, std=0.1)
        model = model.double()
        if share:
            if offload:
                model.enable_input_require_grads()
            recompute_layers(model, share, offload)
        loss_model = CausalLossModel(model, "chunked").train()
        sums = LossSums(*loss_model(**batch.model_arguments(simulation, False)))
        sums.objective.backward()
        gradients = {name: part.grad for name, part in loss_model.named_parameters() if part.grad is not None}
        assert gradients and all("lora_" in name or "modules_to_save" in name for name in gradients)
        assert set(gradients) == {name for name, part in loss_model.named_parameters() if part.requires_grad}
        found.append((sums.objective.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "adapter",
    [AdapterConfig(rank=3), AdapterConfig(rank=2, targets=["q_proj", "up_proj"], also_train=["embed_tokens", "norm"])],
)
def test_the_shape_counts_what_peft_trains(adapter):
    model = tiny_model()
    shape = adapter_shape(model, adapter)
    add_adapters(model, adapter, seed=0)
    assert shape.trained == sum(part.numel() for part in model.parameters() if part.requires_grad)
    assert shape.products == sum(part.numel() for name, part in model.named_parameters() if "lora_" in name)


REFUSED = {
    "scratch": (
        {"model": {"path": None, "scratch": {"model_type": "llama"}}},
        "set model.path instead of model.scratch",
    ),
    "a target": ({"adapter": {"targets": ["wq"]}}, "targets: the model has no linear layer wq; it has down_proj"),
    "the output": ({"adapter": {"targets": ["lm_head"]}}, "lm_head is the output layer"),
    "the output trained": ({"adapter": {"also_train": ["lm_head"]}}, "also_train: lm_head is the output layer"),
    "a module": ({"adapter": {"also_train": ["wte"]}}, "no module with weights whose name ends in wte"),
    "linear trained": ({"adapter": {"also_train": ["mlp"]}}, "mlp has linear layers"),
    "no adapters": ({"model": {"quantization": "nf4"}, "adapter": None}, "nf4 needs training.adapter"),
    "stage 3": ({"model": {"quantization": "nf4"}, "stage": 3}, "nf4 does not work with ZeRO stage 3"),
    "rank": ({"adapter": {"rank": 0}}, "training.adapter.rank"),
    "no targets": ({"adapter": {"targets": []}}, "training.adapter.targets is empty"),
    "unknown": ({"adapter": {"ranks": 2}}, "unknown setting training.adapter.ranks; did you mean"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, rows, base, tmp_path):
    changes, words = REFUSED[name]
    adapter = changes.get("adapter", {})
    settings = adapter_settings(rows, base, tmp_path / "run", stage=changes.get("stage", 2), adapter=adapter or {})
    settings["training"]["adapter"] = adapter
    settings["model"] = {**settings["model"], **changes.get("model", {})}
    with pytest.raises(SettingsError, match=words):
        resolve(settings_from_dict(RunConfig, settings), 1, dry=True)


def test_tied_embeddings_cannot_be_trained_alone():
    with pytest.raises(SettingsError, match="embed_tokens shares its weight with the output layer"):
        adapter_shape(tiny_model(tie_word_embeddings=True), AdapterConfig(also_train=["embed_tokens"]))


@pytest.mark.parametrize(("form", "option"), [("merged", "--merge"), ("adapter", "--adapter")])
def test_exports_of_adapters_need_adapters(trained, form, option):
    checkpoint = find_checkpoint(trained)
    checkpoint.settings.training.adapter = None
    with pytest.raises(ExportError, match=f"{option}: .* trained all weights .no training.adapter.: leave it out"):
        _validate_form(checkpoint, form)


def test_memory_of_adapters_by_hand(base, rows, tmp_path):
    """Bytes in bfloat16 on one GPU: only trained weights have gradients, master weights and moments."""
    settings = adapter_settings(rows, base, tmp_path / "run", dtype="bf16", adapter={"rank": 4})
    plain = resolve(settings_from_dict(RunConfig, settings), 1, dry=True)
    trained = plain.shape.adapters.trained
    needs = memory_needed(plain)
    assert needs["weights"] == 2 * (plain.shape.parameters + trained)
    assert needs["gradients"] == 2 * trained and needs["optimizer"] == 12 * trained
    settings["model"]["quantization"] = "nf4"
    packed = memory_needed(resolve(settings_from_dict(RunConfig, settings), 1, dry=True))
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    saved = linear * (2 - 0.5 - 1 / 64 - 4 / (64 * 256))
    assert needs["weights"] - packed["weights"] == pytest.approx(saved)


@pytest.mark.parametrize(("stage", "world", "refuses"), [(2, 1, True), (1, 2, True), (2, 2, False), (0, 1, False)])
def test_another_layout_is_refused(stage, world, refuses):
    state = State(3, 100, 2, 0 if stage == 0 else 2, "rows")
    if refuses:
        with pytest.raises(
            SettingsError, match="training.adapter does not convert .* go on with 2 ranks and ZeRO stage 2"
        ):
            needs_conversion(state, world, stage, has_adapters=True)
    else:
        assert needs_conversion(state, world, stage, has_adapters=True) is False


@pytest.mark.parametrize(
    ("name", "gigabytes", "together", "packed"), [("lora", 80, 24.2, ""), ("qlora", 24, 14.0, ", linear layers in nf4")]
)
def test_the_ready_configs_fit_as_docs_say(name, gigabytes, together, packed, tmp_path, monkeypatch):
    """By the report of --dry-run for Llama-3.1-8B's shape. Trained weights by hand: rank times inputs and outputs."""
    monkeypatch.chdir(ROOT)
    shape = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 131072}))
    config = load_settings(RunConfig, f"llama31-8b-8k-{name}", [f"model.path={tmp_path}"])
    text = report(resolve(config, 1, dry=True), gigabytes * 1e9, 1e15)
    trained = 32 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert f"8,030,261,248 parameters, 32 layers, bf16{packed}; {trained:,} trained (rank 32)" in text
    found = float(next(line for line in text.splitlines() if "together" in line).split()[1])
    assert found == pytest.approx(together, abs=0.05) and f"fits        yes: {gigabytes:.1f} GB a GPU" in text


@pytest.mark.parametrize(("option", "file"), [("--merge", "model.safetensors"), ("--adapter", "adapter_config.json")])
def test_the_command_exports_both(trained, tmp_path, capsys, option, file):
    load_script("export").main([str(trained), str(tmp_path / "out"), option])
    assert (tmp_path / "out" / file).is_file() and (tmp_path / "out" / "config.json").is_file()
    assert ("merged against the adapters" in capsys.readouterr().out) == (option == "--merge")


def test_the_card_names_the_adapter(rows, base, tmp_path, trained):
    checkpoint = find_checkpoint(trained)
    checkpoint.settings.model.path = "someone/base"
    card = model_card(checkpoint.settings, checkpoint.state, "me/adapter", is_adapter=True)
    assert "base_model: someone/base" in card and 'from_pretrained("someone/base"' in card


# ---- slow: every stage, kills, 4 bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")]
)
def test_every_stage_resumes_and_exports(rows, base, tmp_path, stage, dtype):
    straight, output = tmp_path / "straight", tmp_path / "run"
    finish(adapter_settings(rows, base, straight, stage, dtype=dtype))
    resume_from(straight, output, SAVE_EVERY)
    finish(adapter_settings(rows, base, output, stage, dtype=dtype), "--resume")
    assert losses(output) == losses(straight)
    result = export(output, tmp_path / "merged")
    assert result.merge_difference < 1e-5 and result.reload_difference < 1e-2
    assert export(output, tmp_path / "adapter", form="adapter").reload_difference < 1e-5


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(rows, base, tmp_path, trained):
    output = tmp_path / "run"
    ranks = start(adapter_settings(rows, base, output))
    end = time.monotonic() + 100
    while not finished_checkpoints(output) and time.monotonic() < end:
        time.sleep(0.002)
    for rank in range(2):
        ranks.signal(rank, signal.SIGKILL)
    assert -signal.SIGKILL in ranks.wait()
    printed = finish(adapter_settings(rows, base, output), "--resume")
    assert "continuing after step" in printed and losses(output) == losses(trained)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_four_bits(rows, tmp_path, stage):
    """Weights in nf4 on CPUs, evaluations in between: finite losses, exact resume, both exports."""
    pytest.importorskip("bitsandbytes")
    base = make_base(rows, tmp_path / "base", hidden_size=64, intermediate_size=128)  # blocks of 64 weights
    straight, output = tmp_path / "straight", tmp_path / "run"
    model = {"quantization": "nf4"}
    evaluated = {"evaluate_every": 2, "evaluate_rows": 2, "evaluate_tokens": 8}
    finish(adapter_settings(rows, base, straight, stage, model=model, **evaluated), ranks=1)
    resume_from(straight, output, SAVE_EVERY)
    finish(adapter_settings(rows, base, output, stage, model=model), "--resume", ranks=1)
    assert losses(output) == losses(straight)
    assert losses(output)[STEPS][0] < losses(output)[1][0]
    folder = finished_checkpoints(output)[-1]
    saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert saved and all("lora_" in name or "modules_to_save" in name for name in saved)
    result = export(output, tmp_path / "merged")
    assert result.merge_difference < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert export(output, tmp_path / "adapter", form="adapter").reload_difference < 1e-5
    refreshkv.enable(merged)
